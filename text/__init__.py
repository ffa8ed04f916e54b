"""Files to packed sequences, with an exact position."""
