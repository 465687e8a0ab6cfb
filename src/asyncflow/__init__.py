"""AsyncFlow."""
