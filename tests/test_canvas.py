"""Pictures do not depend on the user's matplotlib."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "nonsense", ""])
def test_another_backend_and_a_matplotlibrc_change_nothing(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    code = (
        "from hvdllm.canvas import pyplot; plain = pyplot(); import matplotlib as m\n"
        "assert not m.rcParams['text.usetex'] and m.rcParams['font.size'] == 10 and m.get_backend().lower() == 'agg'\n"
        "figure, axes = plain.subplots(); axes.set_title('a_b'); figure.savefig('x.png')"
    )
    env = os.environ | {"MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "x.png").stat().st_size > 1000
