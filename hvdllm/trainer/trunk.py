"""`init_from`: a new run begins with the weights of another (its trunk), whatever its exchange, rate, budget or data.

Only weights come along, and the optimizer's state where `init_optimizer` asks for it; tokens, schedule, order of data,
residuals and what flew begin anew. Runs that share a trunk differ by what is compared alone: the noise of the first,
steepest part of training is the same in all of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvdllm import registry, runs, sums, untrusted
from hvdllm.checkpoint import read
from hvdllm.errors import UserError
from hvdllm.exchange.base import Exchange
from hvdllm.flat import Flat
from hvdllm.settings import Config
from hvdllm.world.base import World, from_first


@dataclasses.dataclass(frozen=True)
class Trunk:
    """path: of the checkpoint or the final/. tokens: that the trunk had committed there, None for a final/. steps: of
    its optimizer."""

    path: str
    tokens: int | None
    steps: int


def begin(config: Config, tokenizer_hash: str, exchange: Exchange, flat: Flat, world: World, say: runs.Say) -> Trunk:
    """Loads weights (and optimizer) into an attached exchange that has not trained yet. Collective.

    Raises UserError, on every rank, where the trunk has another tokenizer, model or optimizer, or is not whole.
    """
    try:
        found = from_first(world, lambda: dataclasses.asdict(find(config, tokenizer_hash, say)), "start.trunk")
    except UserError as error:
        raise UserError(f"init_from={config.init_from}: {error}") from None
    trunk = Trunk(**found)
    path, kinds = Path(trunk.path), exchange.update.state()[1] if config.init_optimizer else ()
    model = read.share_vector(path, "model" if trunk.tokens is not None else "", flat, world)
    exchange.start(model, {kind: read.share_vector(path, kind, flat, world) for kind in kinds}, trunk.steps)
    return trunk


def find(config: Config, tokenizer_hash: str, say: runs.Say) -> Trunk:
    """Where the weights are. A run: its newest whole checkpoint, else its final/. Raises UserError."""
    path = Path(config.init_from or "").expanduser()
    if (path / "manifest.json").exists():
        folder, source = path.absolute().parents[1], path
        if problem := read.broken(path):
            raise UserError(f"that checkpoint cannot be read ({problem}): take another of its run")
    elif (path / "config.yaml").exists():
        folder, newest = path, read.newest(path, say)
        source = newest or path / "final"
    elif (path / "model.safetensors").exists():
        folder, source = path.absolute().parent, path
    else:
        raise UserError("there is no run and no checkpoint: give a run's folder, or a folder of its checkpoints/")
    whole = (source / "manifest.json").exists()
    if not whole and not (source / "model.safetensors").exists():
        raise UserError("that run has no whole checkpoint and no final/: train it for longer")
    try:
        if not whole and (problem := sums.changed(source / "model.safetensors", source)):
            raise UserError(f"its final/ cannot be read ({problem}): copy it again")
        tokenizer = sums.of_file(folder / "tokenizer.json", folder)
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"its tokenizer.json cannot be read ({error}): copy the whole folder") from None
    if tokenizer != tokenizer_hash:
        raise UserError(
            "its tokenizer is not that of this text, so its tokens mean other things: give "
            f"text.tokenizer={folder}/tokenizer.json"
        )
    state = read.read_state(source) if whole else {}
    if config.init_optimizer:
        if not whole:
            raise UserError("there is no optimizer in final/: give a checkpoint, or init_optimizer=false")
        theirs, ours = (registry.name_of("optim", c.optim) for c in (runs.read_config(folder), config))
        if theirs != ours:
            raise UserError(f"its optimizer is {theirs}, not {ours}: give optim={theirs}, or init_optimizer=false")
        if not isinstance(state["shared"].get("steps"), int):
            raise UserError(
                "its ranks have an optimizer each (local steps), there is none for all: init_optimizer=false"
            )
    shared = state.get("shared", {})
    tokens, steps = read.tokens_of(state, source) if whole else None, shared.get("steps")
    return Trunk(str(source), tokens, steps if isinstance(steps, int) else 0)
