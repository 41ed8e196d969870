"""Weights of pools that are fitted to development text instead of guessed. Pure functions on arrays."""
