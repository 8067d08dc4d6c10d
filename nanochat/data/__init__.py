"""Text in: parquet shards, sources, packing, and rows for the loader."""
