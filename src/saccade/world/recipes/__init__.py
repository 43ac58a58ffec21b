"""How the world's models are trained: one recipe a file."""
