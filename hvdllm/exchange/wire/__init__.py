"""How a sum travels: a wire each.

plain.py         as it is
coded.py         fp16, bf16, int8, top-k, sign: one mechanism, codecs.py holds their codes
powersgd.py      products of thin matrices
feedback.py      what the lossy ones keep
hierarchical.py  around any of the others but powersgd: only one rank's share crosses hosts
"""
