"""Training: loop.py holds the whole loop, run.py makes the parts that it takes, and life.py runs it from end to end."""
