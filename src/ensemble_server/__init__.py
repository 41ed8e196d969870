"""The distribution's one import name. `server` and `ensembles` are links to the repository's top-level folders."""
