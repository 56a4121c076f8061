"""From text to batches: corpus (what is read), tokenize, shards (token files), stream (batch = f(seed, position)).

Blind to models, exchange, trainer and horovod. stream.py alone needs torch: a text is prepared without it.
"""
