"""The loop and what it stands on: loop.py is the whole of it, build.py makes the objects it takes."""
