"""Settings: schema.py says what there is, compose.py reads it from files and words, check.py what fits together."""
