"""What lies on disk or on a hub: checkpoints, tokenizers, adapters, embedding models; nothing of engines."""
