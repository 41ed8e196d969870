"""Files and batches over HTTP: kept on disk, validated, run in turn, resumed after a restart."""
