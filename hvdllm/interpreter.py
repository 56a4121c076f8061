"""How to start another process of this Python so that it finds the same modules.

It does not look in the current folder, where a file random.py of the user would be imported instead of Python's.
"""

from __future__ import annotations

import os
import sys

PYTHON = (sys.executable, "-P", "-m")


def found() -> dict[str, str]:
    """The variable that gives another interpreter the module path of this one."""
    return {"PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
