"""A fine-tune as its base and a small delta: `ensemble compress`. `server.weights.deltas` reads what this writes."""
