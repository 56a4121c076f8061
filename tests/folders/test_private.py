"""Who may read a text may read what is made of it, and nobody else."""

import os
import stat
from pathlib import Path

import pytest

from hvdllm.text import shards
from hvdllm.text.parts import Files


def modes(tmp_path: Path, *of: int) -> set[int]:
    """Of all that is made of a text whose files have these modes."""
    for number, mode in enumerate(of):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"some words of text {number}\n" * 400)
        path.chmod(mode)
    text = Files(
        path=[str(tmp_path / f"{number}.txt") for number in range(len(of))], tokenizer="bytes", validation_share=0
    )
    folder = shards.prepare(text, tmp_path / "data", say=lambda said: None).folder
    folders = {stat.S_IMODE(folder.stat().st_mode)}
    return folders | {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.fixture(autouse=True)
def usual() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("of", "made"),
    [
        ([0o600], {0o600, 0o700}),
        ([0o644, 0o600], {0o600, 0o700}),
        ([0o640], {0o640, 0o750}),
        ([0o644], {0o644, 0o755}),
        ([0o400], {0o600, 0o700}),
        ([0o666], {0o644, 0o755}),  # as the umask says
    ],
)
def test_shards_follow_the_text(tmp_path: Path, of: list[int], made: set[int]) -> None:
    assert modes(tmp_path, *of) == made


def test_a_text_of_others_is_no_reason_to_be_read_by_others(tmp_path: Path) -> None:
    os.umask(0o077)
    assert modes(tmp_path, 0o644) == {0o600, 0o700}
