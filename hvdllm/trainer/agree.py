"""What the ranks must agree on before they train: the folder, the device, the text, the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace

import torch

from hvdllm import device as devices
from hvdllm import pulse, registry
from hvdllm.config.check import check_batch
from hvdllm.errors import UserError
from hvdllm.exchange import base
from hvdllm.flat import Flat
from hvdllm.lock import Lock
from hvdllm.models import size
from hvdllm.plain import Json
from hvdllm.runs import new_name
from hvdllm.settings import Config
from hvdllm.task.base import DTYPES, Kind, Prepared, Task
from hvdllm.trainer.assemble import make_stream
from hvdllm.trainer.audit import fingerprint
from hvdllm.trainer.resume import Start, decide, folder_of
from hvdllm.trainer.show import Show
from hvdllm.world.base import World, first_problem, from_first
from hvdllm.world.single import SingleWorld


def agreed_start(config: Config, world: World, show: Show, held: ExitStack) -> tuple[Start, Lock | None]:
    """Rank 0 decides how the run starts, and every rank learns it. Collective.

    Returns the decision and, on rank 0, the lock of the run's folder. `held` releases the lock when it closes.

    Raises UserError on every rank if the run cannot start.
    """
    named = replace(config, name=config.name or new_name())
    lock: Lock | None = None

    def first() -> Json:
        nonlocal lock
        try:
            lock = held.enter_context(closing(Lock(folder_of(named))))
        except UserError:
            with suppress(UserError):  # a finished run needs no lock, and its folder may be read-only
                if (start := decide(named, lambda text: None)).finished:
                    return asdict(start)
            raise
        return asdict(decide(named, show.say))

    return Start(**from_first(world, first, "start.folder")), lock


def agreed_device(config: Config, world: World, say: Callable[[str], None]) -> torch.device:
    """The device of this rank. Collective.

    Raises UserError on every rank if some ranks have a GPU and others do not, or if two ranks share one without leave.
    """
    device, problem, asked = torch.device("cpu"), "", config.device
    logical = config.world.kind == "virtual"  # such ranks share one device
    try:
        local_rank = 0 if logical else world.local_rank
        device = devices.choose(asked.kind, local_rank, share=asked.share, no_cuda=world.no_cuda)
    except UserError as error:
        problem = str(error)
    said = [json.loads(text) for text in world.texts(json.dumps([problem, devices.gpu(device)]), "start.device")]
    gpus = [gpu for _, gpu in said]
    if (first := first_problem([problem for problem, _ in said])) is None and not logical:
        first = wrong_gpus(gpus, asked.share)
    if first is not None:
        raise UserError(first)
    if world.no_cuda and asked.kind == "auto" and torch.cuda.is_available():
        say(f"{world.no_cuda}, so this run computes on the CPU")
    return device


def wrong_gpus(gpus: list[str], share: bool) -> str | None:
    """What is wrong with the choice of GPUs, or None.

    Args:
        gpus: what identifies the GPU of each rank, "" if the rank computes on a CPU.
        share: whether several ranks may use one GPU.
    """
    without = [rank for rank, gpu in enumerate(gpus) if not gpu]
    if without and any(gpus):
        return (
            f"rank {without[0]} has no GPU and rank {next(r for r, gpu in enumerate(gpus) if gpu)} has one, so their "
            "gradients cannot meet: give all ranks GPUs, or take device=cpu"
        )
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank] and not share:
            return (
                f"ranks {gpus.index(gpu)} and {rank} compute on one GPU ({gpu}): start at most one rank a GPU, or "
                "allow it with device.share=true"
            )
    return None


def agreed_room(config: Config, task: Task | None, device: torch.device, world: World) -> None:
    """Raises UserError on every rank if the task's model cannot fit into the memory of some host or GPU. Collective."""
    if task is None:
        return
    # Ranks of one host share its memory, and so do logical ranks, which are all in this process.
    together = world.local_size if device.type == "cpu" or config.device.share else 1
    parameters, number = task.parameters, DTYPES[config.precision].itemsize
    dense = parameters - task.tables  # the rest has no gradients of its size, nor an optimizer with as many numbers
    needs = (
        size.least_memory(config, dense, task.activations, world.size, task.frozen) + task.tables * number
    ) * together
    there = devices.usable_memory(device)
    problem = None
    if there is not None and needs > there:
        of = f"{together} ranks" if together > 1 else "a rank"
        problem = (
            f"this model has {parameters / 1e6:,.1f} M parameters, and {of} of it with "
            f"gradients, optimizer and one micro-batch would take at least {needs / 2**30:,.1f} GiB of the "
            f"{there / 2**30:,.1f} GiB that are free here: take a smaller model or micro_batch, fewer ranks on a host, "
            "or another optimizer or exchange"
        )
    world.agree(problem, "start.room")


@pulse.during("preparing data")
def agreed_data(config: Config, kind: Kind, start: Start, world: World, show: Show) -> Prepared:
    """The prepared data, which are the same on all ranks. The first rank of each host prepares what is missing.

    Collective. Raises UserError on every rank if the data cannot be prepared, or if they differ between ranks.
    """
    data, problem = None, None
    for turn in (True, False):
        if (world.local_rank == 0) == turn:
            try:
                data = kind.prepare(config, say=show.say, whole=turn, wanted=start.data_hash)
                check_data(config, data, world.size)
            except UserError as error:
                problem = str(error)
        world.agree(problem, f"start.text.{int(turn)}")
    assert data is not None
    if len(set(world.texts(data.data_hash, "start.data"))) > 1:
        raise UserError(
            "the ranks have different text or tokenizers (text=stdlib differs between Python versions): prepare it "
            "once into a data_dir that all hosts share, or give all hosts the same files"
        )
    return data


def check_data(config: Config, data: Prepared, ranks: int) -> None:
    """Checks the settings that depend on the data. Raises UserError if they do not fit it."""
    if config.task.units(config) is None:
        check_batch(config, ranks, data.train.units)
    if config.text.endless:
        return  # nothing has arrived yet
    clients_without_text(config, make_stream(config, data.train, torch.device("cpu"), SingleWorld()))
    if config.eval_every and not len(data.validation):
        raise UserError(data.validation.too_few(0))


def clients_without_text(config: Config, stream: base.Stream) -> list[str]:
    """A note about clients that have no text, or nothing if all have some.

    Raises UserError if a round would draw more clients than have text.
    """
    asked = config.exchange
    if not registry.of("exchange", asked).facts.clients:
        return []
    tokens, deals = stream.clients(asked.clients, asked.alpha).tokens, registry.of("task", config.task).facts
    known = sum(count > 0 for count in tokens)
    if known < (asked.sampled or 1):
        raise UserError(
            f"exchange.sampled={asked.sampled}: only {known} of the {asked.clients} clients have any {deals.items}; "
            f"give exchange.sampled={known}, fewer clients, or a larger exchange.alpha"
        )
    if known == len(tokens):
        return []
    return [
        f"{len(tokens) - known} of {len(tokens)} clients have no {deals.items} and are never drawn; the others have "
        f"{min(count for count in tokens if count):,} to {max(tokens):,} {deals.unit}"
    ]


def agree_on_weights(flat: Flat, world: World, frozen: Iterable[torch.Tensor] = ()) -> None:
    """Checks that all ranks have the same weights, bit for bit. Collective. Raises UserError if they differ.

    Args:
        flat: the weights that are trained.
        world: the ranks.
        frozen: those that are not.
    """
    own = hashlib.sha256(json.dumps(fingerprint(flat).tolist()).encode())
    for weight in frozen:
        own.update(weight.detach().cpu().contiguous().numpy().data)
    prints = world.texts(own.hexdigest(), "start.weights")
    if len(set(prints)) > 1:
        raise UserError("the ranks drew different weights from the same seed: they need the same versions of torch")
