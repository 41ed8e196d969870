"""A job: one SQLite file with every row and, as soon as it is there, every answer."""
