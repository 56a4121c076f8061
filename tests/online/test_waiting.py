"""What ranks tell each other while they wait for text, in files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hvdllm import untrusted
from hvdllm.errors import RunError
from hvdllm.online.waiting import Pauses
from hvdllm.world.base import Asks


def test_what_a_rank_is_asked_reaches_all_once_and_in_order(tmp_path: Path) -> None:
    ranks = [Pauses(tmp_path, "life", rank) for rank in range(3)]
    ranks[1].ask(Asks(save=True))
    ranks[2].ask(Asks(stop=True))
    ranks[2].ask(Asks())
    assert ranks[0].asked(3) == Asks(stop=True, save=True) and ranks[0].asked(3) == Asks()
    for asks in (Asks(save=True), Asks(stop=True)):
        ranks[0].announce(asks)
    for rank in ranks[1:]:
        assert [rank.heard() for _ in range(3)] == [Asks(save=True), Asks(stop=True), None]
    assert Pauses(tmp_path, "another", 1).heard() is None


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(untrusted, "appended", full)
    with pytest.raises(RunError, match=r"the other ranks do not hear .* goes on from the last checkpoint"):
        Pauses(tmp_path, "life", 1).ask(Asks(stop=True))
    with pytest.raises(RunError, match="make room"):
        Pauses(tmp_path, "life", 0).announce(Asks(save=True))
