"""Training on a stream: what arrives is written to a log, and batches are a function of the place in the log.

log     the tokens of all documents that have arrived, one after the other (log.py). It is only appended to
index   a line for each append: how long the log is, and up to where the source was read
reader  the process that reads the source and appends (reader.py); it takes up the source where the index ends
round   which windows of the log the next update trains on (rounds.py). Rank 0 decides it once and for all
"""
