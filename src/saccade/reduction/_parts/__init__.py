"""What the reductions are made of: importance, budget, choice."""
