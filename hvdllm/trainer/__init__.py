"""The loop and what it stands on: loop.py is the whole of it, run.py makes what it takes, life.py runs it."""
