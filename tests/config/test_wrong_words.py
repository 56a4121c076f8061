"""Command lines that cannot work, made from the settings of all parts: each is one sentence, and exit code 2."""

from __future__ import annotations

import random
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_messages import SETTINGS, Field, option

from hvdllm import registry
from hvdllm.cli.main import main
from hvdllm.config.composition import unfit
from hvdllm.settings import LARGEST

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NUMBERS = (
    "x",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "[1]",
    "{a: 1}",
    "'1 2'",
    "true",
    "--5",
    "''",
    "٣٤x",
    "0x",
    "{",
    "[1,",
    "'\x1b[2J'",
)
WORDS = ("bogus", "''", "'\x1b[31mred\x07'", "[a]", "{a: 1}", "ü" * 9, "x" * 5000, "nan", "true", "'a\nb'", "\u202egnp")
ANY = ("${oc.env:HOME}", "${now:}", "???")


def wrong(kind: type, f: Field) -> list[str]:
    """Values that a setting cannot have."""
    hint, about = str(typing.get_type_hints(kind)[f.name]), f.metadata
    found: list[str] = []
    if ("int" in hint or "float" in hint) and "str" not in hint and "Any" not in hint:
        found += NUMBERS
        found += [f"{about['least'] - 1}"] if about["least"] is not None else ["-1e30"]
        found += ["1e30" if about["most"] == LARGEST else repr(about["most"] * 2 + 1)]
        found += ["1.5"] if "float" not in hint else []
    if hint == "<class 'bool'>":
        found += ["maybe", "2", "[true]", "nan", "'\x1b'"]
    if about["choices"]:
        found += WORDS
    return [*found, *ANY] if found else []  # any text may be right for what is free text


def lines(seed: int) -> Iterator[list[str]]:
    """A wrong value for most settings, settings and groups that do not exist, and parts that do not fit each other."""
    draw = random.Random(seed)
    for group, kind, f in SETTINGS:
        key = f"{group}.{f.name}" if group else f.name
        if key in ("name", "runs_dir", "budget_tokens"):  # which the test gives
            continue
        unknown = draw.choice([f"{key}s=1", f"{key}.more=1", f"{key} =1", f"{key.upper()}=1", f"{key}"])
        values = [f"{key}={value}" for value in wrong(kind, f)]
        first = [f"{group}={option(group, kind)}"] if group else []
        yield [*first, unknown if draw.random() < 0.2 or not values else draw.choice(values)]
    for name in (
        "exchange=bogus",
        "wire=",
        "model=../x",
        "text=/etc",
        "optim=\x1b[1m",
        "world=1",
        "launch=ü",
        "=1",
        "-x",
    ):
        yield [name]
    for exchange in registry.parts("exchange").values():
        for wire in registry.parts("wire").values():
            if unfit(exchange, wire):
                yield [f"exchange={exchange.name}", f"wire={wire.name}"]


@pytest.mark.parametrize("part", range(4))
def test_what_cannot_work_is_one_sentence_and_ends_with_2(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of some 300 lines, another value for each setting in each run of the tests."""
    monkeypatch.chdir(tmp_path)
    seed = random.randrange(2**32)
    refused = 0
    for words in list(lines(seed))[part::4]:
        code = main(["train", *words, "budget_tokens=10", "name=never", f"runs_dir={tmp_path}/runs"])
        said = capsys.readouterr().err
        where = f"{words}, seed {seed}: {code} {said!r}"
        assert code == 2 and said.count("\n") == 1 and said.startswith("hvdllm: "), where
        assert not CONTROL.search(said[:-1]) and "Traceback" not in said and len(said) < 1000, where
        refused += 1
    assert refused > 75 and not any(tmp_path.iterdir())
