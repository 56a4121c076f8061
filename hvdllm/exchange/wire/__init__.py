"""How a sum travels: a file for each wire, or for those that share a mechanism.

plain.py         as it is
coded.py         fp16, bf16, int8, top-k, sign: one mechanism, codecs.py holds their codes
powersgd.py      products of thin matrices
feedback.py      what the lossy wires leave out and keep for the next sum
hierarchical.py  around any of the others but powersgd: only one rank's share of a host's sum crosses hosts
"""
