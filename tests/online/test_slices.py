"""Slices of a stream: a bounded number is evaluated, alike on all ranks, and `hvdllm evaluate` finds the same again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from log_kit import SHORT, fill, trained, values

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.online.windows import NEWEST, OLDER, shown


def test_a_bounded_number_is_shown_and_none_comes_back() -> None:
    """Seen to catch: older slices that change with each new one, and more of them with each."""
    left_out: set[int] = set()
    for slices in range(0, 3000):
        found = shown(slices)
        assert found == sorted(set(found)) and len(found) <= NEWEST + OLDER
        assert found[-NEWEST:] == list(range(max(0, slices - NEWEST), slices))
        assert not found or found[0] == 0, "the first one says what was forgotten since the beginning"
        assert not left_out & set(found)
        left_out |= set(range(slices)) - set(found)
    assert shown(0) == [] and shown(3) == [0, 1, 2] and shown(NEWEST + OLDER - 1) == list(range(NEWEST + OLDER - 1))


def evaluated(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("exchange", ["allreduce", "local_sgd", "parameter_server"])
def test_evaluate_finds_what_the_run_has_found(
    tmp_path: Path, exchange: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log", 240)
    size = 3 if exchange == "parameter_server" else 2
    more = ["world=virtual", f"world.size={size}", f"exchange={exchange}", *SHORT.get(exchange, ())]
    records = trained(tmp_path, *more, "budget_tokens=3840", "keep=9")
    log = [f"text.path={tmp_path / 'log'}"]
    evals = [record for record in records if record["kind"] == "eval"]
    for step in sorted(int(path.name) for path in (tmp_path / "a" / "checkpoints").iterdir())[-2:]:
        found = evaluated([str(tmp_path / "a"), *log, "--step", str(step)], capsys)
        (saved,) = [each["tokens"] for each in records if each["kind"] == "save" and each["step"] == step]
        theirs = next(each for each in evals if each["tokens"] == saved)
        assert {key for key in found if "/" in key} == {key for key in theirs if "/" in key}
        if exchange != "local_sgd":  # a checkpoint there holds the weights of the last meeting
            assert found["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    assert found["tokens"] == 48 * len([key for key in found if key.startswith("loss/")])
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    assert evaluated([str(tmp_path / "a"), *log], capsys)["loss"] == pytest.approx(evals[-1]["loss"], rel=1e-9)
    for path in (tmp_path / "log").iterdir():
        shutil.copy(path, tmp_path / "a" / "log")
    assert evaluated([str(tmp_path / "a")], capsys)["loss"] == pytest.approx(evals[-1]["loss"], rel=1e-9)


def test_ranks_agree_on_what_they_evaluate(tmp_path: Path) -> None:
    fill(tmp_path / "log", 240)
    one = trained(tmp_path, "budget_tokens=3840")
    three = trained(tmp_path, "budget_tokens=3840", "world=virtual", "world.size=3", name="b")
    for each, other in zip(*([r for r in found if r["kind"] == "eval"] for found in (one, three)), strict=True):
        losses = {key: value for key, value in each.items() if key.startswith("loss")}
        assert losses == pytest.approx({key: value for key, value in other.items() if key.startswith("loss")}, rel=1e-9)
    assert "loss/slice-2" in each


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "holds no text: give text.path="),
        (["text.path={tmp}/none"], "holds no text"),
        (["text.path={tmp}/short"], "ends before"),
        (["text.rate=3"], "give text.path= or nothing"),
        (["--data-dir", "{tmp}"], "give text.path= or nothing"),
    ],
)
def test_what_cannot_be_evaluated_is_a_sentence(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log", 240)
    fill(tmp_path / "short", 20)
    trained(tmp_path)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "a"), *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_before_a_slice_is_whole_there_is_nothing_to_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log", 240)
    trained(tmp_path, "budget_tokens=384")
    assert not values(list(runs.records(tmp_path / "a")), "loss", "eval")
    assert main(["evaluate", str(tmp_path / "a"), f"text.path={tmp_path / 'log'}"]) == 2
    assert "no slice of its stream is whole" in capsys.readouterr().err
