"""How command lines are read: a flag as a typed field, checked values, one line for a mistake."""
