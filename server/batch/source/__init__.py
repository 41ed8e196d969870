"""From files to rows: JSONL, CSV, Parquet, folders; prompts from templates; grids."""
