"""Settings: compose.py reads them from files and the command line, and check.py checks that they fit together."""
