"""Settings: compose.py reads them from files and words, check.py what fits together."""
