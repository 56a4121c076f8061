"""What a setting is, with its type, default and description, and `Config`, which holds all settings of a run.

The settings of a part (an exchange, an optimizer, a launcher) are a dataclass in the part's own room, where they are
registered (registry.py). conf/ chooses among parts and gives presets. `hvdllm train --help` prints the descriptions.

Types are those that OmegaConf 2.3 can hold. It has no Literal and no Union, so a choice is a string with `choices`
beside it, and a setting that may be one path or several is Any.

A run's folder may be a stranger's, and `resume=FOLDER`, `hvdllm sample` and other commands read it. A setting with
`ours=True` is therefore never taken from a folder. Such settings say what is started, where and by whom, which files
are read and written, and which tracker and plugins are used. All others only shape numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hvdllm import faults
from hvdllm.errors import UserError

Several = Any  # one text or a list of them, since OmegaConf has no unions
Numbers = Several  # a list of whole numbers, or nothing
Named = Any  # a dict of values by name, or nothing
Chosen = Any  # the settings of the part that was chosen, since OmegaConf has no unions
LARGEST = 1e15
"""The bound of every number that has no tighter one: beyond it integers overflow somewhere, or a step never ends."""


def warmed_up(tokens: int | None, batch: float) -> float:
    """The committed tokens at which a warm-up ends: those of its setting, or 20 global batches of `batch` tokens if it
    is None. A number that suits one batch, or text, would outlast a run that counts images."""
    return 20 * batch if tokens is None else tokens


def several(value: Several) -> list[str]:
    """The texts of a setting that is null, one text or a list of them."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(one) for one in value]


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float = LARGEST,
    form: tuple[str, str] | None = None,
    ours: bool = False,
) -> Any:
    """A field of a settings class, with what can be checked without other settings.

    Args:
        default: its value if nothing else is said.
        doc: what `--help` says of it.
        choices: the values that it may have.
        least, most: its bounds.
        form: a regular expression that it, or each element of a list, must match, and what to give, in words.
        ours: whether only the user may choose it, and never a run's folder.
    """
    about = {"doc": doc, "choices": choices, "least": least, "most": most, "form": form, "ours": ours}
    return field(default=default, metadata=about)


S = TypeVar("S")


def made(kind: type[S], values: Mapping[str, object], where: str) -> S:
    """Settings of a class from plain values by name, checked as those of a command line. Others have their defaults.

    Raises UserError, which names the setting, if one is unknown or wrong by itself. `where` goes before its name.
    """
    hints, known = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"there is no setting {where}{key}{meant(key, list(known))}")
    return kind(**{key: checked(known[key], hints[key], value, f"{where}{key}") for key, value in values.items()})


def checked(f: dataclasses.Field[Any], hint: Any, value: Any, where: str) -> Any:
    """A plain value for a field of settings, as the field's type has it.

    Args:
        f: the field, made by `setting`.
        hint: its type.
        value: the value.
        where: the name of the setting, for the sentence.

    Raises UserError if the value is wrong by itself.
    """
    value = _of_type(value, hint, where)
    choices, least, form = (f.metadata.get(key) for key in ("choices", "least", "form"))
    if choices and value not in choices:
        raise UserError(f"{where}={value}: choose one of {', '.join(choices)}{meant(str(value), choices)}")
    if least is not None and value is not None and not value >= least:
        raise UserError(f"{where}={value} is too small: it must be at least {least:g}")
    if isinstance(value, int | float) and abs(value) > f.metadata.get("most", math.inf) and math.isfinite(value):
        raise UserError(f"{where}={value} is too large: it must be at most {f.metadata['most']:,.12g}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value} is not a finite number: give it one")
    if form is not None and value is not None:
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str) or not re.fullmatch(form[0], one):
                raise UserError(f"{where}={one}: give {form[1]}")
    return value


def _of_type(value: Any, hint: Any, where: str) -> Any:
    """The value, with a whole number as a float if a float is asked for. Raises UserError if it is of another type."""
    kinds = typing.get_args(hint) or (hint,)
    if hint is Any:
        _plain(value, where)
        return value
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} is too large a number") from None
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{where}={str(value)[:80]}: not a value of type {names}")
    return value


def _plain(value: object, where: str) -> None:
    """Raises UserError for values that no setting can have, such as a date or bytes."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _plain(one, where)
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise UserError(f"{where}={str(value)[:80]}: not a plain value")


def meant(word: str, names: Sequence[str]) -> str:
    """A hint such as `, did you mean acco?` if one of the names is similar to the word, else ""."""
    near = difflib.get_close_matches(word, names, 2, 0.6)
    return f", did you mean {' or '.join(near)}?" if near else ""


# Forms of values that go into command lines. None begins with a hyphen, holds a blank or means anything to a shell.
WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
HOST = rf"({WORD}@)?{WORD}:[0-9]+"
HOSTS = rf"{HOST}(,{HOST})*", "host:slots, several with commas between, in quotes"
ADDRESS = rf"auto|{WORD}:[0-9]{{1,5}}", "auto or HOST:PORT, such as 10.0.0.1:6379"
INTERFACE = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}"
INTERFACES = rf"{INTERFACE}(,{INTERFACE})*", "names of network interfaces, such as eth0 or ib0,ib1"
NAME = WORD, "a name of letters, digits and _ . + -"
NAMES = rf"{WORD}(,{WORD})*", "names of letters, digits and _ . + -, several with commas between"
MODULE = rf"{WORD}([/:@]{WORD})*", "environment modules such as openmpi/4.1"
MODULES = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*", "names of Python modules, such as [my_exchange]"
TIME = r"[0-9]+([:-][0-9]+)*|INFINITE|UNLIMITED", "a time as sbatch takes it, such as 2:00:00"
DIGEST = r"[0-9a-f]{64}", "the data hash that `hvdllm prepare` prints"


class Settings:
    """The base of the settings of all parts."""

    def refusal(self, setup: Setup) -> str | None:
        """Why these settings cannot work in this setup, in one sentence, or None if they can.

        An implementation imports nothing heavy, and asks for the facts of other parts (registry.py), never for their
        names.
        """
        return None


@dataclass(frozen=True)
class Setup:
    """What the checks of a part may depend on.

    Attributes:
        config: the whole configuration.
        ranks, local_ranks: how many ranks train together, and how many of them are on this host.
        launcher: what started them: none, horovodrun, torchrun, mpirun or srun.
        transport: what carries their bytes: single, horovod, torch or virtual.
    """

    config: Config
    ranks: int
    local_ranks: int
    launcher: str
    transport: str


@dataclass
class Device(Settings):
    """Where the model computes."""

    kind: str = setting(
        "auto",
        "auto (CUDA where there is one), cpu or cuda (one GPU a rank)",
        choices=("auto", "cpu", "cuda"),
    )
    threads: int | None = setting(
        None,
        "CPU threads a rank computes with; null: usable cores // ranks on this host. "
        "Two ranks that both take all cores run 20 times slower",
        least=1,
        most=1024,
    )
    share: bool = setting(
        False, "may several ranks compute on one GPU? They take turns, and many versions of NCCL refuse it themselves"
    )


@dataclass
class Debug(Settings):
    """Faults on purpose, to see what a run does then. They need debug=faults."""

    allow: bool = setting(False, "may this run be broken on purpose? debug=faults says so", ours=True)
    fault: str | None = setting(
        None,
        "what breaks: rank=1,step=20,phase=exchange,mode=stop, in quotes. Phases: start, data, forward, exchange, "
        "update, evaluation, save, shutdown; the step is the update that is then being made, as records count them, "
        "and start and shutdown have none. Modes: exception, kill, stop (SIGSTOP), hang (an endless loop), exit (with "
        "code 0, too early), memory (there is none left), disk (no file can grow beyond 4 KiB any more); null: nothing",
        ours=True,
    )

    def refusal(self, setup: Setup) -> str | None:
        if self.fault is None:
            return None
        if not self.allow:
            return "debug.fault without debug=faults: it breaks the run on purpose, so ask for both, or leave it out"
        try:
            fault = faults.parsed(self.fault)
        except UserError as error:
            return str(error)
        if setup.transport == "virtual":
            return "debug.fault with world=virtual: it breaks a process, and logical ranks share one; start real ranks"
        if fault.rank >= setup.ranks:
            return f"debug.fault={self.fault}: there is no rank {fault.rank}, the last one is {setup.ranks - 1}"
        return None


@dataclass
class Config:
    """All settings of a run. `*_tokens` and `*_every` count units that all ranks together have committed.

    Units are what the loss of the task is a sum over: tokens of text, images or clicks.
    """

    name: str | None = setting(None, "folder of the run under runs_dir; null: date-time and four hex digits", ours=True)
    runs_dir: str = setting("runs", "folder that holds the runs; shared by all hosts", ours=True)
    data_dir: str | None = setting(
        None, "folder of prepared token shards; null: hvdllm's folder in the user's cache", ours=True
    )
    seed: int = setting(0, "of weights, order of data, dropout and samples", least=0, most=2**63 - 1)
    resume: str = setting(
        "auto",
        "auto (go on if the run's folder has a checkpoint), never, must, or the path of a run to go on with",
        ours=True,
    )
    init_from: str | None = setting(
        None,
        "run folder, one of its checkpoints, or a folder of transformers (config.json and safetensors, which then "
        "decides the model), whose weights this run begins with instead of drawing them: a shared trunk makes "
        "comparisons sharper; null: draw them",
        ours=True,
    )
    init_optimizer: bool = setting(
        False, "also the optimizer's state of init_from, of the same optimizer; the schedule begins anew all the same"
    )
    budget_tokens: int = setting(
        1_200_000,
        "tokens to train on (or images, or clicks: what the task counts); rounded up to whole batches",
        least=1,
    )
    batch_tokens: int = setting(
        2048,
        "tokens an update (the global batch, whatever the world size), a multiple of model.context; images or clicks "
        "where the task counts these",
        least=1,
    )
    micro_batch: int = setting(
        16, "sequences a forward pass; as many as memory holds, has no effect on the result", least=1, most=10_000_000
    )
    eval_every: int = setting(400_000, "tokens between evaluations; 0: never, not even at the end", least=0)
    save_every: int = setting(
        400_000,
        "tokens between checkpoints; 0: never, not even at the end, but still when stopped by Ctrl-C or SIGTERM",
        least=0,
    )
    publish_every: int = setting(
        0, "tokens between publications of the weights, as published/latest in the run's folder; 0: never", least=0
    )
    sample_every: int = setting(400_000, "tokens between samples of text; 0: never, not even at the end", least=0)
    audit_every: int = setting(
        400_000,
        "tokens between audits, which compare the weights of all ranks bit by bit (or say how far apart they are, "
        "where the exchange does not promise equality); 0: never",
        least=0,
    )
    log_every: int = setting(20_000, "tokens between `commit` records; 0: never", least=0)
    keep: int = setting(2, "checkpoints kept; the older ones are deleted", least=1, most=1_000_000)
    eval_tokens: int = setting(65_536, "tokens of an evaluation, always the same first ones; 0: all", least=0)
    target_loss: float | None = setting(
        None,
        "validation loss, in nats a token, to which `hvdllm report` measures the way; named before the runs, so that "
        "no result chooses it; null: the best that all runs reached",
        least=1e-3,
    )
    trace_steps: str | None = setting(
        None, "steps first:last of which trace.json shows compute, flight and blocked time of every rank; null: none"
    )
    sample_prompt: str = setting("def ", "text that a sample continues")
    sample_tokens: int = setting(160, "tokens a sample has", least=1, most=1_000_000)
    precision: str = setting(
        "fp32",
        "fp32 (on GPUs without TF32, which has 10 bits of fp32's 23), bf16 (autocast; weights and sums stay fp32) or "
        "fp64 (for oracles)",
        choices=("fp32", "bf16", "fp64"),
    )
    hang_after: float | None = setting(
        60.0,
        "seconds after which a rank that stands still, while others wait for it, is named, with the stacks of all "
        "ranks in the run's folder; a phase that has taken long before, and a first step, may take longer; null: never",
        least=1,
        most=1e6,
    )
    on_hang: str = setting(
        "end", "what then happens: end (the job ends) or wait (it is told, and waited for)", choices=("end", "wait")
    )
    plugins: Several = setting(
        None,
        "modules of your own that register parts, one or a list; each is a package that Python finds, or a file "
        "MODULE.py in the folder where you start; null: none",
        form=MODULES,
        ours=True,
    )
    task: Chosen = setting(None, "what is learnt, and from which items")
    text: Chosen = setting(None, "where the text comes from")
    model: Chosen = setting(None, "what learns it")
    exchange: Chosen = setting(None, "how the gradients of the ranks meet")
    wire: Chosen = setting(None, "how a sum travels")
    world: Chosen = setting(None, "which processes train together", ours=True)
    optim: Chosen = setting(None, "what a summed gradient does to the weights")
    schedule: Chosen = setting(None, "the learning rate as a function of tokens")
    device: Chosen = setting(None, "where the model computes", ours=True)
    launch: Chosen = setting(None, "what starts the ranks", ours=True)
    track: Chosen = setting(None, "who else gets the records", ours=True)
    debug: Chosen = setting(None, "what breaks on purpose", ours=True)
