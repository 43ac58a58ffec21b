"""Measurements. Each is one command, runs its variants in turn in one process, and writes a table."""
