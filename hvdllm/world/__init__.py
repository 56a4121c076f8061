"""Which processes train together and how they talk. detect.py says which, base.py what a world can do, ranks.py what
the worlds of several ranks share."""
