"""matplotlib with its defaults. Pictures depend neither on the user's backend (MPLBACKEND, which a notebook sets) nor
on a matplotlibrc in the current folder or the home."""

from __future__ import annotations

import os
from typing import Any

Drawn = Any  # an object of matplotlib, which is imported only when something is drawn


def pyplot() -> Drawn:
    """The module matplotlib.pyplot with default settings. Raises ImportError if matplotlib is not installed."""
    os.environ["MPLBACKEND"] = "agg"  # another backend may not even be importable here
    import matplotlib
    from matplotlib import pyplot as found

    matplotlib.use("Agg")
    matplotlib.rcdefaults()
    return found
