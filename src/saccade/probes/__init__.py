"""Methods that read: where a model looks, and which heads do it."""
