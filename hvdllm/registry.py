"""The parts that hvdllm is made of, each described once: an exchange, a wire, an optimizer, a launcher, and so on.

An entry stands in `parts.py` of the part's room, as a decorator of the class of its settings:

    @part("exchange", "acco", "hvdllm.exchange.acco:Acco", ExchangeFacts(carries=PIECES))
    @dataclass
    class Acco(Exchange): ...

It says under which group and name the command line chooses the part (`exchange=acco`), where its implementation stands
(imported only when it is built, so that `--help`, composition and checks need no torch), and its facts: what it can do.
What goes with what is decided by facts alone (config/composition.py), so a part that nobody here knows is treated like
any other. A module of a user's registers parts in the same way (`plugins=[my_module]`).
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
from hvdllm.settings import Device

GROUPS = ("text", "model", "exchange", "wire", "world", "optim", "schedule", "device", "launch", "track")
"""The groups of the configuration, in the order in which they are shown."""
ROOMS = ("text", "models", "exchange", "exchange.wire", "world", "optim", "launch", "track")

# What an exchange asks its wire to carry, and what a wire can: whole sums; pieces of sums, a slice a rank; letters from
# one rank to another; or what the named library has a code for and moves by itself.
SUMS, PIECES, LETTERS, TORCH, HOROVOD = "sums", "pieces", "letters", "torch", "horovod"
LIBRARIES = (TORCH, HOROVOD)


@dataclass(frozen=True)
class ExchangeFacts:
    """
    carries: what its wire must be able to carry: SUMS, PIECES, LETTERS, TORCH or HOROVOD. One that leaves the sums to a
        library needs the world of that name.
    identical: are the replicas of all ranks bit-equal at every mark?
    local: do ranks, or groups of ranks, train on their own between meetings? Then no optimizer sees the sums.
    gradients: gradient vectors that a rank holds, 2 where one travels while the next is filled.
    shares_state: does each rank hold only its share of the optimizer's state?
    sums_per_update: sums that one optimizer step is made of.
    fresh_optimizer: does the optimizer begin anew within a run?
    buckets: does it read exchange.bucket_mb?
    clients: is the text dealt to clients (settings clients, alpha and sampled)?
    """

    carries: str = SUMS
    identical: bool = True
    local: bool = False
    gradients: int = 1
    shares_state: bool = False
    sums_per_update: int = 1
    fresh_optimizer: bool = False
    buckets: bool = True
    clients: bool = False


@dataclass(frozen=True)
class WireFacts:
    """
    carries: what it can carry, of SUMS, PIECES, LETTERS, TORCH and HOROVOD.
    exact: does what arrives equal what was sent?
    signs: does it send no magnitudes, so that second moments cannot be learnt from what arrives?
    hooked: do the libraries that have this code read the wire's settings?
    """

    carries: frozenset[str]
    exact: bool = False
    signs: bool = False
    hooked: bool = False


@dataclass(frozen=True)
class OptimizerFacts:
    """
    vectors: numbers that it keeps for each weight.
    linear: is its step linear in the gradient, like that of plain descent?
    second_moments: does it learn second moments? freezes: can it keep them as they are (optim.freeze_tokens)?
    """

    vectors: int
    linear: bool = False
    second_moments: bool = False
    freezes: bool = False


@dataclass(frozen=True)
class TransportFacts:
    """
    letters: under which launchers it carries letters between two ranks.
    logical: are its ranks threads of one process?
    """

    letters: tuple[str, ...] = ()
    logical: bool = False


@dataclass(frozen=True)
class LauncherFacts:
    """queues: does what it starts go on without the process that started it?"""

    queues: bool = False


@dataclass(frozen=True)
class TrackerFacts:
    """package: that must be installed; "": none."""

    package: str = ""


@dataclass(frozen=True)
class Part:
    """One entry. made: the implementation, as `module:name`, as a module, or as the object itself."""

    group: str
    name: str
    settings: type
    made: Any
    facts: Any


S = TypeVar("S")
_parts: dict[str, dict[str, Part]] = {}
_complete = False


def part(group: str, name: str, made: Any, facts: Any = None) -> Callable[[type[S]], type[S]]:
    """Registers the class of a part's settings. Raises UserError where the name is taken by another part."""

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


def parts(group: str) -> dict[str, Part]:
    """All parts of a group by name, in the order of their entries."""
    global _complete
    if not _complete:
        _complete = True
        for room in ROOMS:
            importlib.import_module(f"hvdllm.{room}.parts")
    return _parts[group]


def kinds(group: str) -> dict[str, type]:
    """The classes of settings of a group, by name; none where there is no such group."""
    return {name: part.settings for name, part in parts(group).items()} if group in GROUPS else {}


def all_kinds() -> dict[str, dict[str, type]]:
    """Those of all groups of the configuration."""
    return {group: kinds(group) for group in GROUPS}


def of(group: str, settings: object) -> Part:
    """The part whose settings these are. Raises TypeError for those of none."""
    for part in parts(group).values():
        if part.settings is type(settings):
            return part
    raise TypeError(f"no {group} has settings of the class {type(settings).__name__}: register it")


def name_of(group: str, settings: object) -> str:
    """`allreduce`, for the settings of that exchange."""
    return of(group, settings).name


def built(part: Part) -> Any:
    """The implementation of a part; imports it. Raises UserError where a plugin names what is not there."""
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


def load(modules: str | list[str] | None) -> None:
    """Imports a user's modules, which register parts. Each is found as Python finds it, or in the current folder, which
    is not searched for anything else. Raises UserError where one is not there, or fails."""
    for name in [modules] if isinstance(modules, str) else modules or []:
        if name in sys.modules:
            continue
        parts("exchange")  # so that a name which is taken is the plugin's fault
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
