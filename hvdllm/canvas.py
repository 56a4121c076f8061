"""matplotlib as it comes: pictures do not depend on the user's backend (a notebook's, in MPLBACKEND) nor on a
matplotlibrc that lies in the folder or the home."""

from __future__ import annotations

import os
from typing import Any

Drawn = Any  # of matplotlib, which is imported only when something is drawn


def pyplot() -> Drawn:
    """Raises ImportError where matplotlib is not installed."""
    os.environ["MPLBACKEND"] = "agg"  # another one may not even be importable here
    import matplotlib
    from matplotlib import pyplot as found

    matplotlib.use("Agg")
    matplotlib.rcdefaults()
    return found
