"""Rows through the models, many at once, and the ways of answering one."""
