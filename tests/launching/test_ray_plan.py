"""launch=ray without a cluster: what finds room, what is refused in a sentence, and when a run is started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_cluster

from hvdllm.cli.main import main
from hvdllm.config import compose
from hvdllm.errors import RunError, UserError
from hvdllm.interpreter import PYTHON
from hvdllm.launch import ray, ray_node, sweep
from hvdllm.launch.lives import MOST_IDLE, Lives
from hvdllm.launch.parts import Ray
from hvdllm.world.detect import started

needs_ray = pytest.mark.skipif(bool(ray_cluster.missing()), reason=ray_cluster.missing() or "-")
if not ray_cluster.missing():
    from hvdllm.launch import ray_driver
    from hvdllm.launch.ray_driver import Node


@pytest.fixture(autouse=True)
def no_cluster() -> Iterator[None]:
    """Ray's functions start a cluster where there is none: no test here may come so far."""
    yield
    assert ray_cluster.missing() or not ray_driver.ray.is_initialized()


def test_settings() -> None:
    launch = compose.compose(["launch=ray", "launch.np=8", "launch.nodes=2", "launch.gpus_per_rank=1"]).launch
    assert isinstance(launch, Ray)
    assert (launch.place().size, launch.place().local_size, launch.cores_of_rank) == (8, 4, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["launch.np=3", "launch.nodes=2"], "launch.np=3 ranks cannot be as many on each of launch.nodes=2"),
        (["launch.gpus_per_rank=2"], "launch.gpus_per_rank=2 is too large"),
        (["launch.address=ray://head:10001"], "launch.address=ray://head:10001: give auto or HOST:PORT"),
        (["launch.address=10.0.0.1"], "launch.address=10.0.0.1: give auto or HOST:PORT"),
        (["exchange=parameter_server", "exchange.bucket_mb=null"], "letters between two ranks over MPI"),
    ],
)
def test_what_cannot_be_is_refused_before_a_cluster_is_asked(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "ready", lambda settings: None)
    with pytest.raises(UserError) as raised:
        sweep.prepare(compose.compose(["launch=ray", *words]))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_without_ray_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Ray is not installed: pip install hvdllm\[ray\]"):
        ray.ready(Ray())


def test_threads_are_the_cpus_that_were_asked_for() -> None:
    config = compose.compose(["launch=ray", "launch.cpus_per_rank=4"])
    assert sweep.share_of_cores(config) == ["device.threads=4"]
    config.device.threads = 2
    assert sweep.share_of_cores(config) == []


def test_a_sweep_starts_as_many_points_as_find_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "room", lambda settings: 3)
    words = ["launch=ray", "seed=0"]
    config = compose.compose([*words, "name=a"])
    task = sweep.Task(sweep.point_of(config, words), config, ())
    swept = sweep.Sweep(words, None, print)
    assert swept.parallel([task] * 8) == 3
    config.launch.parallel = 2
    assert swept.parallel([task] * 8) == 2


# ------------------------------------------------------------------ the driver's decisions
def some(*sizes: tuple[int, int]) -> list[Node]:
    return [Node(str(k), f"n{k}", f"10.0.0.{k}", cpus, gpus) for k, (cpus, gpus) in enumerate(sizes)]


@needs_ray
@pytest.mark.parametrize(
    ("settings", "sizes", "runs"),
    [
        (Ray(np=2), [(1, 0), (1, 0)], 1),
        (Ray(np=3), [(1, 0), (1, 0)], 0),
        (Ray(np=2, cpus_per_rank=2), [(4, 0), (3, 0)], 1),
        (Ray(np=2, gpus_per_rank=1), [(8, 1), (8, 3)], 2),
        (Ray(np=2, gpus_per_rank=1), [(64, 0)], 0),
        (Ray(np=4, nodes=2), [(2, 0), (2, 0)], 1),
        (Ray(np=4, nodes=2), [(8, 0)], 0),  # one node, though with room for all
        (Ray(np=4, nodes=2), [(4, 0), (4, 0), (4, 0)], 3),
        (Ray(np=4, nodes=2), [(9, 0), (3, 0)], 1),
    ],
)
def test_how_many_runs_find_room(settings: Ray, sizes: list[tuple[int, int]], runs: int) -> None:
    assert ray_driver.room(settings, some(*sizes)) == runs
    said = ray_driver.too_small(settings, some(*sizes))
    assert f"launch.np={settings.np}" in said and "n0: " in said and "\n" not in said


@needs_ray
@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, None),
        ({"Python": "3.8"}, "has Python 3.8, and this process "),
        ({"horovod": "missing"}, "has horovod missing, and this process "),
        ({"token": ""}, "does not see runs_dir=runs of this machine"),
        ({"token": "another"}, "does not see runs_dir=runs of this machine"),
        ({"cwd": ""}, "start hvdllm in a folder that all nodes share"),
    ],
)
def test_a_node_that_cannot_run_a_rank(facts: dict[str, str], says: str | None) -> None:
    good = {**ray_node.versions(), "token": "secret", "cwd": os.getcwd(), "gpus": ""}
    why = ray_driver.unfit({**good, **facts}, "secret", "runs")
    assert why is None if says is None else says in str(why)


def test_what_a_node_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    facts = ray_node.Place().look(str(tmp_path), str(tmp_path / "token"))
    assert (facts["token"], facts["cwd"]) == ("secret", str(tmp_path))
    assert facts["Python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    facts = ray_node.Place().look(str(tmp_path / "gone"), str(tmp_path / "none"))
    assert (facts["token"], facts["cwd"]) == ("", "")


@needs_ray
@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("Could not find any running Ray instance. Please specify ...", "this machine is no node of a Ray cluster"),
        (
            "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\nThis process on "
            "10.0.0.2 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n",
            "Python: 3.12.1 This process",
        ),
        (
            "Failed to get node info\nof this one",
            "is this machine a node of that cluster, and is RAY_AUTH_MODE set as there?",
        ),
    ],
)
def test_what_ray_refuses_is_one_sentence(error: str, says: str) -> None:
    said = ray_driver.refused("auto", error)
    assert says in said and "\n" not in said


@needs_ray
def test_an_address_that_does_not_answer_is_a_sentence_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "launch=ray", "launch.address=127.0.0.1:1", f"runs_dir={tmp_path}/runs"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("hvdllm: launch.address=127.0.0.1:1: no Ray cluster answers there (Connection refused)")
    assert not (tmp_path / "runs").exists()


@needs_ray
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            "The actor died because of an error raised in its creation task, ray::Place.__init__()\n\n"
            "ModuleNotFoundError: No module named 'hvdllm'",
            "node n1 cannot start a rank (ModuleNotFoundError: No module named 'hvdllm'): install hvdllm there",
        ),
        ("The actor died unexpectedly before finishing this task.", None),  # it is lost, and the run may go on
    ],
)
def test_an_actor_that_does_not_answer(
    error: str, says: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = [ray_driver.Rank(node, None) for node in some((1, 0), (1, 0))]

    def get(number: int, timeout: float) -> dict[str, str]:
        if number == 1:
            raise ray_driver.RayError(error)
        return {}

    monkeypatch.setattr(ray_driver.ray, "get", get)
    monkeypatch.setattr(ray_driver.ray, "kill", lambda place: None)
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    if says is None:
        assert ray_driver.answers(ranks, [0, 1]) == [{}]
        assert [rank.lost for rank in ranks] == [False, True]
        assert capsys.readouterr().out.startswith("hvdllm: rank 1 on node n1 is gone (RayError)")
    else:
        with pytest.raises(UserError) as raised:
            ray_driver.answers(ranks, [0, 1])
        assert says in str(raised.value) and "\n" not in str(raised.value)


@needs_ray
@pytest.mark.parametrize(
    ("codes", "says", "code"),
    [
        ([0, 0], None, 0),
        ([1, 137], "hvdllm: rank 1 on node n1 was killed by SIGKILL", 137),  # its peer was heard first
        ([2, 1], "rank 0 on node n0 ended with code 2", 2),  # it has said why
        ([1, 0], "hvdllm: rank 0 on node n0 ended with code 1", 1),
        ([1, None], "hvdllm: rank 1 on node n1 is gone (RayError): its node or its actor has died", 1),
    ],
)
def test_the_rank_that_failed_is_named(
    codes: list[int | None], says: str | None, code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ranks = [ray_driver.Rank(node, k) for k, node in enumerate(some((1, 0), (1, 0)))]

    def get(rank: int) -> tuple[list[str], int | None]:
        if codes[rank] is None:
            raise ray_driver.RayError("gone")
        return ["hvdllm: no such file\n"] if codes[rank] == 2 else [], codes[rank]

    monkeypatch.setattr(ray_driver, "call", lambda place, method, wait: place)
    monkeypatch.setattr(ray_driver.ray, "wait", lambda waiting, num_returns, timeout: (waiting[:1], waiting[1:]))
    monkeypatch.setattr(ray_driver.ray, "get", get)
    monkeypatch.setattr(ray_driver.ray, "kill", lambda place: None)
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    assert ray_driver.Run(Ray(), "runs", "a", []).watch(ranks) == code
    assert capsys.readouterr().out.splitlines()[-1:] == ([says] if says else [])


# ------------------------------------------------------------------ lives
def test_lives_without_progress_are_counted_in_a_row() -> None:
    lives = Lives(100)
    assert [lives.ended(tokens) for tokens in (100, 100, 200, 200, 200)] == [True] * 5
    assert not lives.ended(200)
    assert MOST_IDLE == 3


def failing(tmp: Path, monkeypatch: pytest.MonkeyPatch, saves: list[int]) -> ray_driver.Run:
    """A run whose nodes die in each life. saves: the tokens of its checkpoint before the first and after each life."""
    rank = ray_driver.Rank(some((1, 0))[0], None, 1, lost=True)
    left = iter(saves)
    run = ray_driver.Run(Ray(wait_s=0.0), str(tmp), "a", [])

    @contextlib.contextmanager
    def placed(self: object) -> Iterator[list[ray_driver.Rank]]:
        yield [rank]

    monkeypatch.setattr(ray_driver.Run, "placed", placed)
    monkeypatch.setattr(ray_driver.Run, "life", lambda self, ranks: 1)
    monkeypatch.setattr(ray_driver, "saved", lambda folder: next(left))
    return run


@needs_ray
def test_a_run_that_loses_its_nodes_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    run = failing(tmp_path, monkeypatch, [0, 700, 700, 1400, 1400, 1400, 1400])
    with pytest.raises(RunError, match=r"3 lives of this run came no further than 1,400 tokens"):
        run.live()
    assert capsys.readouterr().out.count("the run goes on from ") == 5


@needs_ray
def test_a_run_waits_for_others_without_limit_and_for_nodes_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    run = ray_driver.Run(Ray(wait_s=60.0), "runs", "a", [])
    looks = [(2, 0), (2, 0), (1, 0), (2, 0), (1, 61), (1, 122)]  # living nodes, and seconds, at each look

    def living() -> list[Node]:
        count, seconds = looks.pop(0)
        monkeypatch.setattr(ray_driver, "time", types.SimpleNamespace(monotonic=lambda: 1.0 + seconds))
        return some((1, 0)) * count

    monkeypatch.setattr(ray_driver, "nodes", living)
    with pytest.raises(RunError, match=r"no node came within 60 s .launch.wait_s.: the same command goes on"):
        run.until_room(Full())
    assert not looks, "the wait began anew when a node had come"
    others, node = "waiting for others to leave the Ray cluster", "waiting up to 60 s for a node (launch.wait_s)"
    assert capsys.readouterr().out.splitlines() == [f"hvdllm: {said}" for said in (others, node, others, node)]
    run.stop.set()
    assert not run.until_room(Full())


class Full:
    """A placement group that never gets room."""

    def wait(self, seconds: float) -> bool:
        return False


@needs_ray
def test_a_run_that_was_asked_to_stop_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = failing(tmp_path, monkeypatch, [0])
    run.stop.set()
    assert run.live() == 1


# ------------------------------------------------------------------ the keeper
CHILD = """
import os, signal, sys, time
def saved(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, saved if sys.argv[1] == "saves" else signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "behaves", "code"),
    [
        ("ask", "saves", 75),  # as when the driver stops the run
        ("leave", "saves", 75),  # as when the actor dies
        pytest.param("leave", "hangs", 128 + signal.SIGKILL, marks=pytest.mark.thorough),  # SAVE_S seconds later
        ("twice", "hangs", 128 + signal.SIGKILL),
        ("kill", "saves", -signal.SIGKILL),  # as when Ray kills what the actor has started
    ],
)
def test_a_keeper_leaves_no_rank_behind(how: str, behaves: str, code: int) -> None:
    words = [*PYTHON, "hvdllm.launch.ray_node", sys.executable, "-c", CHILD, behaves]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        rank = int(keeper.stdout.readline())
        if how == "leave":
            keeper.stdin.close()
        elif how == "kill":
            keeper.kill()
        else:
            keeper.terminate()
        if how == "twice":
            while keeper.poll() is None:
                time.sleep(0.1)
                keeper.terminate()
        rest = keeper.stdout.read()  # ends when the rank has ended
        assert ("saved" in rest) == (behaves == "saves")
        assert keeper.wait(60) == code
        while started(rank):  # a moment longer than its output is open
            time.sleep(0.01)
