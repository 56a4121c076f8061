"""From run folders to a verdict: read, compare, measure, draw, say. Needs no torch and no Horovod."""
