"""Arms: every one a model of one config, what is fitted decided on held-out text."""
