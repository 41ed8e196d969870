"""The YAML, checked as a whole and frozen."""
