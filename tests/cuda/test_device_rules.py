"""The rules of hvdllm/device.py that need no GPU to be seen."""

import ast
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdllm import device
from hvdllm.checkpoint import read
from hvdllm.errors import PeerError
from hvdllm.flat import Flat
from hvdllm.world import virtual
from hvdllm.world.single import SingleWorld

ROOT = Path(__file__).resolve().parents[2] / "hvdllm"
TENSORS = ("world", "exchange", "task", "text", "trainer", "optim", "checkpoint", "models")
# They touch no tensor: two ask whether the launcher and the other ranks live, the others prepare text and images.
WITHOUT = {"world/signals.py", "trainer/heartbeat.py", "text/workers.py", "text/overlap.py", "task/images.py"}


@pytest.mark.parametrize("room", TENSORS)
def test_threads_that_touch_tensors_are_started_by_one_helper(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        if str(path.relative_to(ROOT)) in WITHOUT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                assert called not in ("Thread", "ThreadPoolExecutor"), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("room", TENSORS)
def test_events_say_their_stream(room: str) -> None:
    """One that does not is recorded on the thread's current device."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("event.record"):
                assert node.args, f"{path}: {ast.unparse(node)}"


def test_what_is_used_here_is_found_however_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Inside:
        x: torch.Tensor
        rest: Any

    class OnGpu(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream: Any) -> None:
            seen.append((int(self[0]), stream))

    def on_gpu(number: int) -> torch.Tensor:
        return torch.tensor([number]).as_subclass(OnGpu)

    seen: list[tuple[int, Any]] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"stream of {of}")
    value = [on_gpu(1), (on_gpu(2), {"a": Inside(on_gpu(3), [on_gpu(4)])}), torch.zeros(1), None, "text"]
    assert device.used_here(value) is value
    assert seen == [(number, "stream of cpu") for number in (1, 2, 3, 4)]


def test_threads_begin_on_the_gpu_of_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with device.pool("test") as pool:
        pool.submit(int).result()
    done: list[Any] = []
    device.start_thread(lambda: done.append(chosen[:]), "test")
    while not done:
        pass
    assert done == [[3, 3]]


class Event:
    """That has happened when it is asked for the fourth time, or never."""

    def __init__(self, ever: bool = True) -> None:
        self.ever, self.asked = ever, 0

    def query(self) -> bool:
        self.asked += 1
        return self.ever and self.asked == 4


def test_a_gpu_is_waited_for_by_poll_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_patience_s", 0.0)
    with pytest.raises(PeerError, match=r"the GPU has been busy for 0 s .world.timeout_s.*a rank that is gone"):
        device.wait_for(Event(ever=False))  # type: ignore[arg-type]
    device.be_patient(60.0)
    device.wait_for(event := Event())  # type: ignore[arg-type, assignment]
    assert event.asked == 4


def test_ranks_set_how_long_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_patience_s", 0.0)
    virtual.run(1, lambda world: None)
    assert device._patience_s == math.inf, "logical ranks wait for nobody else"


def test_what_a_checkpoint_holds_of_the_whole_map_is_read_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has room for the pieces that it owns, not for all weights and moments once more."""
    flat = Flat(torch.nn.Linear(3, 2, device="meta"), 1, 1)
    monkeypatch.setattr(read, "read_vector", lambda path, kind, flat, vector: vector.fill_(3.0))
    shared = read.share_vector(tmp_path, "m", flat, SingleWorld())
    assert shared.device.type == "cpu" and shared.shape == flat.x.shape and shared.eq(3).all()
    assert read.read_ranks(tmp_path, "summed.residual", flat, None).device.type == "cpu"
