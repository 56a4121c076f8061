"""`hvdllm report` from folders with a known answer to the numbers, the words and the files."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_kit import make, records, settings, write

from hvdllm.cli.main import main
from hvdllm.errors import UserError
from hvdllm.report import draw
from hvdllm.report.compare import compare
from hvdllm.report.figures import Figures, measure
from hvdllm.report.read import CurvePoint, History, gather
from hvdllm.report.table import equal_except, markdown, result, work
from hvdllm.report.verdict import verdict

pytest.importorskip("scipy", reason="the extra `report` is not installed")
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

STEPS = {"allreduce": (1.0, 1.02, 0.98), "acco": (0.5, 0.52, 0.49), "delayed": (1.01, 0.99, 0.97)}


def race(root: Path, steps: dict[str, tuple[float, ...]] = STEPS, **more: Any) -> Path:
    for exchange, times in steps.items():
        for seed, step_s in enumerate(times):
            make(root / f"{exchange}-{seed}", exchange, seed, step_s=step_s, **more)
    return root


def figures(root: Path, target: float | None = None, name: str | None = None, anyway: bool = False) -> Figures:
    runs, skipped = gather([str(root)])
    return measure(compare(runs, [], [], anyway), skipped, target, name)


def test_a_race(tmp_path: Path) -> None:
    """5.25 lies three quarters of the way between the evaluations at 200 and 300 tokens."""
    f = figures(race(tmp_path), 5.25)
    assert [line.label for line in f.lines] == ["acco", "delayed", "allreduce"] and f.rank_by == "seconds"
    acco, delayed, allreduce = f.lines
    assert acco.seconds.by_seed == pytest.approx({"0": 13.75, "1": 14.3, "2": 13.475})  # 27.5 steps
    for line in f.lines:
        assert line.tokens.spread and line.tokens.spread.mean == pytest.approx(275)
        assert line.bytes.spread and line.bytes.spread.mean == pytest.approx(2750)
        assert line.updates.spread and line.updates.spread.mean == pytest.approx(27.5)
    assert acco.ratio and delayed.ratio and allreduce.ratio is None and f.reference is allreduce
    logs = [math.log(a / b) for a, b in zip(STEPS["allreduce"], STEPS["acco"], strict=True)]
    assert acco.ratio.value == pytest.approx(math.exp(sum(logs) / 3)) and acco.ratio.significant
    assert not delayed.ratio.significant
    assert acco.tokens_per_update == 10 and acco.computed == pytest.approx(1.01)
    assert acco.cpu_s_per_token == pytest.approx(2e-4) and acco.hidden_share == pytest.approx(0.4)
    assert acco.stale_mean == 1 and acco.stale_most == 2 and acco.by_rank == [0.5, 1.5]
    assert allreduce.split and allreduce.split.parts == pytest.approx([4e4, 2e4, 3e4, 1e4], rel=0.001)
    assert acco.skew == pytest.approx(1 / 6)


def test_the_loss_at_equal_tokens_is_paired_by_seed(tmp_path: Path) -> None:
    """Student's t of two degrees of freedom is 4.303 at 95 %."""
    for seed, (a, b) in enumerate(((4.0, 4.1), (3.0, 3.2), (5.0, 5.3))):
        make(tmp_path / f"a{seed}", "allreduce", seed, (8.0, 7.0, 6.0, a))
        make(tmp_path / f"b{seed}", "acco", seed, (8.0, 7.0, 6.0, b))
    f = figures(tmp_path)
    assert f.lines[0].label == "allreduce" and f.lines[0].final_difference is None
    found = f.lines[1].final_difference
    assert found and found.value == pytest.approx(0.2) and not found.significant
    assert f.tests == 3 and found.alpha == pytest.approx(0.05 / 3), "beside the way to the target and equal wall-clock"
    t = 7.6488  # two-sided 1 - .05/3, 2 degrees of freedom: p = 1 - t / sqrt(t**2 + 2)
    assert found.high == pytest.approx(0.2 + t * 0.1 / math.sqrt(3), abs=1e-4)
    table = result(f)
    assert [row[table.head.index("less reference")] for row in table.rows] == [
        "reference",
        "+0.2000 (-0.2416 to +0.6416), n.s.",
    ]


def test_loss_at_equal_wall_clock_counts_evaluations(tmp_path: Path) -> None:
    """Both train as fast; b's evaluations take 10 s more each: at 42 s of wall-clock it has come less far."""
    make(tmp_path / "a", "allreduce", act_s=0.5)
    make(tmp_path / "b", "acco", act_s=10.5)
    f = figures(tmp_path)
    assert f.equal_wall == pytest.approx(42)  # 40 s and four evaluations of 0.5 s
    a, b = f.lines
    assert a.wall and a.wall.mean == 4.0 and b.wall and b.wall.mean == pytest.approx(6.0 - 1.0 / 20.5)
    assert b.wall_difference and b.wall_difference.value == pytest.approx(2.0 - 1.0 / 20.5)


def test_the_verdict_says_what_the_numbers_say(tmp_path: Path) -> None:
    text = verdict(figures(race(tmp_path), 5.25))
    assert text.startswith("acco came to validation loss 5.2500 (the target given) first, in the mean after 13.8 s (")
    assert re.search(r"1\.97 times as fast as the next, delayed \(1\.\d\d to 2\.\d\d\)", text)
    assert re.search(r"acco 1\.99 times as fast as allreduce \(1\.\d\d to 2\.\d\d\)", text)
    assert re.search(r"delayed no significant difference from allreduce \(1\.01 times, 0\.9\d to 1\.1\d\)", text)
    assert "Paired t tests, 3 seeds; 7 tests in this report, corrected by Holm's procedure" in text
    assert re.search(r"a difference below 1\.1\d times could not have been seen", text)
    assert "All sent as many bytes" in text and "After equal wall-clock, evaluation included" in text


def test_a_tie(tmp_path: Path) -> None:
    f = figures(race(tmp_path, {"allreduce": (1.0, 1.1, 0.9), "acco": (1.0, 1.1, 0.9)}))
    text = verdict(f)
    assert text.startswith("No winner: to validation loss 4.0000 (the best loss that every evaluated run reached")
    assert "acco and allreduce took equally much, 40.0 s (30.1 s to 49.9 s, 3 seeds) in the mean" in text
    assert "acco no significant difference from allreduce (1.00 times, 1.00 to 1.00)" in text
    assert "All sent as many bytes to get there." in text


@pytest.mark.parametrize(("seeds", "words"), [(1, "one seed"), (2, "2 seeds")])
def test_fewer_than_three_seeds_claim_nothing(tmp_path: Path, seeds: int, words: str) -> None:
    f = figures(race(tmp_path, {"allreduce": (1.0, 1.02)[:seeds], "acco": (0.5, 0.51)[:seeds]}))
    text = verdict(f)
    assert text.startswith("No winner: ") and "with fewer than 3 common seeds nothing is claimed" in text
    assert "acco 2.00 times as fast as allreduce; fewer than 3 seeds each, so nothing can be said of noise" in text
    assert "t test" not in text and " to 4" not in text and f.tests == 0
    assert result(f).rows[0][3] == f"2.00, {words}" and "±" not in "".join(result(f).rows[0])


def test_the_default_target_is_the_best_that_all_reached(tmp_path: Path) -> None:
    make(tmp_path / "a", "allreduce", losses=(8.0, 6.0, 4.0, 3.0))
    make(tmp_path / "b", "acco", losses=(8.0, 7.0, 5.0, 5.5))
    f = figures(tmp_path)
    assert f.target == 5.0 and "set by b" in f.target_from and all(line.all_reached for line in f.lines)
    assert f.lines[0].label == "allreduce" and f.lines[0].tokens.by_seed == pytest.approx({"0": 250})


def test_not_reached_is_never_averaged_away(tmp_path: Path) -> None:
    race(tmp_path, {"allreduce": (1.0, 1.0), "acco": (0.1,)})
    make(tmp_path / "acco-1", "acco", 1, (8.0, 6.0, 5.5, 5.3), step_s=0.1)
    make(tmp_path / "sharded-0", "sharded", 0, (8.0, 7.0), step_s=0.1)
    make(tmp_path / "sharded-1", "sharded", 1, (8.0, 7.0), step_s=0.1)
    f = figures(tmp_path, 5.25)
    assert [line.label for line in f.lines] == ["allreduce", "acco", "sharded"]
    acco = f.lines[1]
    assert acco.reached == 1 and acco.seconds.spread is None and acco.ratio is None
    assert list(acco.seconds.by_seed) == ["0"]
    cells = {row[0]: row[2] for row in result(f).rows}
    assert cells["acco"] == "reached by 1 of 2" and cells["sharded"] == "not reached"
    assert "Not reached by all runs of acco (1 of 2 runs did), sharded (0 of 2 runs did)" in verdict(f)
    assert "No winner: no run came to validation loss 1.0000" in verdict(figures(tmp_path, 1.0))


def test_a_diverged_seed_is_not_dropped(tmp_path: Path) -> None:
    race(tmp_path, {"allreduce": (1.0, 1.0), "acco": (1.0,)})
    make(tmp_path / "acco-1", "acco", 1, (8.0, math.nan, math.nan, math.nan))
    f = figures(tmp_path, 5.25)
    acco = next(line for line in f.lines if line.label == "acco")
    assert acco.final and acco.final.mean == math.inf and acco.wall_difference is None
    assert acco.reached == 1 and "not finite" in markdown(f)


def test_an_upper_bound_is_marked_and_not_ranked(tmp_path: Path) -> None:
    steps = {"allreduce": (1.0, 1.01, 1.02), "acco": (0.5, 0.51, 0.52)}
    f = figures(race(tmp_path / "all", steps), 9.0)
    assert all(line.bound for line in f.lines) and f.winner is None and not any(line.ratio for line in f.lines)
    assert {row[2] for row in result(f).rows} == {"≤ 10.10", "≤ 5.100"}
    assert "No winner: no group came to validation loss 9.0000 (the target given) with all of its runs" in verdict(f)
    assert any("an upper bound, which is not ranked" in note for note in f.notes)
    race(tmp_path / "one", {"allreduce": (1.0, 1.01, 1.02)})
    race(tmp_path / "one", {"acco": (0.1, 0.1, 0.1)}, losses=(5.0, 4.9, 4.8, 4.0))
    f = figures(tmp_path / "one", 5.5)
    assert [line.label for line in f.lines] == ["allreduce", "acco"] and f.lines[1].bound and f.lines[1].ratio is None
    assert "No winner: to validation loss 5.5000 (the target given), only allreduce can be ranked" in verdict(f)


def test_a_target_inside_a_warm_up_gives_way_to_a_later_one(tmp_path: Path) -> None:
    """Until 250 tokens `delayed` trains as allreduce does: 5.5, which all reached, lies before it."""
    race(tmp_path, {"allreduce": (1.0, 1.01, 1.02)}, losses=(8.0, 6.0, 5.6, 5.5))
    race(tmp_path, {"delayed": (0.5, 0.51, 0.52)}, losses=(8.0, 5.4, 5.2, 5.0), exchange__warmup_tokens=250)
    f = figures(tmp_path)
    assert f.target == 5.0 and "that lies behind every warm-up" in f.target_from
    assert any(
        "the best loss that all runs reached, 5.5000, lies before the first evaluation" in note for note in f.notes
    )
    text = verdict(f)
    assert "only delayed can be ranked" in text and "Not reached by all runs of allreduce (0 of 3 runs did)" in text
    given = figures(tmp_path, 5.5)
    late = next(line for line in given.lines if line.label == "delayed")
    assert late.warming and late.ratio is None and any("before the warm-up" in note for note in given.notes)
    assert any(cell.startswith("in warm-up: ") for cell in result(given).rows[1])


def test_a_warm_up_that_is_left_open_is_20_batches(tmp_path: Path) -> None:
    """Of 10 tokens, in these records."""
    assert History("", "", settings={"exchange.warmup_tokens": "null", "batch_tokens": "10"}).warmup_tokens == 200
    assert History("", "", settings={"exchange.warmup_tokens": "90", "batch_tokens": "10"}).warmup_tokens == 90
    assert History("", "", settings={"batch_tokens": "10"}).warmup_tokens == 0


def test_how_long_equal_tokens_took(tmp_path: Path) -> None:
    """What is read off for those that trained further lies on the line between their evaluations."""
    race(tmp_path / "a", {"allreduce": (1.0, 2.0, 3.0)}, losses=(8.0, 6.0, 5.0))
    race(tmp_path / "b", {"acco": (0.5, 0.5, 0.5)}, losses=(8.0, 5.0), every=200)
    f = figures(tmp_path, 5.5)
    assert f.equal_tokens == 300
    took = {line.label: line.equal_seconds for line in f.lines}
    assert took["allreduce"] and took["allreduce"].mean == pytest.approx(60) and took["allreduce"].low is not None
    assert took["acco"] and took["acco"].mean == pytest.approx(7.5)
    table = result(f)
    assert table.rows[0][table.head.index("s to 300 tokens")] == "7.500 ± 0"


def test_a_target_that_the_runs_name(tmp_path: Path) -> None:
    f = figures(race(tmp_path, target_loss=5.25))
    assert f.target == 5.25 and f.target_from == "the target that the runs name"
    assert figures(tmp_path, 6.0).target == 6.0
    make(tmp_path / "other", "acco", 3, target_loss=5.0)
    f = figures(tmp_path)
    assert f.target == 4.0 and any("name different targets" in note for note in f.notes)
    assert f.comparison.fair, "it changes nothing of a run"


# ------------------------------------------------------------------ how often a report is wrong
def simulated(
    rng: Any, exchanges: int, seeds: int, gain: float = 1.0, seed_noise: float = 0.1, noise: float = 0.05
) -> Figures:
    """A report of runs whose times differ by seed and by noise (standard deviations of logarithms), and whose losses
    have noise too; the last exchange is `gain` times as fast as the others, which are equal."""
    names = ["allreduce", *(f"e{k}" for k in range(1, exchanges))]
    runs = []
    common = rng.normal(0.0, seed_noise, seeds)
    for name in names:
        for seed in range(seeds):
            pace = math.exp(common[seed] + rng.normal(0.0, noise)) / (gain if name == names[-1] else 1.0)
            run = History(f"{name}-{seed}", f"{name}-{seed}", {"exchange.name": name, "seed": str(seed)})
            for k, loss in enumerate((8.0, 6.0, 5.0, 4.0), 1):
                at = loss + 0.2 * common[seed] + rng.normal(0.0, 0.02)
                run.evals.append(CurvePoint(100.0 * k, at, 10 * pace * k, 10.5 * pace * k, 1000.0 * k, 10.0 * k))
            runs.append(run)
    return measure(compare(runs, [], [], False), [], 5.5)


def claims(f: Figures) -> list[str]:
    tests = [
        (line.label, test) for line in f.lines for test in (line.ratio, line.final_difference, line.wall_difference)
    ]
    found = [label for label, test in tests if test is not None and test.significant]
    return found + ([f.winner.first.label] if f.winner and f.winner.significant else [])


@pytest.mark.parametrize("seeds", [3, pytest.param(6, marks=pytest.mark.thorough)])
def test_of_reports_on_equal_exchanges_at_most_5_per_cent_claim_anything(seeds: int) -> None:
    """Twelve of them. Without a correction every fourth report claims a difference."""
    rng = np.random.default_rng(0)
    reports = [simulated(rng, 12, seeds) for _ in range(200)]
    wrong = sum(bool(claims(f)) for f in reports)
    assert wrong / len(reports) <= 0.05
    assert all(verdict(f).startswith("No winner: ") for f in reports if not claims(f))
    alone = sum(any(line.ratio and line.ratio.p < 0.05 for line in f.lines) for f in reports)
    assert alone / len(reports) > 0.2, "the simulation is one in which a report can go wrong"


def test_a_true_gain_is_found_although_seeds_differ_by_more(tmp_path: Path) -> None:
    """1.2 times as fast, seeds a factor of 1.5 apart, ratios within 4 %: with six seeds nearly always, and never
    another one."""
    rng = np.random.default_rng(1)
    reports = [simulated(rng, 4, 6, gain=1.2, seed_noise=0.4, noise=0.03) for _ in range(60)]
    found = [claims(f) for f in reports]
    assert sum("e3" in one for one in found) >= 0.9 * len(found)
    assert sum(any(name != "e3" for name in one) for one in found) <= 0.05 * len(found)
    assert sum(bool(f.winner and f.winner.significant) for f in reports) > 0.5 * len(reports)


def test_unfinished_and_uneven_runs(tmp_path: Path) -> None:
    race(tmp_path, {"allreduce": (1.0, 1.0)})
    make(tmp_path / "acco-0", "acco", 0, (8.0, 6.0, 5.0), reason=None)
    write(tmp_path / "acco-1", [r for r in records(settings("acco", 1), reason=None) if r["kind"] != "eval"])
    f = figures(tmp_path)
    assert f.target == 5.0 and "set by acco-0" in f.target_from and f.equal_tokens == 300
    assert any("set by acco-0, which is unfinished" in note for note in f.notes)
    assert any("never evaluated" in note and "acco-1" in note for note in f.notes)
    assert any("where acco-0 was last evaluated" in note for note in f.notes)
    acco = next(line for line in f.lines if line.label == "acco")
    assert acco.reached == 1 and acco.final is None and acco.computed is None
    tokens = next(row for row in equal_except(f).rows if row[0] == "tokens committed")
    assert "300: acco-0" in tokens[2]
    none = figures(make(tmp_path / "sub/x", losses=(math.nan,)))
    assert none.target is None and "nothing can be ranked" in verdict(none)


def test_virtual_runs_are_ranked_by_tokens(tmp_path: Path) -> None:
    make(tmp_path / "a", "allreduce", step_s=0.1, losses=(8.0, 7.0, 6.0, 5.0), world__kind="virtual")
    make(tmp_path / "b", "acco", step_s=9.0, losses=(8.0, 6.0, 5.0, 4.0), world__kind="virtual")
    f = figures(tmp_path)
    assert f.rank_by == "tokens" and [line.label for line in f.lines] == ["acco", "allreduce"]
    assert f.lines[0].seconds.spread is None and f.lines[0].split is None and f.equal_wall is None
    assert f.lines[0].ratio and f.lines[0].ratio.value == pytest.approx(400 / 300)
    text = verdict(f)
    assert "world=virtual" in text and "as frugal with tokens as allreduce" in text and "wall-clock" not in text
    assert "s to target" not in result(f).head and not any("wall" in head for head in result(f).head)
    assert {"time"}.isdisjoint(draw.pictures(f, "svg")) and "10" in work(f).rows[0]


def test_repetitions_of_a_seed_count_once(tmp_path: Path) -> None:
    race(tmp_path, {"allreduce": (1.0, 2.0)})
    make(tmp_path / "again", "allreduce", 0, step_s=3.0)
    line = figures(tmp_path, 5.0).lines[0]
    assert line.seconds.by_seed == pytest.approx({"0": 60, "1": 60}) and line.seconds.spread
    assert line.seconds.spread.n == 2


# ------------------------------------------------------------------ the command
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = race(tmp_path / "race")
    (root / "broken").mkdir()
    (root / "broken/metrics.jsonl").touch()
    out = tmp_path / "r.html"
    assert main(["report", str(root), "--out", str(out), "--target-loss", "5.25"]) == 0
    said = capsys.readouterr().out
    assert "equal except: exchange.name (compared); seed (replicates)." in said
    assert said.index("acco came to validation loss") < said.index("best first") < said.index("skipped")
    assert "broken: metrics.jsonl: is empty" in said and f"written to {out}" in said
    page = out.read_text()
    assert page.index('class="verdict"') < page.index("<table>") < page.index("<img")
    assert page.count("data:image/svg+xml;base64,") == 4 and "is empty" in page
    for svg in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        assert b"</svg>" in base64.b64decode(svg)


def test_markdown_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = race(tmp_path / "race")
    assert main(["report", str(root), "--out", str(tmp_path / "r.md")]) == 0
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# Report\n\nacco came to") and "| ---: |" in text and "## Equal except" in text
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert main(["report", str(root), "--out", str(tmp_path / f"r.{kind}")]) == 0
        names = [f"r-{name}.{kind}" for name in ("loss", "target", "time", "ranks")]
        assert all((tmp_path / name).read_bytes().startswith(magic) for name in names)
    capsys.readouterr()


def test_the_folder_of_the_report_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reports/today/r.md"
    assert main(["report", str(race(tmp_path / "race")), "--out", str(out)]) == 0 and out.is_file()
    capsys.readouterr()


def test_runs_without_evaluation_show_what_they_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [r for r in records(settings(), step_s=2.0) if r["kind"] != "eval"])
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.md")]) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("allreduce"))
    assert row.split() == ["allreduce", "a", "400", "4.0000", "5", "4", "kB", "40"] and "nothing can be ranked" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "r.pdf"], "a file that ends in .html, .md, .png, .svg"),
        (["--out", "runs/a/metrics.jsonl/r.html"], "the folder runs/a/metrics.jsonl cannot be made"),
        (["--target-loss", "nan"], "a loss to reach is a number"),
        (["--target-loss", "-1"], "a loss to reach is a number"),
        (["--reference", "ddp"], "no such group"),
        (["--tuned-by", "optim.lr"], "unequal tuning: trials of optim.lr are allreduce 2, acco 1"),
        (["nothing-there"], "no such folder"),
    ],
)
def test_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, exchange, lr in (("a", "allreduce", 0.1), ("b", "allreduce", 0.2), ("c", "acco", 0.1)):
        make(tmp_path / "runs" / name, exchange, optim__lr=lr)
    runs = ["runs/[ac]"] if "--reference" in words else ["runs"]
    assert main(["report", *runs, *words]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_ranked_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs/a", "allreduce")
    make(tmp_path / "runs/b", "acco", optim__lr=0.1)
    assert main(["report", "runs"]) == 2
    assert "no ranking: beside exchange the runs differ in optim.lr (0.003 | 0.1)" in capsys.readouterr().err
    assert main(["report", "runs", "--anyway"]) == 0
    assert capsys.readouterr().out.startswith("Not a fair comparison: the runs also differ in optim.lr.")
    assert "NOT EQUAL" in (tmp_path / "report.html").read_text()
    assert main(["report", "runs", "--tuned-by", "optim.lr"]) == 0
    assert "one trial each" in " ".join(capsys.readouterr().out.split())


def test_nothing_to_report_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    assert main(["report", str(tmp_path / "x")]) == 2
    assert "there is no run to report on: " in capsys.readouterr().err


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += attrs


EVIL = "<script>alert(1)</script><img src=http://x onerror=y>\"'&|`[a](b)$\\frac{\x1b[31m日本"


def test_everything_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = {"exchange__evil": EVIL, "optim__name": EVIL, "found": {"versions": {EVIL: EVIL}, "data_hash": EVIL}}
    make(tmp_path / "runs" / "<script>b(1)<" / "a", EVIL, **evil)
    make(tmp_path / "runs" / "$x^{$ [red]" / "b", "acco", **evil)
    (tmp_path / "runs" / "<b>c").mkdir()
    (tmp_path / "runs" / "<b>c/metrics.jsonl").mkdir()
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "<script>" in said, "a terminal shows it as it is"
    page = out.read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.seen <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "thead", "tbody", "tr"),
        *("th", "td", "ul", "li", "figure", "img", "figcaption", "code"),
    }
    assert "&lt;script&gt;alert(1)" in page and not any(name.startswith("on") for name, _ in tags.attributes)
    assert all(
        (value or "").startswith("data:image/svg+xml;base64,") for name, value in tags.attributes if name == "src"
    )
    for svg in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        assert b"<script" not in base64.b64decode(svg)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.md")]) == 0
    text = (tmp_path / "r.md").read_text()
    assert "<" not in text and "\\|\\`\\[a\\](b)" in text


def test_hostile_numbers_are_drawn(tmp_path: Path) -> None:
    make(tmp_path / "a", "allreduce", losses=(1e17, 5.0, math.inf, 4.0), step_s=1e12, sent=0.0, budget_tokens="x")
    make(tmp_path / "b", "$\\frac{$ 日本", losses=(0.0, -5.0), step_s=0.0, budget_tokens="x", every=1)
    f = figures(tmp_path)
    assert draw.pictures(f, "png") and verdict(f) and markdown(f)


def test_no_group_looks_like_another(tmp_path: Path) -> None:
    for k in range(20):
        make(tmp_path / f"{k}", f"e{k:02}")
    f = figures(tmp_path)
    grey = {(str(look["linestyle"]), look["marker"]) for look in draw.looks(f).values()}
    assert len(grey) == 20, "told apart without colours"
    assert draw.pictures(f, "svg").keys() == {"loss", "target", "time", "ranks"}


def test_the_reference_is_named(tmp_path: Path) -> None:
    f = figures(race(tmp_path), 5.25, "delayed")
    assert f.reference.label == "delayed" and "Against delayed:" in verdict(f)
    with pytest.raises(UserError):
        figures(tmp_path, 5.25, "nobody")


def test_without_the_packages_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    for package, sentence in (("scipy.special", "report needs scipy"), ("matplotlib", "pictures need matplotlib")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, package, None)
            assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.html")]) == 2
        assert sentence in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    (tmp_path / "r.md").mkdir()
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err
