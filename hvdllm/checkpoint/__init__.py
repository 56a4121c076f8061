"""Checkpoints: write.py makes them, read.py finds the newest whole one."""
