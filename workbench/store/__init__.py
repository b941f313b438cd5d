"""Runs on disk: Parquet tables and a manifest with hashes; knows records and `Run`, draws nothing."""
