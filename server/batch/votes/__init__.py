"""Votes over answers that are there already: the files that hold them, and what is made of each row."""
