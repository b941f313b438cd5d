"""Arithmetic of layouts, layers, shards and lengths: integers and numpy only, no processes, no torch."""
