"""Folders of any kind: what is a run, what of it counts, and what is skipped and why."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from report_kit import LOSSES, make, records, settings, write

from hvdllm.errors import UserError
from hvdllm.report import read as reading
from hvdllm.report import table
from hvdllm.report.compare import compare
from hvdllm.report.figures import measure
from hvdllm.report.metric import Metric
from hvdllm.report.read import History, Skipped, find, gather, read
from hvdllm.report.verdict import verdict


def one(folder: Path) -> History:
    found = read(folder)
    assert isinstance(found, History), found
    return found


def why(folder: Path) -> str:
    found = read(folder)
    assert isinstance(found, Skipped)
    return found.why


def test_a_whole_run(tmp_path: Path) -> None:
    run = one(make(tmp_path / "a", "acco", 3))
    assert (run.name, run.seed, run.status, run.lives, run.tokens, run.computed) == ("a", "3", "finished", 1, 400, 404)
    assert [(p.tokens, p.loss, p.seconds, p.wall_s) for p in run.evals] == [
        (100 * k, loss, 10 * k, 10.5 * k) for k, loss in enumerate(LOSSES, 1)
    ]
    assert [(p.bytes, p.updates) for p in run.evals] == [(1000 * k, 10 * k) for k in (1, 2, 3, 4)]
    sums = run.sums
    assert (sums.tokens, sums.seconds, sums.updates, sums.stale_most, sums.micro_batches) == (400, 40, 40, 2, [40, 120])
    assert sums.compute_s == pytest.approx(24) and sums.blocked_s == pytest.approx(12) and sums.stale == 40
    assert sums.flight_s == pytest.approx(20) and sums.cpu_s == pytest.approx(0.08) and sums.skew_s == pytest.approx(4)
    assert run.settings["exchange.name"] == "acco" and run.settings["optim.lr"] == "0.003"
    assert run.settings["world.ranks"] == "2" and run.settings["versions.torch"] == "2.13"
    assert run.settings["world.hosts_used"] == "2" and run.notes == []


def test_bytes_of_an_evaluation_between_commits(tmp_path: Path) -> None:
    lines = records(settings())
    lines = [r for r in lines if not (r["kind"] == "commit" and r["tokens"] in (100, 300))]
    for r in lines:
        if r["kind"] == "commit":
            r["bytes_sent"] = 2000.0
    assert [p.bytes for p in one(write(tmp_path / "a", lines)).evals] == [1000, 2000, 3000, 4000]


def test_an_unfinished_run(tmp_path: Path) -> None:
    lines = records(settings(), reason=None)
    lines = [r for r in lines if not (r["kind"] == "commit" and r["tokens"] == 400)]  # waits for its loss
    run = one(write(tmp_path / "a", lines, tail='{"kind": "commit", "tok'))
    assert run.status == "unfinished" and run.computed is None and len(run.evals) == 4
    assert run.evals[-1].bytes == 4000 and any("no records" in note for note in run.notes)


def test_a_run_before_its_first_evaluation(tmp_path: Path) -> None:
    lines = [r for r in records(settings(), reason=None) if r["kind"] != "eval"]
    run = one(write(tmp_path / "a", lines))
    assert run.evals == [] and run.sums.tokens == 400 and any("no evaluation" in note for note in run.notes)
    assert "first record" in why(write(tmp_path / "b", lines[:1]))


def test_a_resumed_run(tmp_path: Path) -> None:
    """The second life begins at 200 tokens, 20 s; its own wall-clock begins at 0 and has acts of 3 s and 1 s."""
    whole = records(settings())
    first = [r for r in whole if r.get("tokens", 0) <= 200 and r["kind"] != "end"]
    second: list[dict[str, Any]] = [r for r in whole if r.get("tokens", 0) > 200]
    for r, wall in zip([r for r in second if r["kind"] == "eval"], (13.0, 24.0), strict=True):
        r["wall_s"] = wall
    again = {**whole[0], "world": 3}
    lines = [*first, again, {"kind": "event", "what": "resumed from x", "tokens": 200}, *second]
    run = one(write(tmp_path / "a", lines))
    assert run.lives == 2 and run.settings["world.ranks"] == "2, then 3" and any("changed" in n for n in run.notes)
    # acts of the first life: 1 s up to 200 tokens; then 13 - (30 - 20) = 3 s, then 24 - (40 - 20) = 4 s
    assert [p.wall_s for p in run.evals] == [10.5, 21, 30 + 1 + 3, 40 + 1 + 4]
    assert [p.bytes for p in run.evals] == [1000, 2000, 3000, 4000] and run.status == "finished"


def test_a_run_that_went_on_after_its_end_is_unfinished(tmp_path: Path) -> None:
    lines = records(settings(), reason="stop")
    assert one(write(tmp_path / "a", lines)).status == "stopped"
    assert one(write(tmp_path / "b", [*lines, lines[0]])).status == "unfinished"


def test_records_without_wall_clock(tmp_path: Path) -> None:
    lines = records(settings())
    for r in lines:
        r.pop("wall_s", None)
    assert [p.wall_s for p in one(write(tmp_path / "a", lines)).evals] == [None] * 4


def test_config_yaml_stands_in_for_a_lost_run_record(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", records(settings("delayed"))[1:])
    assert "config.yaml" in why(folder)
    (folder / "config.yaml").write_text("seed: 5\nexchange: {name: delayed}\n")
    run = one(folder)
    assert run.seed == "5" and run.settings["exchange.name"] == "delayed" and "config.yaml" in run.notes[0]
    for bad in ("a: [", "- 1", "", "a: {" + "".join(f"c{k}: 1, " for k in range(3000)) + "}", "x" * 300_000):
        (folder / "config.yaml").write_text(bad)
        assert why(folder).startswith("no configuration"), bad[:20]
    bomb = "a: &a {x: 1, y: 2}\n" + "".join(
        f"{chr(98 + k)}: &{chr(98 + k)} {{p: *{chr(97 + k)}, q: *{chr(97 + k)}}}\n" for k in range(20)
    )
    (folder / "config.yaml").write_text(bomb)
    assert "alias" in why(folder)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diverged_run_keeps_its_evaluation(tmp_path: Path, loss: float) -> None:
    run = one(make(tmp_path / "a", losses=(8.0, loss)))
    assert run.evals[1].loss == math.inf and any("diverged" in note for note in run.notes)


def test_odd_values_are_left_out_with_a_note(tmp_path: Path) -> None:
    lines = records(settings(), reason=None)
    odd = [
        {"kind": "eval", "tokens": "500", "loss": 3.0, "seconds": 50},
        {"kind": "eval", "tokens": 500, "loss": "<b>", "seconds": 50},
        {"kind": "eval", "tokens": 500, "loss": True, "seconds": 50},
        {"kind": "eval", "tokens": 1, "loss": 1.0, "seconds": 50},  # goes back
        {"kind": "commit", "tokens": 10**400, "seconds": 50, "compute_s": 1, "blocked_s": 1, "flight_s": 1},
        {"kind": "commit", "tokens": 500, "seconds": 50, "compute_s": -1, "blocked_s": 1, "flight_s": 1},
        {"kind": "commit", "tokens": 500, "seconds": 1, "compute_s": 1, "blocked_s": 1, "flight_s": 1},
        {"kind": "commit"},
        {"kind": ["run"], "config": 7},
        {"kind": "run", "config": "no", "ranks": 3, "versions": [1], "git": "x"},
    ]
    run = one(write(tmp_path / "a", [*lines, *odd]))  # type: ignore[list-item]
    assert len(run.evals) == 4 and run.sums.tokens == 400 and run.settings["seed"] == "0"
    assert any(note.startswith("8 records left out") for note in run.notes)


def test_hostile_folders_are_skipped_with_a_reason(tmp_path: Path) -> None:
    for name in ("empty", "folder", "pipe", "dangling", "garbage", "deep", "binary", "long", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    (tmp_path / "folder/metrics.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe/metrics.jsonl")
    (tmp_path / "dangling/metrics.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "garbage/metrics.jsonl").write_text("not json\n[1]\n3\n" + '{"kind": "commit"}\n')
    (tmp_path / "deep/metrics.jsonl").write_text("[" * 500_000 + "\n")
    (tmp_path / "binary/metrics.jsonl").write_bytes(os.urandom(20_000))
    (tmp_path / "long/metrics.jsonl").write_text("x" * 3_000_000)
    (tmp_path / "none/config.yaml").write_text("seed: 1\n")
    runs, skipped = gather([str(tmp_path)])
    assert runs == []
    reasons = {Path(one.where).name: one.why for one in skipped}
    assert len(reasons) == 9
    assert reasons["empty"] == "metrics.jsonl: is empty" and reasons["none"] == "metrics.jsonl: is missing"
    assert all("no regular file" in reasons[name] for name in ("folder", "pipe")) and "nothing" in reasons["dangling"]


def test_a_file_beyond_any_run_is_skipped_not_read_in_part(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.truncate(2**40)  # holes: nothing on the disk
    found = read(folder)
    assert isinstance(found, Skipped) and "metrics.jsonl: is larger than 4,096 MiB" in found.why


def test_a_long_run_is_read_to_its_end_in_few_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_POINTS", 64)
    lines = records(settings(), tuple(8 - k / 1000 for k in range(1, 3001)))
    run = one(write(tmp_path / "a", lines))
    assert run.status == "finished" and len(run.evals) == 3000 and run.evals[-1].loss == 5.0
    assert run.sums.updates == 30_000 and run.evals[-1].bytes == 3_000_000
    assert [p.bytes for p in run.evals] == pytest.approx([1000.0 * k for k in range(1, 3001)]), "evenly spaced"


def test_sweeps_patterns_files_and_links(tmp_path: Path) -> None:
    a, b = make(tmp_path / "sweep/a", seed=0), make(tmp_path / "sweep/b", seed=1)
    make(a / "checkpoints/10", seed=9)  # below a run nothing is looked for
    (tmp_path / "sweep/loop").symlink_to(tmp_path / "sweep")
    (tmp_path / "sweep/self").symlink_to(tmp_path / "sweep/self")
    (tmp_path / "sweep/link").symlink_to(a)
    found, skipped = find([str(tmp_path / "sweep")])
    assert sorted(path.name for path in found) == ["a", "b"] and not skipped
    assert find([str(tmp_path / "sweep/[ab]"), str(a)])[0] == [a, b], "each once"
    assert find([str(b / "metrics.jsonl")])[0] == [b]
    with pytest.raises(UserError, match="no such folder"):
        find([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="no such folder"):
        find([str(tmp_path / "x*")])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/file").touch()
    assert [one.why for one in find([str(tmp_path / "bare")])[1]] == [
        "holds no run (a folder with config.yaml or metrics.jsonl)"
    ]
    assert len(find([str(tmp_path / "bare/file")])[1]) == 1


def test_a_loop_of_links_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(9):  # else 9 ** 4 folders
        (tmp_path / f"link{k}").symlink_to(tmp_path)
    make(tmp_path / "x/a")
    opened: list[Any] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scandir(path))
    assert [path.name for path in find([str(tmp_path)])[0]] == ["a"] and len(opened) == 3


def test_a_copy_is_no_replicate(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    write(tmp_path / "b", [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()])
    runs, skipped = gather([str(tmp_path)])
    assert [run.name for run in runs] == ["a"] and "a copy" in skipped[0].why


def test_text_is_one_line_that_can_be_printed(tmp_path: Path) -> None:
    config = settings() | {"precision": "fp\x1b[31m32\n" + "x" * 500, "seed": 1e400, "batch_tokens": 10**5000}
    run = one(write(tmp_path / "a\x1b[2J", records(settings())))
    assert "\x1b" not in run.name + run.path
    run.settings = dict(reading._flat(config | {"batch_tokens": 10.0}))
    assert "\x1b" not in run.settings["precision"] and len(run.settings["precision"]) <= reading.MOST_TEXT
    assert run.settings["batch_tokens"] == "10" and reading.plain(1e-3) == reading.plain(0.001)


# ------------------------------------------------------------------ uneven ranks
def with_ranks(config: dict[str, Any], waited: list[Any], **more: Any) -> list[dict[str, Any]]:
    """Commit records of two ranks, rank 1 four times slower."""
    lines = records(config, **more)
    commits = [line for line in lines if line["kind"] == "commit"]
    for line, rank in zip(commits, waited, strict=True):
        line |= {"compute_s_by_rank": [1.0, 4.0], "blocked_s_by_rank": [3.0, 0.0], "waited_for": rank}
        line["micro_batches_by_rank"] = [8.0, 8.0]
    return lines


def test_who_was_waited_for(tmp_path: Path) -> None:
    lines = with_ranks(settings(), [1, 1, None, 1])
    lines.insert(-1, {"kind": "event", "what": "rank 1 delays the others", "tokens": 400, "straggler": 1})
    lines.insert(-1, {"kind": "event", "what": "rank 1 no longer delays the others", "straggler": None})
    run = read(write(tmp_path / "a", lines))
    assert isinstance(run, History) and run.stragglers == [1]
    assert (run.sums.records, run.sums.waited_for) == (4, {1: 3})
    assert (run.sums.compute_by_rank, run.sums.blocked_by_rank) == ([4.0, 16.0], [12.0, 0.0])
    plain = read(write(tmp_path / "b", records(settings())))
    assert isinstance(plain, History) and not plain.stragglers and plain.sums.records == 0


def test_a_table_of_uneven_ranks(tmp_path: Path) -> None:
    lines = with_ranks(settings(), [1, 1, None, 1])
    lines.insert(-1, {"kind": "event", "what": "rank 1 delays the others", "tokens": 400, "straggler": 1})
    write(tmp_path / "a", lines)
    write(tmp_path / "b", with_ranks(settings("acco"), [None] * 4))
    write(tmp_path / "c", records(settings("sharded")))
    odd = with_ranks(settings("delayed"), ["x", 7, -1, 1e30])
    for line in odd:
        if line["kind"] == "commit":
            line["compute_s_by_rank"], line["blocked_s_by_rank"] = [1.0, "x", 3.0], {"a": 1}
    write(tmp_path / "d", odd)
    found = measure(compare(gather([str(tmp_path)])[0], [], [], False), [])
    shown = table.uneven(found)
    assert shown is not None
    rows = {row[1]: row[2:] for row in shown.rows}
    assert rows == {"a": ["1", "25%", "0.0%", "75.0%", "1: 3 of 4", "1"], "b": ["1", "25%", "0.0%", "75.0%", "-", "-"]}
    assert "Uneven ranks" in table.markdown(found)


def test_seconds_of_a_simulated_clock_count_and_are_called_so(tmp_path: Path) -> None:
    for name, exchange in (("a", "allreduce"), ("b", "acco")):
        config = settings(exchange, world__kind="virtual", world__tokens_per_s=100.0)
        write(tmp_path / name, records(config, found={"clock": "simulated"}, step_s=1.0 if name == "a" else 0.5))
    runs, _ = gather([str(tmp_path)])
    assert all(run.simulated and not run.virtual for run in runs)
    found = measure(compare(runs, [], [], False), [])
    assert found.rank_by == "seconds" and found.lines[0].label == "acco"
    assert "simulated clock" in verdict(found) and "simulated clock" in " ".join(table.method(found))


def test_runs_are_compared_by_any_result_of_their_evaluations(tmp_path: Path) -> None:
    """Of a share of what is right, what is wrong is compared. A run without the metric has nothing to compare."""
    folder = make(tmp_path / "a", "allreduce")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line |= {"accuracy": 0.25, "perplexity": 7.0}
        if line["kind"] == "run":
            line["unit"] = "images"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in (("accuracy", 0.75), ("perplexity", 7.0)):
        found = read(folder, Metric(name))
        assert isinstance(found, History) and {p.loss for p in found.evals} == {value} and found.unit == "images"
    assert isinstance(read(folder, Metric("auc")), Skipped | History)
    assert Metric("accuracy").target(0.9) == pytest.approx(0.1) and Metric().target(None) is None
    assert Metric("accuracy").given(0.1) == "the target given, accuracy 0.9" and Metric().given(2) == "the target given"
    assert Metric("auc").words == "validation 1 - auc" and Metric("auc").short == "1 - auc"
    assert Metric().each("images") == " nats an image" and Metric("auc").each("clicks") == ""
    for metric, wrong in (("accuracy", 1.0), ("accuracy", -1.0), ("loss", 0.0), ("loss", float("inf"))):
        with pytest.raises(UserError, match="--target"):
            Metric(metric).target(wrong)
