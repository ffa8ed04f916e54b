"""Models and data sets over a network that fails."""
