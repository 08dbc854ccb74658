"""Corpora: Parquet and JSONL files, shortened part by part, in this process or by the workers of a Ray cluster."""
