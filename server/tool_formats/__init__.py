"""How models write tool calls: a reader for each habit, and how to tell from a chat template which one a model has."""
