"""What a report says of runs on a stream: numbers that are known by hand, words, tables and the picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_kit import records, settings, write

from hvdllm.cli.main import main
from hvdllm.report import draw
from hvdllm.report.compare import compare
from hvdllm.report.figures import Figures, measure
from hvdllm.report.learning import forgetting, new_text, recovery, regret
from hvdllm.report.read import History, gather, read
from hvdllm.report.table import markdown, streams
from hvdllm.report.verdict import verdict

pytest.importorskip("scipy", reason="the extra `report` is not installed")
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

RECENT = (5.0, 4.0, 4.0, 5.0, 4.4, 3.8, 3.8, 4.8, 4.4, 4.2)  # at 100, 200, ... tokens
CHANGES = {1: 250, 2: 700}
SLICES: tuple[dict[int, float], ...] = ({0: 4.0}, {0: 3.6, 1: 5.0}, {0: 4.0, 1: 4.5, 2: 4.0})  # at 300, 600, 900


def told(
    exchange: str = "allreduce", seed: int = 0, recent: tuple[float, ...] = RECENT, *, higher: float = 0.0,
    changes: dict[int, int] = CHANGES, slices: tuple[dict[int, float], ...] = SLICES,
) -> list[dict[str, Any]]:  # fmt: skip
    """The records of a run on a stream. higher: what is added to each loss."""
    out = []
    for record in records(settings(exchange, seed), tuple(loss + higher for loss in recent)):
        tokens = record.get("tokens")
        if record["kind"] == "commit":
            loss = record["loss"]
            record |= {"prequential": loss + 0.1, "prequential_recent": loss, "prequential_whole": loss + 0.2}
            record |= {f"{key}_bits_per_byte": record[key] / 2 for key in list(record) if key.startswith("preq")}
        if record["kind"] == "eval" and tokens in (300, 600, 900):
            record |= {f"loss/slice-{k}": loss + higher for k, loss in slices[tokens // 300 - 1].items()}
        out.append(record)
        if record["kind"] == "commit":
            for number, at in changes.items():
                if at < tokens <= at + 100:
                    out.append({"kind": "event", "tokens": tokens, "what": "x", "change": number, "change_tokens": at})
            if tokens == 400:
                out.append({"kind": "event", "tokens": tokens, "what": "the stream has changed", "drift": 1})
    return out


def history(folder: Path, lines: list[dict[str, Any]]) -> History:
    found = read(write(folder, lines))
    assert isinstance(found, History)
    return found


def figures(root: Path) -> Figures:
    runs, skipped = gather([str(root)])
    return measure(compare(runs, [], [], False), skipped, 4.5)


@pytest.fixture
def race(tmp_path: Path) -> Path:
    """delayed is 0.1 worse everywhere, give or take a hundredth; local_sgd never recovers with seed 2."""
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        write(tmp_path / f"a{seed}", told(seed=seed))
        write(tmp_path / f"b{seed}", told("delayed", seed, higher=0.1 + noise))
        bad = (*RECENT[:7], 4.8, 4.8, 4.8) if seed == 2 else RECENT
        write(tmp_path / f"c{seed}", told("local_sgd", seed, bad))
    return tmp_path


def test_recovery_is_from_the_change_to_the_line_that_comes_back(tmp_path: Path) -> None:
    """The level is 4 at 200 tokens, so 4.2: between 4.4 at 500 and 3.8 at 600 that is 533.3, 283.3 after the change.
    Before change 2 it is 3.8, so 3.99, which is not reached."""
    run = history(tmp_path / "a", told())
    assert run.streamed.changes == {1: 250, 2: 700} and run.streamed.drifts == [400]
    assert recovery(run, 1) == pytest.approx(500 + 100 / 3 - 250)
    assert recovery(run, 2) == float("inf") and recovery(run, 3) is None


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        ((4.0, 4.0, 4.1, 4.2, 4.2, 4.0), 0.0),  # at most 5 % above
        ((4.0, 4.0, 4.1, 4.8, 4.0, 4.0), 225.0),  # in the first record it is an average of before still
        ((4.0, 4.0, 5.0, 5.0, 5.0, 4.21), float("inf")),
        ((4.0, 4.0), None),
        ((float("nan"), float("nan"), 4.0, 4.0), None),
    ],
)
def test_recovery_of_other_curves(tmp_path: Path, recent: tuple[float, ...], expected: float | None) -> None:
    run = history(tmp_path / "a", told(recent=recent, changes={1: 250}))
    run.streamed.changes[1] = 250
    assert recovery(run, 1) == (None if expected is None else pytest.approx(expected))


def test_a_new_text_is_read_in_the_first_record_with_nothing_else(tmp_path: Path) -> None:
    run = history(tmp_path / "a", told())
    assert new_text(run, 1) == pytest.approx(5.1), "the record at 300 began at 200, before the change"
    assert new_text(run, 2) == pytest.approx(4.9), "the record before ends where the text begins"


def test_forgetting_and_regret_are_means_over_the_matrix(tmp_path: Path) -> None:
    run = history(tmp_path / "a", told())
    assert [tokens for tokens, _ in run.streamed.slices] == [300, 600, 900]
    assert forgetting(run) == pytest.approx((0.4 + 0.0) / 2), "slice 2 was evaluated once"
    best = {0: 3.5, 1: 4.5, 2: 3.0}
    assert regret(run, best) == pytest.approx((0.5 + 0.1 + 0.5 + 0.5 + 0.0 + 1.0) / 6)
    assert forgetting(history(tmp_path / "b", told(slices=({0: 4.0}, {}, {})))) is None


def test_differences_are_paired_and_corrected_with_the_others(race: Path) -> None:
    f = figures(race)
    delayed, local = (next(line for line in f.lines if line.label == label) for label in ("delayed", "local_sgd"))
    assert f.reference.learnt and delayed.learnt and local.learnt
    test = delayed.learnt.whole.difference
    assert test and test.value == pytest.approx(0.1) and test.significant and test.alpha <= 0.05 / 6
    assert delayed.learnt.whole.by_seed == pytest.approx({"0": 4.5, "1": 4.51, "2": 4.49})
    assert local.learnt.whole.difference and not local.learnt.whole.difference.significant
    single = [test for line in f.lines for test in (line.ratio, line.final_difference, line.wall_difference)]
    of_streams = [getattr(*each) for line in f.lines if line.learnt for each in line.learnt.tests]
    assert sum(test is not None for test in of_streams) == 6, "loss, forgetting and change 1 of two groups"
    assert f.tests == 6 + sum(test is not None for test in single)


def test_what_never_recovered_has_no_mean_and_no_test(race: Path) -> None:
    f = figures(race)
    for line in f.lines:
        assert line.learnt
        first, second = line.learnt.recoveries
        assert first.spread is not None and (first.runs, first.back) == (3, 3)
        assert second.spread is None and second.difference is None and (second.runs, second.back) == (3, 0)
    text = verdict(f)
    assert "Not all runs recovered from change 2, so they are not ranked: allreduce (0 of 3 runs did)" in text
    assert re.search(r"allreduce was back at its own level after change 1 in 283 tokens \(283 to 283, 3 seeds\)", text)


def test_the_verdict_claims_what_the_tests_find(race: Path) -> None:
    text = verdict(figures(race))
    assert re.search(
        r"The prequential loss of allreduce over 1,000 tokens of the stream is 4\.4000; delayed 0\.1000 more \(0\.0",
        text,
    )
    assert "no significant difference in loss of local_sgd" in text
    assert "Forgetting: with allreduce the held-out slices end 0.2000 above the lowest loss that they had" in text


def test_with_replay_the_loss_is_read_at_the_same_place_of_the_stream(tmp_path: Path) -> None:
    """The run with replay ends at 1,000 tokens, of which 750 are new. So the other one is read at 750 tokens."""
    write(tmp_path / "a", told())
    lines = told("delayed")
    lines[0]["config"]["text"]["replay"] = 0.25
    write(tmp_path / "b", lines)
    runs, skipped = gather([str(tmp_path)])
    f = measure(compare(runs, ["exchange", "text.replay"], [], False), skipped, 4.5)
    found = {line.label.partition(",")[0]: line.learnt for line in f.lines}
    plain, replayed = found["allreduce"], found["delayed"]
    assert plain and replayed and plain.tokens == replayed.tokens == 750
    assert plain.whole.by_seed == pytest.approx({"0": 4.5}), "between 4.0 at 700 and 5.0 at 800"
    assert replayed.whole.by_seed == pytest.approx({"0": 4.4})


def test_two_seeds_claim_nothing(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path / f"a{seed}", told(seed=seed))
        write(tmp_path / f"b{seed}", told("delayed", seed, higher=0.1))
    text = verdict(figures(tmp_path))
    assert "is 4.4000; with fewer than 3 common seeds nothing is claimed." in text and " more (" not in text


def test_the_tables(race: Path) -> None:
    whole, changed = streams(figures(race))
    assert whole.title == "On the stream" and changed.title == "After a change of the stream"
    by_label = {row[0]: row for row in whole.rows}
    assert by_label["allreduce"][1:4] == ["4.4000 ± 0.0000", "reference", "2.2000 ± 0.0000"]
    assert by_label["delayed"][2].startswith("+0.1000 (+0.0") and "n.s." not in by_label["delayed"][2]
    rows = {(row[0], row[1]): row[2:] for row in changed.rows}
    assert rows["change 1", "allreduce"] == ["283.3 ± 0", "reference", "5.1000 ± 0.0000"]
    assert rows["change 2", "local_sgd"] == ["none of 3 runs recovered", "-", "4.9000 ± 0.0000"]
    text = markdown(figures(race))
    assert "## On the stream" in text and "by prequential loss, tokens to recover" in text


def test_a_report_of_other_runs_says_nothing_of_streams(tmp_path: Path) -> None:
    write(tmp_path / "a", told())
    write(tmp_path / "b", records(settings("delayed"), RECENT))
    f = figures(tmp_path)
    assert not f.streamed and streams(f) == [] and "stream" not in draw.pictures(f, "png")
    assert "equential" not in verdict(f) + markdown(f)


def test_the_picture_marks_changes_and_drifts(race: Path) -> None:
    f = figures(race)
    text, data = draw.pictures(f, "png")["stream"]
    assert "known and was found to change" in text and data.startswith(b"\x89PNG")
    with draw._style() as pyplot:
        figure = draw.stream(f, pyplot)
        above, below = figure.axes
        assert {one.get_text() for one in above.texts} == {"change 1", "change 2"}
        marks = [list(line.get_xdata()) for line in below.lines if line.get_marker() in "os^"]
        assert [[1000 * x for x in one] if max(one) < 10 else one for one in marks] == [[400.0]] * 3
        pyplot.close(figure)


def test_the_command_prints_and_writes_it(race: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(race), "--target", "4.5", "--out", str(tmp_path / "out" / "r.html")]) == 0
    shown = capsys.readouterr().out
    assert "On the stream" in shown and "After a change of the stream" in shown and "283.3" in shown
    assert "which is each run's own" in " ".join(shown.split())
    assert "before it was learnt" in (tmp_path / "out" / "r.html").read_text()


def test_a_stranger_s_records_do_no_harm(tmp_path: Path) -> None:
    lines = told()
    lines[1:1] = [
        {"kind": "event", "tokens": 1, "change": "x", "change_tokens": [1]},
        {"kind": "event", "tokens": 1, "change": 1e300, "change_tokens": 1e300},
        {"kind": "event", "tokens": 1, "drift": True},
        {"kind": "eval", "tokens": 5, "loss": 9.0, "loss/slice-0": "low", "loss/slice-": 1.0, "loss/slice-x": 1.0},
        {"kind": "commit", "tokens": 5, "seconds": 0, "compute_s": 0, "blocked_s": 0, "flight_s": 0, "prequential": {}},
    ]
    run = history(tmp_path / "a", lines)
    assert run.streamed.changes == {1: 250, 2: 700} and run.streamed.drifts == [400]
    assert len(run.streamed.points) == 10 and [tokens for tokens, _ in run.streamed.slices] == [300, 600, 900]
