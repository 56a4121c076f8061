"""A torch world of one, and how ranks find each other."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvdllm.errors import PeerError, UserError
from hvdllm.world import torch as world_torch
from hvdllm.world.detect import Place
from hvdllm.world.torch import Channel, TorchFlight, TorchWorld, address_of, own_address, through_horovodrun

MINUTE = timedelta(minutes=1)


@pytest.fixture
def world() -> Iterator[TorchWorld]:
    world = TorchWorld(Place(), 60.0)
    yield world
    world.close()


def test_a_world_of_one(world: TorchWorld) -> None:
    x = torch.arange(4.0)
    part = world.split([(0,)], "start.part")
    for where in (world, part):
        for kind in ("sum", "scatter", "gather", "alltoall", "broadcast", "adasum"):
            assert getattr(where, kind)(x.clone(), f"grad.{kind}").land().equal(x)
        assert where.texts("é", "start.text") == ["é"] and where.drive(lambda: 3).land() == 3
    assert world.bytes_sent == 0 and (part.rank, part.size, part.local_rank, part.local_size) == (0, 1, 0, 1)
    with pytest.raises(RuntimeError, match="whole"):
        part.split([(0,)], "start.again")


def test_no_horovod_is_imported() -> None:
    code = "import sys, hvdllm.world.torch; sys.exit(any(m in sys.modules for m in ('horovod', 'mpi4py')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Never:
    """Work that other ranks do not join."""

    def is_completed(self) -> bool:
        return False

    def wait(self, slice: timedelta) -> None:
        raise RuntimeError("Operation timed out!")


class Broken(Never):
    def is_completed(self) -> bool:
        return True

    def wait(self, slice: timedelta | None = None) -> None:
        raise RuntimeError("Connection closed by peer\nhere")


def flight_of(work: Any, world: TorchWorld) -> TorchFlight:
    x = torch.ones(1)
    return TorchFlight(Channel(None).launch(lambda: work), x, "grad.0", world, lambda: x)


def test_a_rank_that_stands_still_is_a_peer_error(world: TorchWorld) -> None:
    flight = flight_of(Never(), world)
    assert not flight.landed()
    world.timeout_s = 0
    with pytest.raises(PeerError, match=r"`grad\.0`, so this rank gives up: another rank stands still"):
        flight.land()


def test_a_launch_that_waits_for_ever_is_a_peer_error(world: TorchWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_torch, "SLICE", timedelta(0))
    x, never = torch.ones(1), Future()  # type: ignore[var-annotated]
    world.timeout_s = 0
    with pytest.raises(PeerError, match=r"for `grad\.0`, so this rank gives up: another rank stands still"):
        TorchFlight(never, x, "grad.0", world, lambda: x).land()


def test_a_rank_that_is_gone_is_a_peer_error(world: TorchWorld) -> None:
    flight = flight_of(Broken(), world)
    assert flight.landed()
    with pytest.raises(PeerError, match=r"another rank is gone \(Connection closed by peer\)"):
        flight.land()


def test_a_channel_launches_in_the_order_of_the_calls() -> None:
    channel, sizes, log = Channel(None), threading.Event(), []

    def ragged() -> str:
        assert sizes.wait(60)
        log.append("ragged")
        return "ragged"

    futures = [channel.launch(lambda: log.append("first"))]
    assert log == ["first"], "at once"
    futures += [channel.launch(ragged, waits=True), channel.launch(lambda: log.append("behind"))]
    assert log == ["first"] and not futures[2].done()
    sizes.set()
    assert futures[1].result() == "ragged" and futures[2].result() is None
    channel.launch(lambda: log.append("last"))
    assert log == ["first", "ragged", "behind", "last"]
    channel.close()


# ------------------------------------------------------------------ meeting
class KeyValue(BaseHTTPRequestHandler):
    """As horovodrun's: PUT and GET of /scope/key, 404 for what is not there."""

    kept: dict[str, bytes]
    asked: threading.Event

    def do_PUT(self) -> None:
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def do_GET(self) -> None:
        self.asked.set()
        self.answer(200 if self.path in self.kept else 404, self.kept.get(self.path, b""))

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[KeyValue]]:
    kind = type("Kept", (KeyValue,), {"kept": {}, "asked": threading.Event()})
    with HTTPServer(("127.0.0.1", 0), kind) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(served.server_port))
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nothing may use
        yield kind
        served.shutdown()
        thread.join()


def test_the_address_travels_through_horovodruns_server(server: type[KeyValue]) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(through_horovodrun, None, MINUTE)
        assert server.asked.wait(60), "before rank 0 has left it"
        time.sleep(0.05)
        assert through_horovodrun(("10.0.0.1", 1234), MINUTE) == ("10.0.0.1", 1234)
        assert other.result() == ("10.0.0.1", 1234)


def test_an_address_that_never_comes_is_a_peer_error(server: type[KeyValue], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        monkeypatch.context() as clock
    ):  # on which 40 s pass between two looks: no real limit is too short to answer in
        seconds = itertools.count(0, 40)
        clock.setattr(world_torch, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda s: None))
        with pytest.raises(PeerError, match="rank 0 left no address"):
            through_horovodrun(None, MINUTE)
        assert next(seconds) == 120, "asked twice: after 40 s, and after 80"
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "9")
    with pytest.raises(PeerError, match="does not answer"):
        through_horovodrun(None, MINUTE)
    monkeypatch.delenv("HOROVOD_GLOO_RENDEZVOUS_PORT")
    with pytest.raises(UserError, match="--gloo"):
        through_horovodrun(None, MINUTE)


def test_the_address_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", world_torch.IFACE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(world_torch.socket, "gethostname", lambda: "node7")
    assert own_address(Place("mpirun", 0, 4, 0, 4)) == "127.0.0.1"
    assert own_address(Place("mpirun", 0, 4, 0, 2)) == "node7"
    monkeypatch.setenv(world_torch.IFACE, "lo,eth9")
    assert own_address(Place("mpirun", 0, 4, 0, 2)) == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "10.1.2.3")
    assert own_address(Place("mpirun", 0, 4, 0, 2)) == "10.1.2.3"
    with pytest.raises(UserError, match="nic9"):
        address_of("nic9")
