"""Members behind other OpenAI-compatible endpoints."""
