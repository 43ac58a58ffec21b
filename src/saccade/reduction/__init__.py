"""Methods that spend less: fewer tokens, fewer cache entries, sparser attention."""
