"""What the reductions are made of: importance, budget, choice, and what stands around them."""
