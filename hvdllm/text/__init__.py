"""From text to windows and conversations: corpus (what is read), tokenize, shards (token files), windows, conversations.

Blind to models, exchange, trainer and horovod. Only windows.py and conversations.py need torch: a text is prepared
without it.
"""
