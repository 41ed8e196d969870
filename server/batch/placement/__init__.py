"""Where the models are: one in memory at a time, several machines, a Ray cluster."""
