"""Methods that move attention, hidden states or predictions at inference."""
