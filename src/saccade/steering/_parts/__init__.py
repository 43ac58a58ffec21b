"""What the steering methods are made of: rules, mixes, plausibility."""
