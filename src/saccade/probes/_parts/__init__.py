"""What probes share."""
