"""Worlds: which processes train together, and how they talk.

detect.py finds out which launcher started this process, base.py is the protocol of a world, and ranks.py holds what the
worlds of several ranks share.
"""
