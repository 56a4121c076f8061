"""Bugs that the check must find, each planted into a case where it matters. Most were in the code once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

Patch = Callable[[Any, str, Any], None]


@dataclass(frozen=True)
class Bug:
    plant: Callable[[Patch], None]
    world: str
    words: tuple[str, ...]
    size: int


BUGS: dict[str, Bug] = {}


def bug(world: str, words: str, size: int = 2) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def book(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        BUGS[plant.__name__] = Bug(plant, world, tuple(words.split()), size)
        return plant

    return book


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name is not None:
            BUGS[name].plant(lambda at, word, value: stack.enter_context(mock.patch.object(at, word, value)))
        yield


def as_it_is(value: Any) -> Any:
    return value


# ------------------------------------------------------------------ memory
@bug("hvd", "exchange=allreduce wire=int8")
def horovod_outputs_are_not_recorded(patch: Patch) -> None:
    from hvdllm.world import hvd

    patch(hvd, "used_here", as_it_is)


@bug("hvd", "exchange=sharded wire.hierarchical=true", 4)
def driven_flights_are_not_recorded(patch: Patch) -> None:
    from hvdllm.world import driver

    patch(driver, "used_here", as_it_is)


@bug("torch", "exchange=acco")
def torch_flights_are_not_recorded(patch: Patch) -> None:
    from hvdllm.world import torch as world

    patch(world, "used_here", as_it_is)


@bug("hvd", "exchange=acco")
def only_the_outermost_list_is_recorded(patch: Patch) -> None:
    from hvdllm import device
    from hvdllm.world import driver

    def shallow(value: Any) -> Any:
        return device.used_here(value) if isinstance(value, (list, tuple)) else value

    patch(driver, "used_here", shallow)


@bug("torch", "exchange=delayed exchange.warmup_tokens=64 wire=powersgd wire.warmup_tokens=64 wire.min_compression=1")
def powersgd_replaces_what_the_loop_made(patch: Patch) -> None:
    from hvdllm.exchange.wire.powersgd import PowerSGDWire

    rest = PowerSGDWire._sum

    def replaced(wire: Any, *args: Any) -> Any:
        wire.q = {name: q.clone() for name, q in wire.q.items()}
        return rest(wire, *args)

    patch(PowerSGDWire, "_sum", replaced)


# ------------------------------------------------------------------ order
@bug("single", "exchange=allreduce", 1)
def batches_are_not_waited_for(patch: Patch) -> None:
    from hvdllm.task.stream import Stream

    rest = Stream._arrive
    patch(Stream, "_arrive", lambda stream, loaded, round: rest(stream, (*loaded[:3], None), round))


@bug("torch", "exchange=acco")
def nobody_waits_for_the_driver(patch: Patch) -> None:
    from hvdllm.world.driver import Driven

    patch(Driven, "land", lambda flight: flight._future.result()[0])


@bug("hvd", "exchange=acco wire=int8")
def the_driver_does_not_wait_for_the_caller(patch: Patch) -> None:
    import fake_cuda

    from hvdllm.world.driver import Driver

    rest = Driver._run
    patch(Driver, "_run", lambda driver, work, ready: rest(driver, work, fake_cuda.Event()))


@bug("torch", "exchange=allreduce")
def nobody_waits_for_nccl(patch: Patch) -> None:
    from hvdllm.world.torch import TorchRanks

    rest = TorchRanks.wait
    patch(TorchRanks, "wait", lambda world, work, name, on_host=True: on_host and rest(world, work, name))


@bug("torch", "exchange=allreduce")
def gradients_are_emptied_in_flight(patch: Patch) -> None:
    from hvdllm.exchange.allreduce import AllReduce

    rest = AllReduce.end_round

    def end_round(exchange: Any, flights: Any) -> Any:
        exchange.flat.g.zero_()
        return rest(exchange, flights)

    patch(AllReduce, "end_round", end_round)


@bug("hvd", "exchange=delayed exchange.warmup_tokens=64 wire=int8")
def the_loop_touches_what_the_driver_keeps(patch: Patch) -> None:
    from hvdllm.exchange.wire.feedback import Feedback

    rest = Feedback.begin

    def begin(wire: Any, *args: Any) -> None:
        rest(wire, *args)
        for kept in wire.residual.values():
            kept.mul_(1.0)

    patch(Feedback, "begin", begin)


@bug("torch", "exchange=acco")
def threads_launch_for_themselves(patch: Patch) -> None:
    from concurrent.futures import Future

    from hvdllm.world.launches import Launches

    def launch(launches: Any, start: Callable[[], Any], device: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(start())
        return future

    patch(Launches, "launch", launch)


@bug("torch", "exchange=allreduce")
def a_launch_does_not_wait_for_the_gradients(patch: Patch) -> None:
    import torch

    from hvdllm.world.launches import Launches

    def launch(launches: Any, start: Callable[[], Any], device: Any) -> Any:
        def aside() -> Any:
            with torch.cuda.stream(torch.cuda.Stream(device)):
                return start()

        return launches._enqueue(aside)

    patch(Launches, "launch", launch)


@bug("torch", "exchange=sharded")
def the_update_runs_aside(patch: Patch) -> None:
    import torch

    from hvdllm.optim.update import Update

    rest = Update.step

    def step(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.stream(torch.cuda.Stream()):
            return rest(*args, **kwargs)

    patch(Update, "step", step)


# ------------------------------------------------------------------ devices and threads
@bug("single", "exchange=parameter_server exchange.staleness=0", 1)
def threads_begin_on_the_first_gpu(patch: Patch) -> None:
    import torch

    from hvdllm import device

    def init(later: Any, x: Any) -> None:
        later.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        later.host.copy_(x, non_blocking=True)
        later.event = torch.cuda.Event()
        later.event.record()

    patch(device.Later, "__init__", init)
    patch(device, "_same_gpu", lambda: lambda: None)


@bug("hvd", "exchange=allreduce")
def times_are_taken_on_the_first_gpu(patch: Patch) -> None:
    import torch

    from hvdllm.exchange import rounds

    made = []

    class Elsewhere(rounds.Mark):
        def __init__(self, device: Any) -> None:
            made.append(self)
            super().__init__(torch.device("cuda", len(made) % 2))

    patch(rounds, "Mark", Elsewhere)


@bug("virtual", "world=virtual world.size=2 world.tokens_per_s=2000 exchange=allreduce")
def hooks_run_on_autograds_thread(patch: Patch) -> None:
    import torch

    patch(torch.autograd, "set_multithreading_enabled", lambda on: contextlib.nullcontext())


# ------------------------------------------------------------------ the host
@bug("single", "exchange=allreduce", 1)
def numbers_are_read_too_early(patch: Patch) -> None:
    from hvdllm.device import Later

    patch(Later, "read", lambda later: later.host.reshape(-1).tolist())


@bug("single", "exchange=diloco exchange.local_steps=2 exchange.host_memory=true", 1)
def the_host_reads_the_anchor_on_its_way(patch: Patch) -> None:
    from hvdllm.exchange.anchor import Anchor

    rest = Anchor.meet

    def meet(anchor: Any, *args: Any) -> None:
        rest(anchor, *args)
        anchor.x.sum()

    patch(Anchor, "meet", meet)
