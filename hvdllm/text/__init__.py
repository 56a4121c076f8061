"""From text to items: corpus (what is read), tokenize, encode (a chunk at a time, here or in workers), shards (token
files), and what is dealt: windows, packed (whole documents) and conversations.

Blind to models, exchange, trainer and horovod. Only windows.py, packed.py and conversations.py need torch: a text is
prepared without it, but for counting the cores of a large one.
"""
