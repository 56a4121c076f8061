"""Writing a checkpoint, by all ranks that hold a part of it, so that a folder with its final name is whole.

checkpoints/<step>/
  rank-00000.safetensors  the tensors of this rank, by name and unpadded, so that any number of ranks can read them:
                            `model/<parameter>`, `m/<parameter>`, ...; a range is `m/<parameter>@<first element>`
                            `summed.<kind>/<parameter>`  what this rank adds to a sum (residuals)
                            `local.<kind>/<parameter>`   what belongs to this rank alone (its own weights)
                            `tensor/<name>`              any shape, equal on all ranks, in the file of rank 0
  state.json              plain values: shared ones, each rank's own, the position of the stream, those of the run
  manifest.json           the sha256 of the other files, written last

Everything is written into a hidden folder beside the final one, and every file is synced to the disk. Then rank 0
renames the folder. Three gathers keep the ranks together. The first says which ranks write; by then rank 0 has made the
folder. The second says what they wrote, and is left out if rank 0 alone writes. The third says whether rank 0 could
rename the folder. If anything fails, it fails on every rank with the same sentence, after the hidden folder was
removed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hvdllm import sums
from hvdllm.checkpoint.whole import MANIFEST, broken, steps
from hvdllm.errors import RunError
from hvdllm.exchange.base import State
from hvdllm.flat import Flat, Span
from hvdllm.plain import Json
from hvdllm.runs import no_longer_ours, sync_folder, write_whole
from hvdllm.world.base import World, first_problem

# safetensors reports a full disk in an error class of its own.
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)
# The checkpoints that this process has written. Their sums were made then, so they are not read again.
_WHOLE: set[Path] = set()
# A network file system may show another host's new folder late.
SEEN_WITHIN_S = 5.0


def write(
    folder: Path,
    flat: Flat,
    state: State,
    extra: Json,
    world: World,
    keep: int,
    mine: Json | None = None,
) -> Path | None:
    """Writes folder/checkpoints/<step> and deletes all but the newest `keep` whole checkpoints. Collective.

    Args:
        folder: of the run; that of rank 0 counts.
        flat: the map.
        state: of the exchange.
        extra: plain values of the run; those of rank 0 count.
        world: the ranks.
        keep: how many checkpoints are kept.
        mine: plain values of this rank, beside state.mine.

    Returns the path on rank 0, None elsewhere.

    Raises RunError on all ranks if the disk of any rank is full or refuses, or if a rank does not see the folder of
    rank 0. The checkpoints before are untouched then.
    """
    step = state.shared["step"]
    tensors = _named(flat, state, world.rank)
    final, beside = _places(folder, step)
    problem = None
    if world.rank == 0:
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.parent.mkdir(exist_ok=True)  # without parents: a run's folder that was removed is not made again
            beside.mkdir()
        except OSError as error:
            problem = _refused(folder, step, error)
    head: Json = {"problem": problem, "folder": str(folder.absolute()), "writes": bool(tensors)}
    head["mine"] = state.mine | (mine or {})
    heads = [json.loads(text) for text in world.texts(json.dumps(head), "act.save")]
    if heads[0]["problem"]:
        raise RunError(heads[0]["problem"], everywhere=True)
    if world.rank:
        folder = Path(heads[0]["folder"])
    written = [_write_own(folder, step, tensors, world.rank)]
    del tensors  # these are copies if the vectors live on a GPU
    if any(head["writes"] for head in heads[1:]):
        written = [json.loads(text) for text in world.texts(json.dumps(written[0]), "act.save.written")]
    if world.rank == 0:
        problem = first_problem([problem for problem, _ in written])
        if problem is None:
            values = {"shared": state.shared, "mine": [head["mine"] for head in heads], **extra}
            hashes = {_name(rank): sha256 for rank, (_, sha256) in enumerate(written) if sha256}
            problem = _finish(folder, step, values, hashes, keep)
        if problem:
            shutil.rmtree(beside, ignore_errors=True)
    if problem := world.texts(problem or "", "act.save.done")[0]:
        raise RunError(problem, everywhere=True)
    return final if world.rank == 0 else None


PUBLICATION = re.compile(r"(\d{15})(-\d+)?")  # the name of one: tokens, and a number where that name was taken


def write_final(folder: Path, flat: Flat, vector: torch.Tensor, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Writes final/model.safetensors, the weights to keep by parameter name, and its sum. No run is resumed from it.

    Args:
        folder: of the run.
        flat: the map.
        vector: the weights.
        tensors: what the model has beside them (its buffers), by name.

    Raises RunError if the disk refuses.
    """
    return _weights(folder, "final", flat, vector, tensors)


def publish(
    folder: Path, tokens: int, flat: Flat, vector: torch.Tensor, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """Writes published/TOKENS/model.safetensors, and makes the link published/latest lead there.

    The link leads to whole weights at any moment. The publication before stays, since somebody may be reading it, and
    others are deleted. If a life that was killed has published at as many tokens, the new folder is TOKENS-1.

    The arguments, and what is raised, are those of write_final.
    """
    outside = folder / "published"
    latest, beside = outside / "latest", outside / ".latest"
    try:
        outside.mkdir(exist_ok=True)
        before = os.readlink(latest) if latest.is_symlink() else None
        names = (f"{tokens:015}" + f"-{number}" * (number > 0) for number in itertools.count())
        free = next(name for name in names if not (outside / name).exists())
    except OSError as error:
        raise RunError(_unpublished(outside, error)) from None
    written = _weights(outside, free, flat, vector, tensors)
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(written.name)
        os.replace(beside, latest)
        sync_folder(outside)
        for old in outside.iterdir():
            if PUBLICATION.fullmatch(old.name.removeprefix(".")) and old.name not in (written.name, before):
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(_unpublished(outside, error)) from None
    return written


def _unpublished(outside: Path, error: OSError) -> str:
    return f"cannot write {outside} ({error}): free some space and start again: the last checkpoint is whole"


def _weights(
    folder: Path, name: str, flat: Flat, vector: torch.Tensor, tensors: dict[str, torch.Tensor] | None
) -> Path:
    """Writes a folder of this name with the weights and their sum, or leaves what was there before."""
    beside, final = folder / f".{name}", folder / name
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        named = {name: flat.view(name, vector).cpu().contiguous() for name in flat.at}
        save_file(named | _others(tensors or {}), beside / "model.safetensors")
        _sha256_synced(model := beside / "model.safetensors")
        write_whole(sums.beside(model), sums.line_for(model))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        sync_folder(folder)
    except DISK_ERRORS as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(
            f"cannot write {final} ({error}): free some space and start again: the last checkpoint is whole"
        ) from None
    return final


def prune(folder: Path, keep: int, written: Path) -> None:
    """Deletes all but the newest `keep` whole checkpoints.

    The manifest is deleted first, so that a checkpoint that is half deleted is not whole. Older checkpoints count only
    if they are whole; those that are not stay until enough newer ones are whole. A checkpoint with a higher number than
    `written` is damaged or not ours, since the run would have gone on from it otherwise. It neither counts nor is it
    deleted. Hidden folders are deleted: nothing is being written now, so they are left from a life of the run that was
    killed while it wrote.

    Args:
        folder: of the run.
        keep: how many checkpoints are kept.
        written: the newest one, which is whole because it has just been written.
    """
    _WHOLE.add(written.absolute())
    older = [path for path in steps(folder) if int(path.name) < int(written.name)]
    kept = 1
    while older and kept < keep:
        path = older.pop()
        kept += path.absolute() in _WHOLE or broken(path) is None
    for old in older:
        _WHOLE.discard(old.absolute())
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    for left in (folder / "checkpoints").glob(".[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)


def not_shared(path: Path) -> str:
    """The sentence of a rank that does not see what another rank wrote."""
    return (
        f"runs_dir must be shared by all hosts, because each rank keeps a part of the checkpoint: {path} is not there; "
        "give a runs_dir on a file system that all hosts have mounted at the same place"
    )


# ------------------------------------------------------------------ one rank's part
def _named(flat: Flat, state: State, rank: int) -> dict[str, torch.Tensor]:
    """The tensors that this rank writes, on the CPU, by their names in the file."""
    tensors: dict[str, torch.Tensor] = {}

    def add(kind: str, spans: list[Span], vector: torch.Tensor) -> None:
        for part in flat.cut(spans, vector):
            whole = part.start == 0 and part.values.numel() == flat.parameters[part.name].numel()
            key = f"{kind}/{part.name}" + ("" if whole else f"@{part.start}")
            values = part.values.view(flat.parameters[part.name].shape) if whole else part.values
            tensors[key] = values.detach().cpu().contiguous()

    for kind, vector in state.sharded.items():
        add(kind, state.spans, vector)
    for kind, (spans, vector) in state.summed.items():
        add(f"summed.{kind}", spans, vector)
    for kind, (spans, vector) in state.local.items():
        add(f"local.{kind}", spans, vector)
    if rank == 0:  # cloned, because the file format does not take two names for the same memory
        tensors |= _others(state.tensors)
    return tensors


def _others(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"tensor/{name}": x.detach().cpu().contiguous().clone() for name, x in tensors.items()}


def _write_own(folder: Path, step: int, tensors: dict[str, torch.Tensor], rank: int) -> tuple[str, str]:
    """Writes the file of this rank, if there is anything to write.

    Returns what was wrong, and the hash of the file. Each may be "".
    """
    if not tensors:
        return "", ""
    beside = _places(folder, step)[1]
    end = time.monotonic() + SEEN_WITHIN_S
    while not beside.is_dir():
        if time.monotonic() > end:
            return not_shared(beside), ""
        time.sleep(0.05)
    try:
        save_file(tensors, beside / _name(rank))
        return "", _sha256_synced(beside / _name(rank))
    except DISK_ERRORS as error:
        return _refused(folder, step, error), ""


def _finish(folder: Path, step: int, values: Json, hashes: dict[str, str], keep: int) -> str | None:
    """On rank 0: writes the plain values and the manifest, and gives the folder its final name.

    Returns what was wrong, or None.
    """
    final, beside = _places(folder, step)
    aside = beside.with_name(f".{step}.old")
    for name in hashes:
        if not (beside / name).exists():  # it was written on another host, into a folder of the same name
            return not_shared(beside / name)
    try:
        write_whole(beside / "state.json", json.dumps(values))
        manifest = {**hashes, "state.json": _sha256_synced(beside / "state.json")}
        write_whole(beside / MANIFEST, json.dumps({"sha256": manifest}, indent=1))
        shutil.rmtree(aside, ignore_errors=True)  # left from a life of the run that was killed between the renames
        if final.exists():  # it is broken, or from an earlier life: two renames put the new one in its place
            os.replace(final, aside)
        os.replace(beside, final)
        sync_folder(final.parent)
        prune(folder, keep, final)
    except DISK_ERRORS as error:
        return _refused(folder, step, error)
    return None


def _places(folder: Path, step: int) -> tuple[Path, Path]:
    """The final name of a checkpoint's folder, and the hidden one that it is written to."""
    return folder / "checkpoints" / str(step), folder / "checkpoints" / f".{step}"


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _refused(folder: Path, step: int, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and not (folder / "config.yaml").exists():
        return no_longer_ours(folder)
    return (
        f"cannot write the checkpoint of step {step} to {folder} ({error}): free some space and start again with "
        "the same name; the checkpoints before it are whole"
    )


def _sha256_synced(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
