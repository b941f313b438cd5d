"""Processes, channels, groups and who waits for whom; knows nothing of prompts or models."""
