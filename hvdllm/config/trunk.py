"""What `init_from` says about the other settings: a folder of transformers decides the model that its weights make."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from hvdllm.errors import UserError
from hvdllm.models import hugging
from hvdllm.models.hugging import Settings
from hvdllm.plain import Json
from hvdllm.settings import Config

ADAPTER = "adapter_config.json"


def begin_with(config: Config, given: dict[str, str], model_of: Callable[[type[Settings], Json], Settings]) -> None:
    """Changes a composed configuration in place if the run begins with weights from a folder of transformers.

    The folder's config.json decides the settings of the model that shape its weights, and its tokenizer.json is the
    tokenizer if no word names another or a prepared text. For any other folder nothing is changed: trainer/trunk.py
    reads those of runs.

    Args:
        config: the settings. What is wrong with the path in init_from is said by check.py.
        given: the words of the command line, by key.
        model_of: the settings of a model, of a class and from values by name, checked.

    Raises UserError if a word says something else than the folder.
    """
    folder = Path(os.path.expanduser(str(config.init_from)))
    if os.path.exists(folder / ADAPTER):  # False for a path that no file system takes
        raise UserError(
            f"init_from={config.init_from} has adapters in PEFT's format ({ADAPTER}), which need their base: load both "
            "there, and begin with what merge_and_unload() and save_pretrained() write"
        )
    if not hugging.is_folder(folder):
        return
    where = f"init_from={config.init_from}"
    try:
        found = hugging.described(folder)
        if type(config.model) is not found.model:
            task = "masked_lm" if found.kind == "bert" else "causal_lm"
            raise UserError(f"it is a folder of transformers with a {found.kind}, which task={task} trains: give that")
        model = model_of(found.model, dataclasses.asdict(config.model) | found.settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    asked = given_settings(given, found.model)
    _refuse_others(where, config.model, model, found.settings.keys() & asked)
    if model.context > found.positions:
        if "context" in asked:
            raise UserError(
                f"model.context={model.context} is more than the {found.positions} tokens of {where} ({found.why} in "
                "its config.json): give at most so many"
            )
        model.context = found.positions
    config.model = model
    if not given.keys() & {"text.tokenizer", "text.prepared"}:
        if not (folder / hugging.TOKENIZER).exists():
            raise UserError(
                f"{where} has no {hugging.TOKENIZER}: save its tokenizer there with save_pretrained, or give "
                "text.tokenizer="
            )
        config.text.tokenizer = str(Path(str(config.init_from)) / hugging.TOKENIZER)


def given_settings(given: dict[str, str], model: type[Settings]) -> set[str]:
    """The settings of the model that words of a command line give: all of them if one names a preset."""
    if "model" in given:
        return {f.name for f in dataclasses.fields(model)}
    return {key.removeprefix("model.") for key in given if key.startswith("model.")}


def _refuse_others(where: str, asked: Settings, says: Settings, names: set[str]) -> None:
    """Raises UserError if one of these settings was asked for and is not what a folder says."""
    left, right = hugging.meaning(asked), hugging.meaning(says)
    for name in sorted(names & left.keys() & right.keys()):
        if left[name] != right[name]:
            raise UserError(
                f"model.{name}={hugging.shown(left[name])} is not what the config.json of {where} says, "
                f"{hugging.shown(right[name])}: leave model= and model.{name}= out, the folder decides them"
            )
