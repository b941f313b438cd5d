"""Engines, memory and the pipeline gather -> generate -> scatter; knows ranks only through their groups."""
