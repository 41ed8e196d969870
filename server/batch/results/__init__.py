"""From answers to files: OpenAI's lines, tables, submissions; the same read back for votes."""
