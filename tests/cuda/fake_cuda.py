"""CUDA without a GPU, in a build of torch for CPUs: a stand-in, because the machines that run the tests have none.

    import fake_cuda                         # before torch
    fake_cuda.load(folder)                   # compiles and loads guard.cpp
    with fake_cuda.watch() as books: ...     # code that says device="cuda:1"
    books.findings                           # what would be wrong on a GPU

A tensor on a fake device holds a real one on the CPU, so all numbers are those of a run on CPUs, and every operation is
booked: which stream reads or writes which bytes, and which stream (or the host) has waited for which, by vector clocks
(the idea of torch.cuda._sanitizer). Autograd runs on a thread of the device, as on a GPU. What is found:

    mixed    an operation on tensors of two devices; raised at once, as on a GPU
    race     two streams touch the same bytes, one of them writes, and neither has waited for the other
    freed    memory returns to the stream it was made on while another stream may still use it
    host     the host touches pinned memory before a copy from or to it is known to be done
    event    a time between events of two devices, or before they are known to have happened
    order    collectives of NCCL are launched by several threads (fake_ranks.py)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

assert "torch" not in sys.modules, "the fake devices must be there before torch asks for them"

Key = tuple[int, Any]  # a stream: its device, and its number or name
HOST: Key = (-1, "host")
LOCK = threading.RLock()
guard: Any = None
BOOKS: Books | None = None


def load(folder: Path, compiler: str) -> None:
    """Compiles guard.cpp into `folder`, where that has not been done, and puts it before torch."""
    global guard
    torch_at = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    built = folder / "guard.so"
    if not built.exists():
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch_at}/include", f"-L{torch_at}/lib"]
        source = str(Path(__file__).with_name("guard.cpp"))
        subprocess.run([compiler, *flags, source, "-o", str(built), "-lc10", "-ltorch_cpu"], check=True)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_at / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    guard = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
    guard.get_stream.restype = ctypes.c_long
    guard.set_stream.argtypes = [ctypes.c_int, ctypes.c_long]
    guard.install()


# ------------------------------------------------------------------ streams and events
def index_of(device: Any = None) -> int:
    if device is None:
        return int(guard.get_device())
    if isinstance(device, int):
        return device
    import torch

    index = torch.device(device).index
    return int(guard.get_device()) if index is None else index


class Stream:
    made = 0

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        if number is None:
            number = Stream.made = Stream.made + 1
        self.index, self.number = index_of(device), number
        self.key: Key = (self.index, number)

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", self.index)

    def wait_event(self, event: Event) -> None:
        the_books().order(self.key, event.clock)

    def wait_stream(self, other: Stream) -> None:
        the_books().order(self.key, the_books().clocks[other.key])

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        the_books().host_waits(the_books().clocks[self.key])

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing = enable_timing
        self.clock: dict[Key, int] = {}
        self.key: Key | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.key = (stream or current_stream()).key
        the_books().launch(self.key)
        self.clock = dict(the_books().clocks[self.key])

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        the_books().host_waits(self.clock)

    def query(self) -> bool:
        self.synchronize()  # it says yes, so the host knows
        return True

    def elapsed_time(self, later: Event) -> float:
        assert self.timing and later.timing and self.key and later.key, "a time needs two events with enable_timing"
        if self.key[0] != later.key[0]:
            the_books().find("event", f"a time between events of the devices {self.key[0]} and {later.key[0]}")
        for event in (self, later):
            if not the_books().host_knows(event.key, event.clock.get(event.key, 0)):  # type: ignore[arg-type]
                the_books().find("event", "a time of an event that may not have happened")
        return 1.0


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    return Stream(index, number=int(guard.get_stream(index)))


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    device, before = guard.get_device(), guard.get_stream(stream.index)
    guard.set_device(stream.index)
    guard.set_stream(stream.index, stream.number)
    try:
        yield
    finally:
        guard.set_stream(stream.index, before)
        guard.set_device(device)


@contextlib.contextmanager
def on_device(device: Any) -> Iterator[None]:
    before = guard.get_device()
    guard.set_device(index_of(device))
    try:
        yield
    finally:
        guard.set_device(before)


# ------------------------------------------------------------------ books
@dataclass
class Use:
    """Of the bytes [low, high) of a storage, by the kernel with this number of a stream."""

    low: int
    high: int
    key: Key
    number: int
    writes: bool
    words: str


@dataclass
class Memory:
    """A storage. home: the stream it was made on and returns to. recorded: on which streams (Tensor.record_stream)."""

    ref: Any
    home: Key
    made: str
    recorded: set[Key] = field(default_factory=set)
    uses: list[Use] = field(default_factory=list)
    last: dict[Key, Use] = field(default_factory=dict)


def where() -> str:
    """The lines of hvdllm that brought us here, innermost first."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 3:
        _, found, file = frame.f_code.co_filename.rpartition("/hvdllm/")
        if found and "site-packages" not in frame.f_code.co_filename:
            lines.append(f"{file}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


class Books:
    def __init__(self) -> None:
        self.clocks: dict[Key, dict[Key, int]] = defaultdict(dict)  # what each stream has waited for, itself included
        self.memory: dict[int, Memory] = {}
        self.pinned: dict[int, Any] = {}  # storages of the host that copies need not wait for
        self.findings: dict[tuple[str, str], str] = {}
        self.kernels = 0

    def find(self, kind: str, words: str) -> None:
        self.findings.setdefault((kind, where().partition(" < ")[0]), f"{kind}: {words} [{where()}]")

    # -------------------------------------------------------------- clocks
    def order(self, key: Key, clock: dict[Key, int]) -> None:
        """What comes on this stream from here on comes behind all that the clock has seen."""
        with LOCK:
            mine = self.clocks[key]
            for other, number in list(clock.items()):
                if mine.get(other, 0) < number:
                    mine[other] = number

    def host_waits(self, clock: dict[Key, int]) -> None:
        self.order(HOST, clock)

    def host_knows(self, key: Key, number: int) -> bool:
        return self.clocks[HOST].get(key, 0) >= number

    def launch(self, key: Key) -> int:
        with LOCK:
            self.order(key, self.clocks[HOST])
            self.clocks[key][key] = self.clocks[key].get(key, 0) + 1
            return self.clocks[key][key]

    def kernel(self, name: str, reads: list[Any], writes: list[Any], key: Key) -> dict[Key, int]:
        """Books a kernel over these tensors on a stream; the stream's clock with it."""
        with LOCK:
            self.kernels += 1
            number, words = self.launch(key), f"{name} on stream {key} at {where()}"
            for x, writing in (*((x, False) for x in reads), *((x, True) for x in writes)):
                self.touch(x, key, number, writing, words)
            return dict(self.clocks[key])

    # -------------------------------------------------------------- memory
    def at(self, x: Any, key: Key) -> Memory:
        """The books of a tensor's storage; made on this stream, if it is new."""
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = x.untyped_storage()
        found = self.memory.get(storage._cdata)
        if found is not None and found.ref.expired():
            self.freed(self.memory.pop(storage._cdata))
            found = None
        if found is None:
            found = self.memory[storage._cdata] = Memory(StorageWeakRef(storage), key, where())
        return found

    def pin(self, x: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self.pinned[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())

    def is_pinned(self, x: Any) -> bool:
        ref = self.pinned.get(x.untyped_storage()._cdata)
        return ref is not None and not ref.expired()

    def touch(self, x: Any, key: Key, number: int, writes: bool, words: str) -> None:
        if x.numel() == 0:
            return
        memory, clock = self.at(x, key), self.clocks[key]
        low = x.storage_offset() * x.element_size()
        reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        use, kept = Use(low, low + (reach + 1) * x.element_size(), key, number, writes, words), []
        for old in memory.uses:
            over = old.low < use.high and use.low < old.high
            ordered = old.key == key or clock.get(old.key, 0) >= old.number
            if over and not ordered and (writes or old.writes):
                kind = "host" if HOST in (key, old.key) else "race"
                self.find(kind, f"{words}, and {old.words}, of memory made at {memory.made}")
            if not (ordered and writes and use.low <= old.low and old.high <= use.high):
                kept.append(old)
        memory.uses = [*kept[-300:], use]
        memory.last[key] = use

    def freed(self, memory: Memory) -> None:
        """It is given away once the streams it was recorded on are where they are now."""
        known = [self.clocks[HOST], *(self.clocks[key] for key in (memory.home, *memory.recorded))]
        for key, use in memory.last.items():
            own = key in (HOST, memory.home) or key in memory.recorded
            if not own and all(clock.get(key, 0) < use.number for clock in known):
                self.find("freed", f"memory of stream {memory.home}, made at {memory.made}, before {use.words}")

    def sweep(self) -> None:
        for gone in [number for number, memory in self.memory.items() if memory.ref.expired()]:
            self.freed(self.memory.pop(gone))


def the_books() -> Books:
    return BOOKS or Books()  # of nobody: behind the end of `watch`


# ------------------------------------------------------------------ tensors and operations; torch from here on
@cache
def make_tensors() -> Any:
    """The class of fake tensors and the mode that runs operations on them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    reads_on_host = {
        aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default,
        aten.masked_select.default,
    }  # fmt: skip

    class Tensor(torch.Tensor):
        """numbers: its values, on the CPU."""

        numbers: torch.Tensor

        @staticmethod
        def __new__(cls: Any, inner: torch.Tensor, index: int) -> Any:
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=torch.device("cuda", index),
            )  # fmt: skip
            made.numbers = inner
            return made

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return operate(func, args, kwargs or {})

        @property
        def data(self) -> Any:
            return Tensor(self.numbers, self.device.index)

        @data.setter
        def data(self, other: Any) -> None:
            self.numbers = other.numbers

        def data_ptr(self) -> int:
            return self.numbers.data_ptr()

        def untyped_storage(self) -> Any:
            return self.numbers.untyped_storage()

        def record_stream(self, stream: Stream) -> None:
            with LOCK:
                the_books().at(self.numbers, current_stream(self.device).key).recorded.add(stream.key)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return operate(func, args, kwargs or {})

    def each(value: Any, do: Callable[[torch.Tensor], Any]) -> Any:
        if isinstance(value, torch.Tensor):
            return do(value)
        if isinstance(value, (list, tuple)):
            return type(value)([each(one, do) for one in value])
        return value

    def tensors_in(*values: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        each(list(values), found.append)
        return found

    def bare(x: torch.Tensor) -> torch.Tensor:
        return x.numbers if isinstance(x, Tensor) else x

    def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        found = []
        for place, said in enumerate(func._schema.arguments):
            if said.alias_info is not None and said.alias_info.is_write:
                found.append(args[place] if place < len(args) else kwargs.get(said.name))
        return tensors_in(found)

    def operate(func: Any, args: Any, kwargs: Any) -> Any:
        given = tensors_in(args, list(kwargs.values()))
        fake = [x for x in given if isinstance(x, Tensor)]
        asked = kwargs.get("device")
        asked = torch.device(asked) if asked is not None else None
        books = the_books()
        if func._schema.name.startswith("prim::"):
            return func(*args, **kwargs)
        if not fake and (asked is None or asked.type != "cuda"):
            return on_cpu(books, func, args, kwargs, given)
        with LOCK:
            books.sweep()
            if func in (aten._to_copy.default, aten.copy_.default):
                return copied(books, func, args, kwargs, asked)
            if func is aten._fused_sdp_choice.default:
                return 0  # the kernel made of plain operations
            index = fake[0].device.index if fake else index_of(asked)
            mixed = [x for x in given if x.dim() and (not isinstance(x, Tensor) or x.device.index != index)]
            if mixed and "index" not in func._schema.name:
                raise RuntimeError(f"{func} mixes cuda:{index} and {mixed[0].device} at {where()}")
            return computed(books, func, args, kwargs, fake, index)

    def on_cpu(books: Books, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory") or func is aten._pin_memory.default:
            books.pin(out)
        aliases = any(said.alias_info is not None for said in func._schema.returns)
        if books.pinned and not (aliases and not func._schema.is_mutable):
            with LOCK:
                changed = written(func, args, kwargs)
                for x in given:
                    if books.is_pinned(x):
                        writes = any(x is one for one in changed)
                        books.touch(
                            x, HOST, books.launch(HOST), writes, f"{func._schema.name} by the host at {where()}"
                        )
        return out

    def computed(books: Books, func: Any, args: Any, kwargs: Any, fake: list[Any], index: int) -> Any:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        key = current_stream(index).key
        out = func(*each(args, bare), **{name: each(value, bare) for name, value in kwargs.items()})
        known = {id(x.numbers): x for x in fake}
        view = any(said.alias_info is not None and not said.alias_info.is_write for said in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        fresh = [x for x in tensors_in(out) if id(x) not in known]
        if not view and name != "detach":
            changed = [x.numbers for x in written(func, args, kwargs)]
            for x in fresh:
                books.at(x, key)
            if not name.startswith(("empty", "new_empty")):
                fills = name in ("zero_", "fill_", "copy_")
                reads = [x.numbers for x in fake if not (fills and any(x.numbers is one for one in changed))]
                clock = books.kernel(name, reads, changed + fresh, key)
                if func in reads_on_host:
                    books.host_waits(clock)
        return each(out, lambda x: known[id(x)] if id(x) in known else Tensor(x, index))

    def copied(books: Books, func: Any, args: Any, kwargs: Any, asked: Any) -> Any:
        """Between devices, or on one. Only with pinned memory does the host not wait."""
        if func is aten._to_copy.default:
            source, to = args[0], asked or args[0].device
            soon = bool(kwargs.get("non_blocking"))
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
            inner = func(bare(source), **kwargs)
            target = Tensor(inner, index_of(to)) if to.type == "cuda" else inner
            if soon and to.type == "cpu":
                books.pin(inner)
        else:
            target, source = args[0], args[1]
            soon = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            inner = bare(target)
            inner.copy_(bare(source))
        device = next(x.device for x in (source, target) if isinstance(x, Tensor))
        clock = books.kernel("copy", [bare(source)], [inner], current_stream(device).key)
        host = [bare(x) for x in (source, target) if not isinstance(x, Tensor)]
        if host and not (soon and books.is_pinned(host[0])):
            if host[0] is inner:
                books.host_waits(clock)
            else:  # from ordinary memory: it has been read when the call returns
                books.memory.pop(host[0].untyped_storage()._cdata, None)
        return target

    return Tensor, Mode


# ------------------------------------------------------------------ torch.cuda
@contextlib.contextmanager
def watch() -> Iterator[Books]:
    """Within, torch has two fake GPUs; what is done on them is booked."""
    global BOOKS
    import gc
    import types

    import torch

    Mode = make_tensors()[1]
    books = BOOKS = Books()
    undo: list[tuple[Any, str, Any]] = []

    def put(target: Any, name: str, value: Any) -> None:
        undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def synchronize(device: Any = None) -> None:
        for key, clock in list(books.clocks.items()):
            if key[0] == index_of(device):
                books.host_waits(clock)

    for name, value in {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: 2, "current_device": index_of, "set_device": lambda d: guard.set_device(index_of(d)),
        "Stream": Stream, "Event": Event, "current_stream": current_stream, "stream": on_stream, "device": on_device,
        "synchronize": synchronize, "get_device_name": lambda d=None: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda d=None: types.SimpleNamespace(uuid=f"GPU-{index_of(d)}"),
        "max_memory_allocated": lambda d=None: 1, "manual_seed_all": lambda s: None, "manual_seed": lambda s: None,
        "_is_in_bad_fork": lambda: False, "is_bf16_supported": lambda *a, **k: True,
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *a: None,
    }.items():  # fmt: skip
        put(torch.cuda, name, value)

    to_list = torch.Tensor.tolist

    def read_list(x: Any) -> Any:  # reads the memory as it is, without an operation
        if books.is_pinned(x):
            with LOCK:
                books.touch(x, HOST, books.launch(HOST), False, f"tolist by the host at {where()}")
        return to_list(x.cpu())

    def with_mode(run: Callable[..., Any]) -> Callable[..., Any]:
        """A mode is its thread's own: those that our code starts get it too, on device 0, as every thread begins."""

        def within(*args: Any) -> Any:
            if BOOKS is not books:
                return run(*args)
            torch._C._set_only_lift_cpu_tensors(True)
            with Mode():
                return run(*args)

        return within

    put(threading.Thread, "run", with_mode(threading.Thread.run))
    put(torch.Tensor, "tolist", read_list)
    put(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)  # a Parameter of the other class
    try:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes one here and moves it
        with Mode():
            yield books
        gc.collect()
        books.sweep()
    finally:
        for target, name, value in reversed(undo):
            setattr(target, name, value)
        torch._C._set_only_lift_cpu_tensors(False)
        guard.set_device(0)
        BOOKS = None
