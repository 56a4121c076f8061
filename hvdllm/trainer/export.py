"""Writes the model of a run as a folder of transformers, which its AutoModel classes and AutoTokenizer load.

The folder is written under another name beside its place and then renamed, so that it is whole or not there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from hvdllm import __version__, untrusted
from hvdllm.checkpoint.hugging import INDEX, WHOLE
from hvdllm.checkpoint.write import DISK_ERRORS
from hvdllm.errors import RunError, UserError
from hvdllm.models import hugging
from hvdllm.models.bert import Bert
from hvdllm.models.gpt import GPT
from hvdllm.models.lora import write_adapter
from hvdllm.runs import sync_folder
from hvdllm.task.causal_lm import CausalLM
from hvdllm.text.tokenize import Tokenizer
from hvdllm.trainer.restore import Language, Restored

MOST_SHARD = 4 * 2**30  # bytes of a file of tensors, which safetensors copies in memory as it writes
OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def export(found: Restored, out: Path, positions: int | None = None) -> str:
    """Writes a folder of transformers.

    Args:
        found: a model of text, with its task.
        out: the folder. One that an earlier export wrote is replaced.
        positions: the most tokens that the folder says a sequence may have; None: model.context. Learned positions have
            no others.

    Returns the name of the class that loads it.

    Raises UserError if transformers has no such model, or if something else is at `out`, and RunError if the disk
    refuses.
    """
    model, settings = found.model, found.config.model
    if not (isinstance(model, GPT | Bert) and isinstance(found.task, CausalLM)):
        raise UserError(f"{found.source} has learnt no language, and hvdllm exports models of text alone")
    tokenizer, encoder = found.task.words, isinstance(model, Bert)
    positions = positions or settings.context
    learned = encoder or settings.positions == "learned"
    if learned and positions != settings.context:
        raise UserError(f"--positions {positions}: the model has learnt {settings.context} positions (model.context)")
    if not learned and positions < settings.context:
        raise UserError(f"--positions {positions}: the model was trained on {settings.context} (model.context)")
    rows = len(model.embed.weight)
    config = hugging.config_of(settings, rows, positions) | ends(tokenizer)
    spelled, mask = tokenizer.with_mask() if encoder else (tokenizer.for_others(), None)
    config["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    refuse_others(out)
    with written(out) as part:
        write_tensors(part, list(tensors(model, config["model_type"], rows, positions)))
        files = {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **dict.fromkeys(("bos_token", "eos_token"), tokenizer.end_text),
                **({"mask_token": mask} if mask else {}),
                "model_max_length": positions,
                "clean_up_tokenization_spaces": False,
            },
            "generation_config.json": ends(tokenizer),
            hugging.CONFIG: config | {hugging.BY: f"hvdllm {__version__}"},
        }
        (part / "tokenizer.json").write_text(spelled, encoding="utf-8", newline="")
        for name, values in files.items():
            (part / name).write_text(json.dumps(values, indent=2) + "\n")
    return hugging.CLASSES[config["model_type"]]


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """A context in which a folder is written under the name that it yields. At its end it is put in its place.

    Raises RunError if the disk refuses; nothing of it is left then.
    """
    part = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        part.mkdir(parents=True)
        yield part
        usual = next(part.glob("*.json")).stat().st_mode
        for file in part.iterdir():
            file.chmod(usual)  # safetensors are written for their owner alone
        replace(part, out)
    except DISK_ERRORS as error:
        raise RunError(
            f"cannot write {out} ({error}): free some space or choose another folder, and export again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export_adapter(found: Language, out: Path) -> None:
    """Writes the adapters of a run in peft's format. Raises UserError if it has none, or if something is at `out`."""
    if os.path.lexists(out):
        raise UserError(f"{out} is there already: give a folder that is not")
    with written(out) as part:
        write_adapter(part, found.model, found.config.init_from)


def ends(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids between documents, with which a text also begins."""
    return {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}


def tensors(model: GPT | Bert, kind: str, rows: int, positions: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model by transformers' names, on the CPU."""
    parameters = dict(model.named_parameters())
    for source in hugging.sources(kind, model.settings, rows, positions):
        values = parameters[source.name].detach()[source.start : source.stop].cpu()
        if source.added:  # it is in ours already
            values = torch.zeros(source.shape, dtype=values.dtype)
        yield source.key, (values.T if source.transposed else values).contiguous()


def write_tensors(folder: Path, whole: list[tuple[str, torch.Tensor]]) -> None:
    """Writes model.safetensors, or several files and their index if it would have more than MOST_SHARD bytes."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, values in whole:
        if shards[-1] and size + values.nbytes > MOST_SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = values
        size += values.nbytes
    names = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WHOLE]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(values.nbytes for _, values in whole)
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def refuse_others(out: Path) -> None:
    """Raises UserError if there is something at a place that an export did not write."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink():
        names = {file.name for file in out.iterdir()}
        ours = {hugging.CONFIG, INDEX, *OTHERS}
        if all(name in ours or name.endswith(".safetensors") for name in names):
            if not names:
                return
            try:
                config = untrusted.read_json(out / hugging.CONFIG, hugging.MOST_CONFIG, out)
                if isinstance(config, dict) and hugging.BY in config:
                    return
            except (OSError, untrusted.Unfit):
                pass
    raise UserError(f"{out} is there and was not written by hvdllm export: choose another folder, or delete it")


def replace(part: Path, out: Path) -> None:
    """Puts the folder in its place. What an earlier export wrote there is removed once the new one is there."""
    aside = part.with_name(f"{part.name}.old")
    if out.exists():
        os.replace(out, aside)
    os.replace(part, out)
    sync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
