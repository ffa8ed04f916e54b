"""Puts a run together from flags; beside the scripts the only code that reads them."""
