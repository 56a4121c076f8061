"""`hvdllm report` from folders with a known answer to the numbers, the words and the files."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_kit import make, records, settings, write

from hvdllm.cli.main import main
from hvdllm.errors import UserError
from hvdllm.report import draw
from hvdllm.report.compare import compare
from hvdllm.report.figures import Figures, measure
from hvdllm.report.read import gather
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
    assert found and found.value == pytest.approx(0.2) and not found.significant, "seeds differ by more"
    assert found.high == pytest.approx(0.2 + 4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    table = result(f)
    assert [row[table.head.index("less reference")] for row in table.rows] == [
        "reference",
        "+0.2000 (-0.0484 to +0.4484), n.s.",
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
    assert re.search(r"acco 1\.99 times as fast as allreduce \(1\.\d\d to 2\.\d\d\)", text)
    assert "delayed no significant difference from allreduce (1.01 times, 0.96 to 1.06)" in text
    assert "paired t test on the logarithms of ratios, 3 seeds; 2 comparisons" in text
    assert "All sent as many bytes" in text and "After equal wall-clock, evaluation included" in text


def test_a_tie(tmp_path: Path) -> None:
    f = figures(race(tmp_path, {"allreduce": (1.0, 1.1, 0.9), "acco": (1.0, 1.1, 0.9)}))
    text = verdict(f)
    assert text.startswith("acco and allreduce came to validation loss 4.0000 (") and "equally soon" in text
    assert "acco no significant difference from allreduce (1.00 times, 1.00 to 1.00)" in text
    assert "All sent as many bytes to get there." in text


def test_one_seed_says_nothing_of_noise(tmp_path: Path) -> None:
    f = figures(race(tmp_path, {"allreduce": (1.0,), "acco": (0.5,)}))
    text = verdict(f)
    assert "acco 2.00 times as fast as allreduce; one seed each, so nothing can be said of noise" in text
    assert "t test" not in text and "(1 seed)" in text
    assert result(f).rows[0][3] == "2.00, one seed"


def test_the_default_target_is_the_best_that_all_reached(tmp_path: Path) -> None:
    make(tmp_path / "a", "allreduce", losses=(8.0, 6.0, 4.0, 3.0))
    make(tmp_path / "b", "acco", losses=(8.0, 7.0, 5.0, 5.5))
    f = figures(tmp_path)
    assert f.target == 5.0 and f.target_from == "b" and all(line.all_reached for line in f.lines)
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
    assert "No run came to validation loss 1.0000" in verdict(figures(tmp_path, 1.0))


def test_a_diverged_seed_is_not_dropped(tmp_path: Path) -> None:
    race(tmp_path, {"allreduce": (1.0, 1.0), "acco": (1.0,)})
    make(tmp_path / "acco-1", "acco", 1, (8.0, math.nan, math.nan, math.nan))
    f = figures(tmp_path, 5.25)
    acco = next(line for line in f.lines if line.label == "acco")
    assert acco.final and acco.final.mean == math.inf and acco.wall_difference is None
    assert acco.reached == 1 and "not finite" in markdown(f)


def test_an_upper_bound_is_marked(tmp_path: Path) -> None:
    f = figures(race(tmp_path, {"allreduce": (1.0,), "acco": (0.5,)}), 9.0)
    assert all(line.bound for line in f.lines) and result(f).rows[0][2] == "≤ 5.000"
    assert "after at most 5 s" in verdict(f) and any("upper bound" in note for note in f.notes)


def test_unfinished_and_uneven_runs(tmp_path: Path) -> None:
    race(tmp_path, {"allreduce": (1.0, 1.0)})
    make(tmp_path / "acco-0", "acco", 0, (8.0, 6.0, 5.0), reason=None)
    write(tmp_path / "acco-1", [r for r in records(settings("acco", 1), reason=None) if r["kind"] != "eval"])
    f = figures(tmp_path)
    assert f.target == 5.0 and f.target_from == "acco-0" and f.equal_tokens == 300
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "r.pdf"], "a file that ends in .html, .md, .png, .svg"),
        (["--out", "no/where.html"], "there is no folder no"),
        (["--target-loss", "nan"], "a loss is a number"),
        (["--target-loss", "-1"], "a loss is a number"),
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
