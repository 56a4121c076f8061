"""That this file stands here puts this folder on the import path: tests/launch.py is importable from every room."""
