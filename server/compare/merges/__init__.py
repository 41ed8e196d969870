"""Weight merges by mergekit: resolved, folded, merged, checked, cached."""
