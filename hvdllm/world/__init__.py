"""Which processes train together and how they talk. detect.py says which, base.py what a world can do."""
