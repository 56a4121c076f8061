"""One or two kills of what jobs/bench/exactly_once.sh does fifty times, and that it would see a document twice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from exactly_once import exactly_once

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("source", ["redis", "folder", "readers"])
def test_each_document_is_learnt_once_whatever_is_killed(source: str, tmp_path: Path) -> None:
    """Seen to catch: prequential sums of both ranks that a checkpoint adds up, which differ in the last digit."""
    if source == "redis":
        pytest.importorskip("redis")
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed: apt-get install redis-server")
    found = exactly_once(2, source, int.from_bytes(os.urandom(2)), tmp_path)
    assert found["documents"] == 120 and found["equal records"] > 15
