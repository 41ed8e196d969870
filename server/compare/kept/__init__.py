"""What a comparison keeps on disk: records, results, where they came from, caches by content. Lowest of its rooms."""
