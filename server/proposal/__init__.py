"""From what a user has (folders, files, ids, addresses) to a config that fits it and this machine."""
