"""The registry of the parts that hvdllm is made of: exchanges, wires, optimizers, launchers, and so on.

Each part is described once. Its entry is in the file parts.py of its room, as a decorator of the class of its settings:

    @part("exchange", "acco", "hvdllm.exchange.acco:Acco", ExchangeFacts(carries=PIECES))
    @dataclass
    class Acco(Exchange): ...

An entry says under which group and name the command line chooses the part (`exchange=acco`), where its implementation
is, and what it can do (its facts). The implementation is imported only when it is built, so `--help`, composition and
checks need no torch. Facts alone decide which parts go together (config/composition.py), so a part from outside is
treated like any other. A user's module registers parts in the same way (`plugins=[my_module]`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hvdllm.errors import UserError
from hvdllm.settings import Debug, Device, Several, several

GROUPS = (
    "task", "text", "model", "exchange", "wire", "world", "optim", "schedule", "device", "launch", "track", "debug",
)  # fmt: skip
"""The groups of the configuration, in the order in which they are shown."""
ROOMS = ("task", "text", "models", "exchange", "exchange.wire", "world", "optim", "launch", "track")

# What an exchange asks its wire to carry, and what a wire can carry: whole sums; pieces of sums, one slice for each
# rank; letters from one rank to another; or sums that the named library encodes and moves by itself.
SUMS, PIECES, LETTERS, TORCH, HOROVOD = "sums", "pieces", "letters", "torch", "horovod"
LIBRARIES = (TORCH, HOROVOD)


@dataclass(frozen=True)
class TaskFacts:
    """What a task learns.

    Attributes:
        unit, items: what is counted, and what is dealt, in the plural.
        model: the name of its model.
        text: whether its items come from the group `text`.
        writes: whether its model continues a text (`hvdllm sample`).
        nats: whether its loss is in nats.
        usual: words that stand for defaults of other groups where a command line chooses the task, and not these.
    """

    unit: str
    items: str
    model: str
    text: bool = False
    writes: bool = False
    nats: bool = True
    usual: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExchangeFacts:
    """What an exchange does and needs.

    Attributes:
        carries: what its wire must be able to carry: SUMS, PIECES, LETTERS, TORCH or HOROVOD. An exchange that leaves
          the sums to a library needs the world of that name.
        identical: whether the replicas of all ranks are bit-equal at every mark.
        local: whether ranks, or groups of ranks, train on their own between meetings. Then no optimizer sees the sums.
        shares_state: whether each rank holds only its share of the optimizer's state.
        sums_per_update: how many sums one optimizer step is made of.
        fresh_optimizer: whether the optimizer begins anew within a run.
        buckets: whether it reads exchange.bucket_mb.
        clients: whether the text is dealt to clients (settings clients, alpha and sampled).
        sparse: whether it sends rows of tables (tables.py) as rows.
    """

    carries: str = SUMS
    identical: bool = True
    local: bool = False
    shares_state: bool = False
    sums_per_update: int = 1
    fresh_optimizer: bool = False
    buckets: bool = True
    clients: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class WireFacts:
    """What a wire can do.

    Attributes:
        carries: what it can carry, of SUMS, PIECES, LETTERS, TORCH and HOROVOD.
        exact: whether what arrives equals what was sent.
        signs: whether it sends no magnitudes, so that second moments cannot be learnt from what arrives.
        hooked: whether the libraries that have this code read the wire's settings.
    """

    carries: frozenset[str]
    exact: bool = False
    signs: bool = False
    hooked: bool = False


@dataclass(frozen=True)
class OptimizerFacts:
    """What an optimizer does.

    Attributes:
        vectors: how many numbers it keeps for each weight.
        linear: whether its step is linear in the gradient, like that of plain descent.
        second_moments: whether it learns second moments.
        freezes: whether it can keep them as they are (optim.freeze_tokens).
    """

    vectors: int
    linear: bool = False
    second_moments: bool = False
    freezes: bool = False


@dataclass(frozen=True)
class TransportFacts:
    """What a transport can do.

    Attributes:
        letters: the launchers under which it carries letters between two ranks.
        logical: whether its ranks are threads of one process.
    """

    letters: tuple[str, ...] = ()
    logical: bool = False


@dataclass(frozen=True)
class LauncherFacts:
    """What a launcher does.

    Attributes:
        queues: whether what it starts goes on without the process that started it.
    """

    queues: bool = False


@dataclass(frozen=True)
class TrackerFacts:
    """What a tracker needs.

    Attributes:
        package: the package that must be installed, or "".
    """

    package: str = ""


@dataclass(frozen=True)
class Part:
    """One entry of the registry.

    Attributes:
        group: in which the command line chooses it.
        name: by which the command line chooses it.
        settings: the class of its settings.
        made: the implementation: `module:name`, the name of a module, or the object itself.
        facts: of the class that belongs to the group, such as ExchangeFacts.
    """

    group: str
    name: str
    settings: type
    made: Any
    facts: Any


S = TypeVar("S")
_parts: dict[str, dict[str, Part]] = {}
_complete = False


def part(group: str, name: str, made: Any, facts: Any = None) -> Callable[[type[S]], type[S]]:
    """A decorator that registers a part by the class of its settings. The arguments are the fields of Part.

    Raises UserError if another part has the name.
    """

    def register(settings: type[S]) -> type[S]:
        known = _parts.setdefault(group, {})
        if name in known and known[name].settings.__module__ != settings.__module__:
            raise UserError(
                f"{settings.__module__} registers {group}={name}, which {known[name].settings.__module__} has"
            )
        known[name] = Part(group, name, settings, made, facts)
        return settings

    return register


part("device", "device", "hvdllm.device")(Device)
part("debug", "debug", "hvdllm.faults")(Debug)


def parts(group: str) -> dict[str, Part]:
    """All parts of a group by name, in the order of their entries."""
    global _complete
    if not _complete:
        _complete = True
        for room in ROOMS:
            importlib.import_module(f"hvdllm.{room}.parts")
    return _parts[group]


def kinds(group: str) -> dict[str, type]:
    """The classes of settings of a group, by the names of their parts. Empty if there is no such group."""
    return {name: part.settings for name, part in parts(group).items()} if group in GROUPS else {}


def all_kinds() -> dict[str, dict[str, type]]:
    """The result of `kinds` for all groups of the configuration."""
    return {group: kinds(group) for group in GROUPS}


def of(group: str, settings: object) -> Part:
    """The part that these settings belong to. Raises TypeError if they belong to none."""
    for part in parts(group).values():
        if part.settings is type(settings):
            return part
    raise TypeError(f"no {group} has settings of the class {type(settings).__name__}: register it")


def name_of(group: str, settings: object) -> str:
    """The name of the part that these settings belong to, such as `allreduce`."""
    return of(group, settings).name


def built(part: Part) -> Any:
    """Imports and returns the implementation of a part. Raises UserError if that of a plugin cannot be imported."""
    if not isinstance(part.made, str):
        return part.made
    module, _, name = part.made.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, name) if name else found
    except (ImportError, AttributeError) as error:
        if module.startswith("hvdllm."):
            raise
        raise UserError(
            f"{part.group}={part.name} is registered as {part.made}, which cannot be imported: {error}"
        ) from None


def load(modules: Several) -> None:
    """Imports a user's modules, which register parts.

    Each is found as Python finds modules, or else in the current folder, which is searched for nothing else.

    Raises UserError if a module is not found, or if it fails.
    """
    for name in several(modules):
        if name in sys.modules:
            continue
        parts("exchange")  # register own parts first, so that the error for a taken name blames the plugin
        try:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                _from_folder(name, Path.cwd())
            importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:
            sys.modules.pop(name, None)
            raise UserError(f"plugins={name}: it cannot be imported ({type(error).__name__}: {error})") from None


def _from_folder(name: str, folder: Path) -> None:
    first = name.partition(".")[0]
    path = next((p for p in (folder / f"{first}.py", folder / first / "__init__.py") if p.is_file()), None)
    if path is None:
        raise UserError(f"plugins={name}: there is no such module, neither where Python looks nor as {first}.py here")
    spec = importlib.util.spec_from_file_location(first, path)
    assert spec is not None and spec.loader is not None
    sys.modules[first] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
