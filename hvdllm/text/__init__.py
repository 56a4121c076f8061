"""From text to items: corpus (what is read), tokenize, shards (token files), windows and conversations (what is dealt).

Blind to models, exchange, trainer and horovod. Only windows.py and conversations.py need torch: a text is prepared
without it.
"""
