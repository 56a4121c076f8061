"""How the gradients of the ranks meet: base.py is the protocol and its words, each other file one idea."""
