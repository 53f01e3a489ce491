"""Validation of arguments, atomic files, and plots."""
