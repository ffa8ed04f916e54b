"""The output folder: atomic, verified, locked."""
