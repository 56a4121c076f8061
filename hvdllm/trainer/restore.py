"""Loads the model of a finished or stopped run, to sample from it or to evaluate it on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from hvdllm import device as devices
from hvdllm import runs, sums, untrusted
from hvdllm.checkpoint import read
from hvdllm.errors import UserError
from hvdllm.flat import Flat
from hvdllm.models import size
from hvdllm.models.gpt import GPT
from hvdllm.models.size import check_model
from hvdllm.settings import Config
from hvdllm.text.tokenize import Tokenizer
from hvdllm.trainer.assemble import DTYPES, build_model


@dataclass(frozen=True)
class Restored:
    """A model that was read from a run.

    Attributes:
        config: the settings of the run.
        tokenizer: of the run.
        model: with its weights, on the device.
        device: where it lies.
        source: the folder that the weights were read from.
    """

    config: Config
    tokenizer: Tokenizer
    model: GPT
    device: torch.device
    source: Path


def restore(folder: Path, step: int | None, say: runs.Say) -> Restored:
    """Loads the model from a checkpoint, or from final/ if the folder has no checkpoints.

    Args:
        folder: of the run.
        step: which checkpoint to read, or None for the newest whole one.
        say: is told of damage that was found on the way.

    Raises UserError if there is nothing to read, or if the files are not what was written.
    """
    config = runs.read_config(folder, say)
    check_model(config.model)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", folder, runs.tokenizer_sum(folder))
    if step is None:
        source = read.newest(folder, say)
    else:
        source = folder / "checkpoints" / str(step)
        if problem := read.broken(source):
            have = ", ".join(path.name for path in read.steps(folder)) or "none"
            raise UserError(f"{source} cannot be read ({problem}); the checkpoints of this run are of step: {have}")
    final = folder / "final"
    if source is None and not (final / "model.safetensors").exists():
        raise UserError(f"{folder} has no whole checkpoint and no final/: train it for longer, or copy it again")
    if source is None:
        check_final(final, say)
    size.check_vocab(config.model, tokenizer.vocab)
    vocab = size.rows(config.model, tokenizer.vocab)
    # Checked before a model is made, which would be as large as the settings say.
    if (there := read.count_weights(source or final)) != (asked := size.count_parameters(config.model, vocab)):
        raise UserError(
            f"{source or final} has {there:,} weights and {folder}/config.yaml describes a model of {asked:,}: one of "
            "them was changed, copy the folder again"
        )
    device = devices.choose("auto" if config.precision != "fp64" else "cpu", 0)
    torch.set_num_threads(devices.usable_cores())
    config.model.compile = False
    model = build_model(config, tokenizer.vocab, torch.device("cpu"))
    flat = Flat(model, 1, math.inf)
    read.read_vector(source or final, "model" if source else "", flat, flat.x)
    return Restored(config, tokenizer, model.to(device, DTYPES[config.precision]), device, source or final)


def check_final(final: Path, say: runs.Say) -> None:
    """Raises UserError if final/ is not what was written, and tells the user if there is no sum to check it with."""
    model = final / "model.safetensors"
    try:
        problem = sums.changed(model, final)
    except (OSError, untrusted.Unfit) as error:
        problem = f"one of its files {error}"
    if problem:
        raise UserError(f"{final} cannot be read: {problem}; copy it again")
    if not sums.beside(model).exists():
        say(f"{model} has no sum, it is of an older version: damage to it would go unseen")
