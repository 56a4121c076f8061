"""How another process of this Python is started, so that it finds what this one found.

It finds nothing by the folder that it stands in: a file random.py of the user's would be imported in place of Python's.
"""

from __future__ import annotations

import os
import sys

PYTHON = (sys.executable, "-P", "-m")


def found() -> dict[str, str]:
    """This interpreter's path, for the environment of another."""
    return {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
