"""What methods of this family share."""
