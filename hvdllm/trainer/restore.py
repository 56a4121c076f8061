"""Loads the model of a finished or stopped run, to sample from it or to evaluate it on this machine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hvdllm import device as devices
from hvdllm import registry, runs, sums, untrusted
from hvdllm.checkpoint import read
from hvdllm.checkpoint.whole import MANIFEST, read_state
from hvdllm.config.check import check_model
from hvdllm.errors import UserError
from hvdllm.flat import Flat
from hvdllm.models.gpt import GPT
from hvdllm.online.log import Log
from hvdllm.online.opened import FOLDER, layout_of
from hvdllm.online.rounds import Rounds
from hvdllm.online.windows import OF_SLICE, LogItems, slices_of
from hvdllm.settings import Config
from hvdllm.task.base import DTYPES, Kind, Prepared, Task
from hvdllm.task.causal_lm import CausalLM
from hvdllm.text.tokenize import Tokenizer
from hvdllm.trainer import buffers, frozen
from hvdllm.trainer.assemble import build_model


@dataclass(frozen=True)
class Restored:
    """A model that was read from a run.

    Attributes:
        config: the settings of the run.
        task: of the run.
        model: with its weights, on the device.
        device: where it lies.
        source: the folder that the weights were read from.
    """

    config: Config
    task: Task
    model: nn.Module
    device: torch.device
    source: Path


@dataclass(frozen=True)
class Language(Restored):
    """A model that writes text.

    Attributes:
        task: the next token, over the run's vocabulary.
        model: the transformer.
        tokenizer: of the run.
    """

    task: CausalLM

    model: GPT
    tokenizer: Tokenizer


def language(found: Restored) -> Language:
    """The same, if the model writes text. Raises UserError if it has learnt anything else."""
    writes = registry.of("task", found.config.task).facts.writes
    if not (writes and isinstance(found.task, CausalLM) and isinstance(found.model, GPT)):
        raise UserError(f"{found.source} has learnt no language, so there is no text that it could go on with")
    return Language(found.config, found.task, found.model, found.device, found.source, found.task.words)


def restore(folder: Path, step: int | None, say: runs.Say, published: Path | None = None) -> Restored:
    """Loads the model from a checkpoint, or from final/ if the folder has no checkpoints.

    Args:
        folder: of the run.
        step: which checkpoint to read, or None for the newest whole one.
        say: is told of damage that was found on the way.
        published: a publication of the run, which is read in place of them.

    Raises UserError if there is nothing to read, or if the files are not what was written.
    """
    config = runs.read_config(folder, say)
    check_model(config)
    part = registry.of("task", config.task)
    if part.made is None:
        raise UserError(
            f"{folder} is of a model of your own, which hvdllm.Session trained: load final/model.safetensors into it"
        )
    kind: Kind = registry.built(part)
    task = kind.restore(config, folder)
    source = None
    if published is not None:
        try:
            untrusted.within(published, folder)
        except (OSError, untrusted.Unfit) as error:
            raise UserError(f"{published} cannot be read ({error}): copy the run's folder again") from None
    elif step is None:
        source = read.newest(folder, say)
    else:
        source = folder / "checkpoints" / str(step)
        if problem := read.broken(source):
            have = ", ".join(path.name for path in read.steps(folder)) or "none"
            raise UserError(f"{source} cannot be read ({problem}); the checkpoints of this run are of step: {have}")
    final = published or folder / "final"
    if source is None and not (final / "model.safetensors").exists():
        raise UserError(f"{folder} has no whole checkpoint and no final/: train it for longer, or copy it again")
    if source is None:
        check_final(final, say)
    # Checked before a model is made, which would be as large as the settings say.
    if (there := read.count_weights(source or final)) != (asked := task.parameters - task.frozen):
        raise UserError(
            f"{source or final} has {there:,} weights and {folder}/config.yaml describes a model of {asked:,}: one of "
            "them was changed, copy the folder again"
        )
    device = devices.choose("auto" if config.precision != "fp64" else "cpu", 0)
    torch.set_num_threads(devices.usable_cores())
    config.model.compile = False
    model = build_model(task, torch.device("cpu"))
    flat = Flat(model, 1, math.inf)
    read.read_vector(source or final, "model" if source else "", flat, flat.x)
    frozen.load(folder, model)
    buffers.load(model, read.read_tensors(source or final), str(source or final), optimizer=False)
    return Restored(config, task, model.to(device, DTYPES[config.precision]), device, source or final)


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


def read_again(config: Config, task: CausalLM, folder: Path, source: Path, path: Path | None) -> Prepared:
    """The held-out slices that a run on a stream evaluates at one of its checkpoints, if any was whole there.

    Args:
        config: the settings of the run.
        task: of the run.
        folder: of the run.
        source: the checkpoint, or final/, for which the slices are those of the last evaluation.
        path: the log, if it is not the run's own.

    Raises UserError if there is no log, or if it ends before the checkpoint.
    """
    log, layout = Log(path or folder / FOLDER, np.dtype(task.words.dtype)), layout_of(config)
    if not log.refresh():
        raise UserError(f"{log.folder} holds no text: give text.path= with the log that {folder} was trained on")
    whole = 0
    if (source / MANIFEST).exists():
        rounds = Rounds(folder / FOLDER)
        with read.fitting(source):
            state = read_state(source)
            lanes = state["mine"][0].get("lanes")
            number = int(lanes["lane"][1] if lanes else state["stream"]["part"] // state["stream"]["parts"])
        whole = layout.place(rounds.get(number - 1) if number else None) // layout.slice
    else:
        for record in runs.records(folder):
            if record.get("kind") == "eval":
                found = (re.fullmatch(OF_SLICE + r"(\d{1,9})", key) for key in record)
                whole = max((int(each[1]) + 1 for each in found if each), default=0)
    if whole > layout.slices(log.last.tokens):
        raise UserError(f"{log.folder} ends before {source}: give text.path= with the whole log, or copy it again")
    items = LogItems(log, config.model.context, task.words.token_bytes)
    sources = slices_of(items, layout, whole, task)
    return Prepared(task, items, items, "", f"the log {log.folder}", sources=lambda world: sources)
