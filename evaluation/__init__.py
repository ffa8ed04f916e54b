"""Figures of a student beside its teacher."""
