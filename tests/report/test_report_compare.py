"""What may be compared: differences, groups, tuning, the reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from report_kit import FOUND, make

from hvdllm.errors import UserError
from hvdllm.report.compare import Comparison, compare, reference
from hvdllm.report.read import History, read


def run(tmp_path: Path, folder: str, *args: Any, **more: Any) -> History:
    found = read(make(tmp_path / folder, *args, **more))
    assert isinstance(found, History)
    return found


def parts(found: Comparison) -> dict[str, str]:
    return {one.key: one.part for one in found.differences}


def test_runs_that_differ_in_exchange_and_seed_alone(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, f"{e}{s}", e, s, name=f"{e}{s}", save_every=100 * s)
        for e in ("allreduce", "acco")
        for s in (0, 1)
    ]
    found = compare(runs, [], [], anyway=False)
    assert [(group.label, group.seeds) for group in found.groups] == [("allreduce", ["0", "1"]), ("acco", ["0", "1"])]
    assert found.fair and found.by == ["exchange"]
    assert parts(found) == {
        "exchange.name": "compared", "seed": "replicate", "name": "no matter", "save_every": "no matter",
    }  # fmt: skip


def test_exchange_and_wire_are_compared_where_they_differ(tmp_path: Path) -> None:
    def one(name: str, exchange: str, **more: Any) -> History:
        return run(tmp_path, name, exchange, **more)

    int8 = {"wire__name": "int8", "wire__block": 256}
    runs = [one("a", "allreduce"), one("b", "allreduce", **int8), one("c", "acco", exchange__timed=True, **int8)]
    runs += [one("d", "acco", exchange__timed=False, **int8)]
    found = compare(runs, [], [], anyway=False)
    assert found.by == ["exchange", "wire"]
    assert [group.label for group in found.groups] == [
        "allreduce, fp32", "allreduce, int8", "acco, int8, timed=true", "acco, int8, timed=false",
    ]  # fmt: skip
    assert reference(found.groups, None).label == "allreduce, fp32"
    assert reference(found.groups, "ACCO, int8, timed=true") is found.groups[2]
    with pytest.raises(UserError, match="several groups"):
        reference(found.groups, "acco")
    with pytest.raises(UserError, match="no such group; the groups are allreduce, fp32;"):
        reference(found.groups, "ddp")


def test_the_one_setting_that_differs_is_compared(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a"), run(tmp_path, "b", optim__lr=0.01)]
    found = compare(runs, [], [], anyway=False)
    assert found.by == ["optim.lr"] and [group.label for group in found.groups] == ["lr=0.003", "lr=0.01"]
    assert reference(found.groups, None) is found.groups[0]
    seeds = compare([run(tmp_path, "c"), run(tmp_path, "d", seed=1)], [], [], anyway=False)
    assert [group.label for group in seeds.groups] == ["allreduce"]


DIFFERENT = {
    "optim.lr": {"optim__lr": 0.01},
    "budget_tokens": {"budget_tokens": 500},
    "precision": {"precision": "bf16"},
    "world.ranks": {"found": {"world": 4}},
    "data.hash": {"found": {"data_hash": "d2"}},
    "versions.torch": {"found": {"versions": {**FOUND["versions"], "torch": "2.14"}}},
    "git.commit": {"found": {"git": {"commit": "def"}}},
    "device.names": {"found": {"ranks": [{"host": "a", "device": "GPU"}, {"host": "b", "device": "GPU"}]}},
    "world.hosts_used": {"found": {"ranks": [{"host": "a", "device": "CPU"}] * 2}},
    "launch.link": {"launch": {"name": "horovodrun", "link": "200mbit"}},
}


@pytest.mark.parametrize("key", DIFFERENT)
def test_runs_that_differ_in_more_are_not_ranked(tmp_path: Path, key: str) -> None:
    runs = [run(tmp_path, "a"), run(tmp_path, "b", "acco", **DIFFERENT[key])]
    with pytest.raises(UserError, match=rf"no ranking: beside exchange the runs differ in .*{key} \("):
        compare(runs, [], [], anyway=False)
    found = compare(runs, [], [], anyway=True)
    assert not found.fair and [one.key for one in found.against] == [key]
    assert compare(runs, ["exchange", key], [], anyway=False).fair, "named, it is compared"


def test_what_changes_nothing_forbids_nothing(tmp_path: Path) -> None:
    other = {"found": {"git": {"commit": "abc", "dirty": True}, "ranks": [{"host": h, "device": "CPU"} for h in "xy"]}}
    runs = [run(tmp_path, "a"), run(tmp_path, "b", "acco", text__path="b.txt", init_from=None, **other)]
    runs.append(run(tmp_path, "c", "delayed", launch={"name": "slurm", "account": "x"}, track={"name": "wandb"}))
    found = compare(runs, [], [], anyway=False)
    assert found.fair and parts(found)["text.path"] == "no matter" and parts(found)["hosts"] == "no matter"
    elsewhere = run(tmp_path, "d", "acco", text__path="b.txt", found={"data_hash": None})
    with pytest.raises(UserError, match=r"text\.path"):
        compare([runs[0], elsewhere], [], [], anyway=False)


def tuned(tmp_path: Path, trials: dict[str, dict[float, tuple[float, ...]]]) -> list[History]:
    """exchange → rate → last loss of each seed."""
    return [
        run(tmp_path, f"{e}-{lr}-{seed}", e, seed, (8.0, 6.0, 5.0, last), optim__lr=lr)
        for e, rates in trials.items() for lr, losses in rates.items() for seed, last in enumerate(losses)
    ]  # fmt: skip


def test_the_best_of_equally_many_trials(tmp_path: Path) -> None:
    runs = tuned(
        tmp_path,
        {
            "allreduce": {0.1: (4.0, 4.4), 0.2: (4.1, 4.2)},  # means 4.2 and 4.15
            "acco": {0.1: (3.9, 4.0), 0.3: (3.8, math.nan)},  # one seed of the second diverged
        },
    )
    with pytest.raises(UserError, match=r"optim\.lr.*--tuned-by optim\.lr"):
        compare(runs, [], [], anyway=False)
    found = compare(runs, [], ["optim.lr"], anyway=False)
    assert [(g.label, len(g.trials), g.runs[0].settings["optim.lr"]) for g in found.groups] == [
        ("allreduce", 2, "0.2"), ("acco", 2, "0.1"),
    ]  # fmt: skip
    assert [len(group.runs) for group in found.groups] == [2, 2] and parts(found)["optim.lr"] == "tuned"
    assert found.groups[0].trials[1].loss == pytest.approx(4.15) and found.groups[1].trials[1].loss == math.inf


def test_unequal_tuning_is_refused(tmp_path: Path) -> None:
    runs = tuned(tmp_path, {"allreduce": {0.1: (4.0,)}, "acco": {0.1: (4.0,), 0.2: (3.0,), 0.3: (3.0,)}})
    for anyway in (False, True):
        with pytest.raises(UserError, match=r"unequal tuning: trials of optim\.lr are allreduce 1, acco 3"):
            compare(runs, [], ["optim.lr"], anyway)


def test_a_trial_that_did_not_finish_cannot_win(tmp_path: Path) -> None:
    runs = tuned(tmp_path, {"allreduce": {0.1: (4.0,), 0.2: (4.5,)}})
    runs += [run(tmp_path, "x", "acco", 0, (3.0, 1.0), optim__lr=0.1), run(tmp_path, "y", "acco", 0, optim__lr=0.2)]
    found = compare(runs, [], ["optim.lr"], anyway=False)
    assert found.groups[1].runs[0].name == "y" and any("did not finish" in note for note in found.notes)


def test_a_setting_of_one_exchange_is_tuned_with_that_of_all(tmp_path: Path) -> None:
    runs = tuned(tmp_path, {"allreduce": {0.1: (4.0,), 0.2: (4.5,)}})
    runs += [run(tmp_path, f"x{o}", "diloco", 0, exchange__outer_lr=o, optim__lr=0.1) for o in (0.5, 0.7)]
    found = compare(runs, [], ["optim.lr", "exchange.outer_lr"], anyway=False)
    assert [(group.label, len(group.trials)) for group in found.groups] == [("allreduce", 2), ("diloco", 2)]
    assert found.groups[1].trials[0].label == "exchange.outer_lr=0.5"


def test_flags_that_name_nothing(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a"), run(tmp_path, "b", "acco")]
    for by, by_tuning, match in ((["exhange"], [], "--by exhange"), ([], ["optim.rl"], "--tuned-by optim.rl")):
        with pytest.raises(UserError, match=match):
            compare(runs, by, by_tuning, anyway=False)
    with pytest.raises(UserError, match="replicates"):
        compare(runs, ["seed"], [], anyway=False)


def test_a_run_made_twice_is_said(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a"), run(tmp_path, "b", step_s=2.0), run(tmp_path, "c", "acco", 1)]
    notes = compare(runs, [], [], anyway=False).notes
    assert any("several runs of seed 0" in note for note in notes) and any("different seeds" in note for note in notes)
