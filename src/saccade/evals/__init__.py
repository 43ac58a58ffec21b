"""Tasks, and the rules by which answers are scored."""
