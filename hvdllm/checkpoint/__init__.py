"""Checkpoints: write.py makes them, whole.py finds the newest complete one, read.py reads it."""
