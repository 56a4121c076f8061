"""`init_from`: a new run begins with the weights of another run (its trunk), which may have other settings.

The trunk may also be a folder of transformers, from which composing has taken the settings of the model.

Only the weights are taken, and the optimizer's state if `init_optimizer` asks for it. Committed tokens, schedule, order
of data, residuals and sums in flight begin anew. Runs that share a trunk differ only in what is compared, because the
noise of the first, steepest part of training is the same in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hvdllm import registry, runs, sums, untrusted
from hvdllm.checkpoint import hugging, read
from hvdllm.checkpoint.whole import read_state
from hvdllm.errors import UserError
from hvdllm.exchange.base import Exchange
from hvdllm.flat import Flat
from hvdllm.models.gpt import GPT
from hvdllm.models.hugging import TOKENIZER, is_folder, root_of
from hvdllm.models.parts import Model
from hvdllm.settings import Config, several
from hvdllm.trainer import buffers, frozen
from hvdllm.world.base import World, from_first


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Where the weights of a trunk are.

    Attributes:
        path: of the checkpoint, of the folder final/, or of a folder of transformers.
        tokens: how many the trunk had committed there, or None if it is no checkpoint.
        steps: how many steps its optimizer had made.
        note: what was done with its weights, or left out of them; empty if they were taken as they are.
        adapters: of a trunk that trained adapters, what became of them: KEPT or MERGED; empty for any other.
    """

    path: str
    tokens: int | None
    steps: int
    note: str = ""
    adapters: str = ""


KEPT, MERGED = "kept", "merged"
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets")  # the settings of a model that describe them


def look(config: Config, world: World) -> None:
    """Looks at the tensors of a folder of transformers, names and shapes, before the text is prepared. Collective.

    Raises UserError on every rank if they are not those of the model. Runs are looked at later (find).
    """
    folder = Path(config.init_from or "").expanduser()
    if config.init_from is not None and is_folder(folder):
        with _named(config):
            from_first(world, lambda: hugging.check(folder, config.model), "start.look")


@contextmanager
def _named(config: Config) -> Iterator[None]:
    """A context in which a UserError names init_from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"init_from={config.init_from}: {error}") from None


def begin(
    config: Config, files: dict[str, str], exchange: Exchange, flat: Flat, model: nn.Module, world: World, say: runs.Say
) -> Trunk:
    """Loads the trunk's weights, and the optimizer's state if asked for, into an exchange. Collective.

    Where adapters are trained, the trunk's weights are those that are frozen. If the trunk has trained the same
    adapters, these go on, and its frozen weights stay frozen. Other adapters of a trunk are merged into its weights.

    Args:
        config: the settings; `init_from` names the trunk.
        model: whose buffers and tables are filled.
        files: what the task keeps in the folder of a run, and the sums.
        exchange: attached, and not trained yet.
        flat: the map.
        model: whose weights these are.
        world: the ranks.
        say: is told of damaged checkpoints that were passed over.

    Raises UserError on every rank if the trunk has another tokenizer, model or optimizer, or if it is damaged.
    """
    with _named(config):
        found = from_first(world, lambda: dataclasses.asdict(find(config, files, say)), "start.trunk")
        trunk = Trunk(**found)
        path, kind = Path(trunk.path), "model" if trunk.tokens is not None else ""
        if trunk.adapters == MERGED:
            _merge(path, kind, config, exchange, flat, model, world)
            return trunk
        if trunk.adapters == KEPT:
            frozen.share(model, lambda: frozen.load(_run_of(path), model), world)
        elif frozen.named(model):
            _freeze(path, kind, config, model, world)
            return trunk
        kinds = exchange.update.state()[1] if config.init_optimizer else ()
        if is_folder(path):
            weights = read.share_filled(
                lambda vector: hugging.fill(path, config.model, lambda name: flat.view(name, vector)),
                "model",
                flat,
                world,
            )
        else:
            weights = read.share_vector(path, kind, flat, world)
            buffers.load(model, read.share_tensors(path, world), trunk.path, config.init_optimizer)
        exchange.start(weights, {kind: read.share_vector(path, kind, flat, world) for kind in kinds}, trunk.steps)
    return trunk


def _freeze(path: Path, kind: str, config: Config, model: nn.Module, world: World) -> None:
    """Takes the frozen weights of a model with adapters from what was found. Collective."""
    if not is_folder(path):
        frozen.begin(model, path, kind, world)
        return
    weights = frozen.named(model)
    frozen.share(model, lambda: hugging.fill(path, config.model, lambda name: weights[name].detach()), world)


def _merge(
    path: Path, kind: str, config: Config, exchange: Exchange, flat: Flat, model: nn.Module, world: World
) -> None:
    """Takes the weights of a run that trained adapters, with these in them, as those of the model. Collective."""
    assert isinstance(model, GPT)
    theirs = runs.read_config(_run_of(path)).model if world.rank == 0 else config.model

    def fill(view: Callable[[str], torch.Tensor]) -> None:
        for name, values in frozen.merged(_run_of(path), path, kind, _like(config.model, theirs), model).items():
            view(name).copy_(values)

    if weights := frozen.named(model):
        frozen.share(model, lambda: fill(lambda name: weights[name].detach()), world)
    else:
        filled = read.share_filled(lambda vector: fill(lambda name: flat.view(name, vector)), "model", flat, world)
        exchange.start(filled, {}, 0)


def _like(ours: Model, theirs: Model) -> Model:
    """Our model with the adapters of theirs. Raises UserError if there is no such model."""
    lora = {name: getattr(theirs, name) for name in ADAPTERS}
    settings = dataclasses.replace(ours, **lora)
    if problem := settings.problem():
        raise UserError(f"its adapters do not fit this model: {problem}")
    return settings


def _same_adapters(ours: Model, theirs: Model) -> bool:
    """Whether two models have equal adapters; the order in which targets are named does not matter."""
    left, right = (
        (each.lora_rank, each.lora_alpha, sorted(several(each.lora_targets))) for each in (ours, theirs)
    )  # fmt: skip
    return left == right


def _run_of(source: Path) -> Path:
    """The folder of the run that a checkpoint or a final/ belongs to."""
    return source.absolute().parents[1 if (source / "manifest.json").exists() else 0]


def find(config: Config, files: dict[str, str], say: runs.Say) -> Trunk:
    """Finds the weights that `init_from` names. For a run they are in its newest whole checkpoint, or else in final/.

    Raises UserError if there are none, or if they do not fit the settings.
    """
    path = Path(config.init_from or "").expanduser()
    if is_folder(path):
        return _foreign(path, config, files["tokenizer.json"])
    if (path / "manifest.json").exists():
        folder, source = path.absolute().parents[1], path
        if problem := read.broken(path):
            raise UserError(f"that checkpoint cannot be read ({problem}): take another of its run")
    elif (path / "config.yaml").exists():
        folder, newest = path, read.newest(path, say)
        source = newest or path / "final"
    elif (path / "model.safetensors").exists():
        folder, source = path.absolute().parent, path
        if not (folder / "config.yaml").exists():
            raise UserError("there is a model.safetensors, but no config.json of transformers, and no run around it")
    else:
        raise UserError("there is no run and no checkpoint: give a run's folder, or a folder of its checkpoints/")
    whole = (source / "manifest.json").exists()
    if not whole and not (source / "model.safetensors").exists():
        raise UserError("that run has no whole checkpoint and no final/: train it for longer")
    try:
        if not whole and (problem := sums.changed(source / "model.safetensors", source)):
            raise UserError(f"its final/ cannot be read ({problem}): copy it again")
        # A model may be taught to answer (text=chat) that was not asked before, or in another way.
        files = {name: digest for name, digest in files.items() if name != runs.ASKED}
        other = [name for name, digest in files.items() if sums.of_file(folder / name, folder) != digest]
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"its {' or '.join(files)} cannot be read ({error}): copy the whole folder") from None
    if other == ["tokenizer.json"]:
        raise UserError(
            "its tokenizer is not that of this text, so its tokens mean other things: give "
            f"text.tokenizer={folder}/tokenizer.json"
        )
    if other:
        raise UserError(f"its {other[0]} is not that of these data: give the data that it was trained on")
    note, adapters = _adapters(config, folder) if (folder / runs.FROZEN).exists() else ("", "")
    if config.init_optimizer and adapters == MERGED:
        raise UserError("its optimizer is that of its adapters, which are merged here: give init_optimizer=false")
    if config.init_optimizer and not adapters and getattr(config.model, "lora_rank", False):
        raise UserError("its optimizer knows nothing of adapters (model.lora_rank): give init_optimizer=false")
    state = read_state(source) if whole else {}
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
    return Trunk(str(source), tokens, steps if isinstance(steps, int) else 0, note, adapters)


def _adapters(config: Config, folder: Path) -> tuple[str, str]:
    """What becomes of the adapters that a run has trained, in words, and as Trunk.adapters has it."""
    ours, theirs = config.model, runs.read_config(folder).model
    if not isinstance(ours, Model) or not isinstance(theirs, Model):
        raise UserError("that run trained adapters of another kind of model: give the same task and model")
    if not theirs.lora_rank:
        raise UserError(f"it has a {runs.FROZEN}, and its config.yaml says model.lora_rank=0: copy the folder again")
    if _same_adapters(ours, theirs):
        return "its adapters go on, over the same frozen weights", KEPT
    return "its adapters are merged into them" + ", and new ones begin" * bool(ours.lora_rank), MERGED


def _foreign(path: Path, config: Config, tokenizer_hash: str) -> Trunk:
    """What `find` returns for a folder of transformers, whose tensors `look` has seen."""
    if config.init_optimizer:
        raise UserError("a folder of transformers holds no optimizer: init_optimizer=false")
    try:
        theirs = sums.of_file(path / TOKENIZER, root_of(path)) if (path / TOKENIZER).exists() else tokenizer_hash
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"its {TOKENIZER} cannot be read ({error}): take the whole folder") from None
    if theirs != tokenizer_hash:
        raise UserError(
            f"its {TOKENIZER} is not that of this text, so its tokens mean other things: leave text.tokenizer out"
        )
    return Trunk(str(path), None, 0, hugging.left_out(path))
