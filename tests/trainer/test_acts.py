"""Which acts are due at which commit, what their records say, and the clock that leaves acts out."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvdllm import runs
from hvdllm.config import compose
from hvdllm.errors import RunError
from hvdllm.exchange.base import Commit, Report, Settled, State
from hvdllm.exchange.parts import DiLoCo
from hvdllm.flat import Flat
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.parts import Model
from hvdllm.task.causal_lm import CausalLM
from hvdllm.trainer import acts
from hvdllm.trainer import clock as clocks
from hvdllm.trainer.acts import Acts
from hvdllm.trainer.assemble import Assembly
from hvdllm.trainer.clock import Clock
from hvdllm.trainer.evaluate import Evaluation, evaluate
from hvdllm.trainer.ledger import Ledger
from hvdllm.world.base import Asks
from hvdllm.world.single import Landed, SingleWorld

ACTS = compose.compose(
    ["budget_tokens=1000", "eval_every=250", "sample_every=300", "save_every=400", "log_every=200", "keep=9"]
)


class Rig:
    """Acts with everything around it fake but the files. `did`: (tokens, act)."""

    def __init__(
        self, path: Path, world: Any = None, grace_s: float | None = None, identical: bool = True, **changes: Any
    ) -> None:
        self.did: list[tuple[int, str]] = []
        self.said: list[str] = []
        self.inside = False
        self.now = 0.0
        self.flat = Flat(nn.Linear(3, 2), 1, 1e9)
        self.folder = runs.Folder(path)
        config = dataclasses.replace(ACTS, **changes)
        if not identical:
            config = dataclasses.replace(config, exchange=DiLoCo())
        self.folder.create(config)
        self.show = show = SimpleNamespace(progress=lambda values: None, say=self.said.append)
        clock = SimpleNamespace(seconds=lambda: self.now, wall_s=lambda: self.now, act=nullcontext)
        self.exchange = exchange = SimpleNamespace(
            consensus=self.consensus, state=self.state, anchored=False
        )  # fmt: skip
        update = SimpleNamespace(weights=nullcontext)
        parts = Assembly(nn.Identity(), self.flat, update, None, exchange)  # type: ignore[arg-type]
        stream = SimpleNamespace(state=lambda: {"round": 1}, lanes=dict, standing=dict, saved=lambda: None)
        self.world = world or SingleWorld()
        self.ledger = Ledger(self.folder, self.world, clock, show)  # type: ignore[arg-type]
        run = SimpleNamespace(
            config=config, world=self.world, parts=parts, stream=stream, clock=clock, ledger=self.ledger,
            rate=SimpleNamespace(rewarmed=[]),
            folder=self.folder, show=show, origin=SimpleNamespace(horizon=7),
            data=SimpleNamespace(data_hash="0", task=self), model=self,
            loss=SimpleNamespace(computed=True), device=torch.device("cpu"),
        )  # fmt: skip
        self.due = Acts(run, grace_s)  # type: ignore[arg-type]

    @contextmanager
    def consensus(self) -> Any:
        self.inside = True
        yield
        self.inside = False

    def state(self) -> State:
        assert not self.inside, "a save takes the replica as it is"
        self.did.append((self.due.tokens, "save"))
        return State({"step": self.due.step}, self.flat.pieces(0, 1), {"model": self.flat.x}, {})

    def evaluate(self) -> Evaluation:
        assert self.inside
        self.did.append((self.due.tokens, "evaluate"))
        return Evaluation({"loss": 2.0, "bits_per_byte": 1.0}, 5)

    unit = "tokens"

    def state_dict(self, keep_vars: bool) -> dict[str, torch.Tensor]:
        return {}

    def named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        return []

    named_modules = named_buffers

    def tell(self, metrics: dict[str, float]) -> str:
        return f"{metrics['bits_per_byte']:.3f} bits per byte"

    def sample(self, model: Any, tokens: int) -> str:
        assert self.inside
        self.did.append((tokens, "sample"))
        return "text"

    def commits(self, first: int, last: int, **asks: bool) -> None:
        """Commits number first to last of 100 tokens, 2 seconds and k² nats over 2k tokens; asks come with the last."""
        for k in range(first, last + 1):
            self.now = 2.0 * k
            before = report(k - 1) if k > 1 else None
            self.due.act(Commit(100 * k, k, 0.1 * k, 0.0, before, Asks(**asks) if k == last else Asks()))

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in runs.records(self.folder.path) if r["kind"] == kind]


MakeRig = Callable[..., Rig]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRig]:
    """The model and the task of a run are its rig, which evaluates and samples."""
    made: list[Rig] = []
    monkeypatch.setattr(acts, "evaluate_run", lambda config, model, *more: model.evaluate())

    def make(path: Path = tmp_path, *more: Any, **changes: Any) -> Rig:
        made.append(Rig(path, *more, **changes))
        return made[-1]

    yield make
    for one in made:
        one.folder.close()


def report(k: int) -> Report:
    return Report(float(k * k), 2.0 * k, 0.5, 8.0 * k, [1.0, 3.0], [0.0, 1.0], [0.5, 1.5], [2.0, 4.0], [2.0, 3.0])


def test_milestones_and_the_mark_that_meets_the_budget(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path)
    it.commits(1, 9)
    assert not it.due.finished
    it.commits(10, 10)
    assert it.due.finished
    assert it.did == [
        *[(300, "evaluate"), (300, "sample"), (400, "save"), (500, "evaluate"), (600, "sample"), (800, "evaluate")],
        *[(800, "save"), (900, "sample"), (1000, "evaluate"), (1000, "sample"), (1000, "save")],
    ]
    it.due.finish(Settled(report(10)))
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "4", "8"]
    assert (tmp_path / "samples.txt").read_text().count("---") == 4


def test_every_record_has_the_sums_over_all_lives(tmp_path: Path, rig: MakeRig) -> None:
    """A rank and commit sends 1,000 bytes and stands still for half a second, the mean of 0 and 1."""
    it = rig(tmp_path, grace_s=None, audit_every=100)
    for k in range(1, 5):
        it.world.bytes_sent = 1000.0 * k
        it.commits(k, k)
    again = rig(tmp_path / "again")
    again.due.load(it.due.state())
    again.ledger.bytes_before = 4000.0
    again.world.bytes_sent = 1000.0
    again.commits(5, 5)
    records = [r for one in (it, again) for r in runs.records(one.folder.path)]
    assert {r["kind"] for r in records} == {"commit", "eval", "sample", "save"}
    for r in records:
        k = r["tokens"] // 100
        booked = k if r["kind"] == "commit" else k - 1  # a commit is booked when the next one is made
        assert (r["seconds"], r["bytes_total"], r["blocked_s_total"]) == (2.0 * k, 1000.0 * k, 0.5 * booked), r


def test_staleness_is_the_mean_over_updates(tmp_path: Path, rig: MakeRig) -> None:
    """One mark of 9 updates that were 1 late, one of a single update that was 11 late."""
    it = rig(tmp_path)
    it.due.act(Commit(100, 1, 0.1, 1.0, None, Asks(), updates=9))
    it.due.act(Commit(200, 2, 0.1, 11.0, report(1), Asks(), updates=1, staleness_max=20.0))
    it.due.act(Commit(300, 3, 0.1, 0.0, report(2), Asks()))
    (said,) = it.records("commit")
    assert (said["staleness_mean"], said["staleness_max"], said["updates"]) == (2.0, 20.0, 10)


def test_the_screen_shows_the_loss_of_the_newest_record(tmp_path: Path, rig: MakeRig) -> None:
    shown: list[dict[str, Any]] = []
    it = rig(tmp_path)
    it.show.progress = lambda values: shown.append({**values, "records": it.records("commit")})
    it.commits(1, 7)
    assert np.isnan(shown[0]["loss"]) and shown[1]["loss"] == 0.5, "before there is one, of what it will hold"
    for values in shown[2:]:
        assert values["loss"] == values["records"][-1]["loss"]
    again = rig(tmp_path / "again")
    again.due.load(it.due.state())
    again.show.progress = shown.append
    again.commits(8, 8)
    assert shown[-1]["loss"] == it.records("commit")[-1]["loss"]


def test_a_stop_only_saves(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path)
    it.commits(1, 5, stop=True, save=True)  # 500 would evaluate
    assert it.did[-2:] == [(400, "save"), (500, "save")] and not it.due.finished
    it.due.finish(Settled(report(5)))
    assert not (tmp_path / "final").exists()
    assert [r["tokens"] for r in it.records("commit")] == [200, 400, 500], "the last record is written at a stop"


def test_a_stop_at_the_budget_is_no_stop(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path)
    it.commits(1, 10, stop=True)
    assert it.due.finished and (1000, "evaluate") in it.did


def test_an_ask_for_a_checkpoint_alone(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path)
    it.commits(1, 2, save=True)
    assert it.did == [(200, "save")]


def test_0_is_never_not_even_at_the_end(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path, eval_every=0, sample_every=0, save_every=0, log_every=0)
    it.commits(1, 10)
    it.due.finish(Settled(report(10)))
    assert it.did == [] and not it.records("commit") and not (tmp_path / "final").exists()


def test_a_record_is_complete_one_commit_later_and_weighted_by_tokens(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path)
    it.commits(1, 4)
    assert len(it.records("commit")) == 1, "400 waits for its loss"
    it.due.finish(Settled(report(4)))
    first, second = it.records("commit")
    assert first["loss"] == (1 + 4) / (2 + 4) and second["loss"] == (9 + 16) / (6 + 8)
    assert [r["lr"] for r in (first, second)] == [0.2, 0.4] and first["step"] == 2
    assert second["tokens_per_s"] == 200 / 4 and second["seconds"] == 8.0
    assert (second["compute_s"], second["blocked_s"], second["blocked_s_max"]) == (4.0, 1.0, 2.0)
    assert (second["flight_s"], second["micro_batches"], second["micro_batches_by_rank"]) == (2.0, 10.0, [4.0, 6.0])
    assert (second["hidden"], second["skew_s"], second["cpu_s_per_token"]) == (0.5, 4.0, 12.0 / 14)
    assert (second["updates"], second["tokens_per_update"]) == (2, 100.0)
    assert first["noise_scale"] == 16.0
    assert (second["compute_s_by_rank"], second["blocked_s_by_rank"]) == ([2.0, 6.0], [0.0, 2.0])
    assert (second["micro_batches_per_s_by_rank"], second["waited_for"]) == ([2.0, 1.0], None)
    assert it.ledger.recorded_loss == second["loss"] and it.ledger.last_loss == 16 / 8


def test_what_a_checkpoint_carries_makes_the_same_records(tmp_path: Path, rig: MakeRig) -> None:
    whole, begun, again = (rig(tmp_path / name) for name in "abc")
    whole.commits(1, 6)
    whole.due.finish(Settled(report(6)))
    begun.commits(1, 4)
    state = begun.due.state()
    state["window"]["of an older version"] = [1.0]
    again.due.load(state)
    again.commits(5, 6)
    again.due.finish(Settled(report(6)))
    assert begun.records("commit") + again.records("commit") == whole.records("commit")
    assert again.due.tokens_here == 200 and again.due.last_eval == begun.due.last_eval
    assert begun.due.last_eval == Evaluation({"loss": 2.0, "bits_per_byte": 1.0}, 5)


def test_a_straggler_is_named_once_also_over_a_resume(tmp_path: Path, rig: MakeRig) -> None:
    def slow(k: int) -> Report:
        return Report(1.0, 1.0, 0.5, None, [1.0, 3.0], [2.0, 0.0], [2.0, 2.0], [1.0, 1.0], [1.0, 1.0])

    it, again, other = (rig(tmp_path / name, log_every=100) for name in "abc")
    for k in range(1, 9):
        it.due.act(Commit(100 * k, k, 0.1, 0.0, slow(k) if k > 1 else None, Asks()))
    (event,) = it.records("event")
    assert event["straggler"] == 1 and event["tokens"] == 600 and event["what"].startswith("rank 1 delays the others")
    assert it.said.count(event["what"]) == 1 and [r["waited_for"] for r in it.records("commit")] == [1] * 7
    for one, ranks in ((again, 1), (other, 3)):
        one.due.load({**it.due.state(), "ranks": ranks})
        one.due.act(Commit(900, 9, 0.1, 0.0, slow(9), Asks()))
    assert again.ledger.straggler.named == 1 and not again.records("event"), "it was said in the life before"
    assert other.ledger.straggler.named is None, "of other ranks"


class Differs(SingleWorld):
    size = 2

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Landed:
        return Landed(torch.cat([x, x + 1]))


def test_replicas_that_differ_end_the_run_before_anything_is_kept(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path, Differs(), audit_every=400)
    with pytest.raises(RunError, match="step 4: the replicas differ in `weight` and 1 more"):
        it.commits(1, 4)
    (said,) = it.records("audit")
    assert said["tokens"] == 400 and said["replicas_agree"] is False
    assert (400, "save") not in it.did


def test_where_replicas_may_differ_it_is_logged_how_far(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path, Differs(), identical=False, audit_every=300)
    it.commits(1, 5)
    (record,) = it.records("audit")
    assert record["tokens"] == 300 and record["spread"] > 0


@pytest.mark.parametrize(("grace_s", "warns"), [(None, 0), (3.0, 1), (100.0, 0)])
def test_steps_too_long_for_the_launcher_are_announced_once(
    tmp_path: Path, rig: MakeRig, grace_s: float | None, warns: int
) -> None:
    it = rig(tmp_path, grace_s=grace_s, eval_every=0)
    it.commits(1, 7)
    assert len([text for text in it.said if "a step takes 2.0 s" in text]) == warns


# ------------------------------------------------------------------ the clock
def test_the_clock_stops_in_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(clocks, "now", lambda: now.value)
    names: list[str] = []

    class Slow(SingleWorld):
        """Another rank is two seconds late everywhere: to come to an act is training, to leave it is not."""

        def sum(self, x: torch.Tensor, name: str) -> Landed:
            now.value += 2
            names.append(name)
            return Landed(x)

    clock = Clock(Slow(), seconds=100.0)
    now.value = 50.0
    clock.start()
    now.value += 5
    assert (clock.seconds(), clock.seconds_here(), clock.wall_s()) == (105, 5, 5)
    with clock.act():
        now.value += 10
    assert names == ["act.begin", "act.end"]
    assert (clock.seconds(), clock.seconds_here(), clock.wall_s()) == (107, 7, 19)
    now.value += 1
    assert clock.seconds() == 108


# ------------------------------------------------------------------ evaluation
def test_an_evaluation_against_numpy() -> None:
    model = GPT(Model(layers=1, width=8, heads=2, context=6, dropout=0.5), 64).double()
    init_weights(model, 1)
    draw = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randint(60, (b, 6), generator=draw) for _ in range(2)) for b in (3, 1)]
    table = np.arange(1, 65, dtype=np.int64)
    words: Any = SimpleNamespace(token_bytes=table)
    task = CausalLM(ACTS, 60, words, scale=1.5)
    found = evaluate(task, model, batches, "fp64", torch.device("cpu"), SingleWorld())
    assert model.training, "as found"
    model.eval()
    nats, bytes_ = 0.0, 0
    for inputs, targets in batches:
        logits = model(inputs).detach().numpy()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= np.take_along_axis(log_p, targets.numpy()[..., None], -1).sum()
        bytes_ += table[targets.numpy()].sum()
    assert found.tokens == 24 and found.loss == pytest.approx(nats / 24, rel=1e-12)
    assert found.metrics["bits_per_byte"] == pytest.approx(nats / np.log(2) / bytes_ / 1.5, rel=1e-12)
    evaluate(task, model, batches, "fp64", torch.device("cpu"), SingleWorld())
    assert not model.training


def test_a_rank_without_windows_takes_part_in_an_evaluation() -> None:
    class Other(SingleWorld):
        def sum(self, x: torch.Tensor, name: str) -> Landed:
            assert x.tolist() == [0.0, 0.0, 0.0]
            return Landed(x + torch.tensor([6.0, 3.0, 4.0], dtype=torch.float64))

    found = evaluate(CausalLM(ACTS, 3), nn.Linear(1, 1), [], "fp32", torch.device("cpu"), Other())
    assert found == Evaluation({"loss": 2.0, "bits_per_byte": 6 / np.log(2) / 4}, 3)


def test_where_an_anchor_is_kept_the_last_evaluation_comes_after_settling(tmp_path: Path, rig: MakeRig) -> None:
    it = rig(tmp_path)
    it.exchange.anchored = True
    it.commits(1, 10)
    assert it.due.finished and (1000, "evaluate") not in it.did and (1000, "sample") not in it.did
    assert it.did[-1] == (1000, "save")
    it.due.finish(Settled(report(10), 50))
    assert it.did[-2:] == [(1000, "evaluate"), (1000, "sample")]
    assert it.records("eval")[-1]["tokens"] == 1050, "with what settling committed"
