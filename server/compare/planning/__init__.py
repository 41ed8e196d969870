"""What to compare: the YAML, checked as a whole, its texts and tasks."""
