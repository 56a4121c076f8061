"""The next token of a text, from the tokens before it. Items are windows of text, units are tokens.

With text=chat items are conversations, and units are the tokens of the assistant. With text=packed items are windows
of whole documents, and units are their tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hvdllm import registry, runs
from hvdllm.errors import UserError
from hvdllm.models import size
from hvdllm.models.generate import generate
from hvdllm.models.gpt import GPT, compile_blocks, init_weights
from hvdllm.models.lora import adapt
from hvdllm.models.parts import Bert, Model
from hvdllm.settings import Config
from hvdllm.task.base import DTYPES, Items, Prepared, Source
from hvdllm.task.joined import Joined, by_share
from hvdllm.text import mix, overlap, shards, tokens
from hvdllm.text.chat import Around
from hvdllm.text.conversations import Conversations
from hvdllm.text.packed import Packed
from hvdllm.text.parts import Mix, Stdlib, Text, Tokens
from hvdllm.text.shards import Corpus
from hvdllm.text.tokenize import Tokenizer
from hvdllm.text.windows import Windows

LEAST_VOCAB = 257  # tokens of the byte tokenizer, the smallest one


@dataclass(frozen=True)
class CausalLM:
    """The task over a vocabulary.

    Attributes:
        config: the settings of the run.
        vocab: tokens of the tokenizer; the model's own vocabulary is padded.
        tokenizer: of the run, or None for a rough task.
        scale: bytes of the validation text over those that its tokens spell.
        around: of conversations, what their template puts around a question.
    """

    config: Config
    vocab: int
    tokenizer: Tokenizer | None = None
    scale: float = 1.0
    around: Around | None = None

    unit, measures, tables = "tokens", 3, 0

    @property
    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.words.hash} | ({runs.ASKED: self.around.hash} if self.around else {})

    @property
    def words(self) -> Tokenizer:
        assert self.tokenizer is not None
        return self.tokenizer

    def keep(self, folder: Path) -> None:
        self.words.save(folder / "tokenizer.json")
        if self.around is not None:
            runs.write_whole(folder / runs.ASKED, self.around.json())

    def build(self) -> nn.Module:
        end = None if self.tokenizer is None else self.tokenizer.end
        model = GPT(self.config.model, size.rows(self.config.model, self.vocab), end).to(DTYPES[self.config.precision])
        init_weights(model, self.config.seed)
        if self.config.model.lora_rank:
            adapt(model, self.config.seed)
        if self.config.model.compile:
            compile_blocks(model)
        return model

    @property
    def parameters(self) -> int:
        model = self.config.model
        return size.count_parameters(model, size.rows(model, self.vocab)) + size.count_adapters(model)

    @property
    def frozen(self) -> int:
        adapters = size.count_adapters(self.config.model)
        return self.parameters - adapters if adapters else 0

    @property
    def activations(self) -> int:
        return size.least_activations(self.config.model)

    @property
    def flops(self) -> float:
        return size.flops_per_token(self.config.model, size.rows(self.config.model, self.vocab))

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        masked = self.around is not None or self.config.text.packed
        loss: torch.Tensor = model.loss(inputs, targets, masked)  # type: ignore[operator]
        return loss

    def measure(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss, the tokens, and the bytes of text that the targets stand for."""
        counted = targets >= 0
        spelled = self._token_bytes.to(targets.device)[targets.clamp(min=0)] * counted
        loss = self.loss(model, inputs, targets)
        return torch.stack([loss.double(), counted.sum().double(), spelled.sum()])

    @cached_property
    def _token_bytes(self) -> torch.Tensor:
        """Bytes of text that each token stands for, float64 [vocab]."""
        return torch.as_tensor(self.words.token_bytes.astype(np.float64))

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean loss in nats a token, and the same in bits per byte of the text.

        If the tokenizer loses some bytes, or if its counts are estimates, they are scaled so that over the validation
        text they add up to the size of that text.
        """
        loss, tokens, spelled = sums
        return {"loss": loss / tokens, "bits_per_byte": loss / math.log(2) / max(spelled * self.scale, 1.0)}

    def tell(self, metrics: dict[str, float]) -> str:
        return f"{metrics['bits_per_byte']:.3f} bits per byte"

    def sample(self, model: nn.Module, units: int) -> str:
        config = self.config
        seed = (config.seed * 1_000_003 + units) % 2**63  # the range that torch takes
        return continue_text(
            model, self.words, config.sample_prompt, tokens=config.sample_tokens, seed=seed, around=self.around
        )


def continue_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    around: Around | None = None,
) -> str:
    """The text, followed by what the model adds to it. Where it has learnt conversations, only what it answers.

    Args:
        model: the language model.
        tokenizer: of the model.
        text: taken as the beginning of a document.
        tokens: how many the model adds at most; it stops earlier where it ends the document.
        seed: of the random numbers.
        temperature: divides the logits.
        top_k: only this many of the likeliest tokens are drawn from, or all if None.
        around: what stands around a question in a conversation; None if the model has learnt text.
    """
    assert isinstance(model, GPT)
    if around is None:
        prompt, stop = [tokenizer.end, *tokenizer.encode([text])[0].tolist()], tokenizer.end
    else:
        prompt, stop = around.ids(tokenizer, text), around.ends(tokenizer)
    out = generate(
        model, prompt, tokens=tokens, vocab=tokenizer.vocab, generator=torch.Generator().manual_seed(seed),
        temperature=temperature, top_k=top_k, stop=stop,
    )  # fmt: skip
    return tokenizer.decode([*prompt[1:], *out] if around is None else out)


def unread(config: Config, data_dir: Path, say: Callable[[str], None]) -> Prepared:
    """The task of a stream, of which nothing has arrived yet. A BPE is that of the standard library."""
    text, tokenizer = config.text, None
    if text.tokenizer == "bpe":
        tokenizer = shards.prepare(Stdlib(vocab=text.vocab), data_dir, say=say).tokenizer
    tokenizer = tokenizer or tokens.tokenizer_of(text)
    _check_vocab(config, tokenizer)
    nothing = Windows(np.empty(0, tokenizer.dtype), config.model.context, tokenizer.end, validation=True)
    shape = f"{tokenizer.hash} {config.model.context} {text.slice(config)} {text.held(config)}"
    return Prepared(
        CausalLM(config, tokenizer.vocab, tokenizer), nothing, nothing, hashlib.sha256(shape.encode()).hexdigest(),
        f"stream from {text.source}, vocabulary {tokenizer.vocab:,}", [], {"tokenizer_hash": tokenizer.hash},
        lambda world: {},
    )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A text, open.

    Attributes:
        train, validation: the items.
        task: the task of this text alone.
        data_hash: of the content.
        about: the text in a few words.
        notes: one sentence each, for a person.
        repeated: the share of evaluated windows that the training text repeats, or None if it is not known.
    """

    train: Items
    validation: Items
    task: CausalLM
    data_hash: str
    about: str
    notes: list[str]
    repeated: float | None


def prepare(config: Config, *, say: Callable[[str], None], whole: bool, wanted: str | None) -> Prepared:
    data_dir = shards.data_folder(config.data_dir)
    if isinstance(config.text, Mix):
        return mixed(config, sources(config, config.text, say=say, whole=whole))
    if config.text.endless:
        return unread(config, data_dir, say)
    if config.text.ready:
        text = opened_tokens(config, config.text, say, wanted)
    else:
        text = opened(config, config.text, shards.prepare(config.text, data_dir, say=say, whole=whole, wanted=wanted))
    source, vocab = registry.name_of("text", config.text), text.task.vocab
    return Prepared(
        text.task, text.train, text.validation, text.data_hash, f"{source}, {text.about}, vocabulary {vocab:,}",
        text.notes, {"validation_repeated": text.repeated, "tokenizer_hash": text.task.words.hash},
    )  # fmt: skip


def _check_vocab(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError if the model's embedding has too few rows for the tokens; a mask token is masked_lm's affair."""
    if isinstance(config.model, Model | Bert):
        size.check_vocab(config.model, tokenizer.vocab)


def opened(config: Config, text: Text, corpus: Corpus) -> Opened:
    """A prepared text."""
    _check_vocab(config, corpus.tokenizer)
    shard, context = corpus.validation_shard, config.model.context
    scale = shard.bytes / shard.spelled if shard.spelled else 1.0
    repeated = corpus.repeated(context, config.eval_tokens)
    train: Windows | Conversations | Packed
    validation: Windows | Conversations | Packed
    if corpus.around is not None:
        train = Conversations(corpus.train, context, corpus.tokenizer.end)
        validation = Conversations(corpus.validation, context, corpus.tokenizer.end, validation=True)
        notes = [*train.notes(), *validation.notes()]
    elif text.packed:
        train = Packed(corpus.train, context, corpus.tokenizer.end)
        validation = Packed(corpus.validation, context, corpus.tokenizer.end, validation=True)
        repeated = validation.repeated(corpus.seen, config.eval_tokens)
        notes = [*train.notes(), *repeated_text(config, repeated)]
    else:
        train = Windows(corpus.train, context, corpus.tokenizer.end)
        validation = Windows(corpus.validation, context, validation=True)
        notes = repeated_text(config, repeated)
    task = CausalLM(config, corpus.tokenizer.vocab, corpus.tokenizer, scale, corpus.around)
    about, notes = f"{len(corpus.train):,} training tokens", [*corpus.notes, *notes]
    return Opened(train, validation, task, corpus.data_hash, about, notes, repeated)


def opened_tokens(config: Config, text: Tokens, say: Callable[[str], None], wanted: str | None = None) -> Opened:
    """A text that is tokens already. wanted: the data hash of the run that goes on, or None."""
    tokenizer, context = tokens.tokenizer_of(text), config.model.context
    _check_vocab(config, tokenizer)
    found = tokens.split(text, tokenizer, shards.data_folder(config.data_dir), say, wanted)
    parts = [
        Windows(each, context, tokenizer.end, without=left)
        for each, left in zip(found.train, found.left_out, strict=True)
    ]
    train = Joined(parts, tokenizer.end)
    held = [Windows(each, context, tokenizer.end, True) for each in found.held or [found.train[0][:0]]]
    count, repeated = sum(map(len, found.train)), found.repeated(context, config.eval_tokens)
    notes = left_out(sum(map(len, found.left_out)), sum(part.whole for part in parts), len(train))
    about = f"{count:,} in {len(parts)} file{'s' * (len(parts) > 1)} for training"
    return Opened(
        train, Joined(held, tokenizer.end), CausalLM(config, tokenizer.vocab, tokenizer), found.data_hash, about,
        [*notes, *repeated_text(config, repeated)], repeated,
    )  # fmt: skip


def sources(config: Config, text: Mix, *, say: Callable[[str], None], whole: bool) -> dict[str, Opened]:
    """The texts of a mixture by name, open."""
    corpora = mix.prepare(text, shards.data_folder(config.data_dir), say=say, whole=whole)
    return {
        name: opened(config, each, corpora[name]) if name in corpora else opened_tokens(config, each, say)  # type: ignore[arg-type]
        for name, each in text.parts.items()
    }


def mixed(config: Config, texts: dict[str, Opened], change: Callable[[Items], Items] = lambda items: items) -> Prepared:
    """The task of a mixture. `change` makes the items of another task from those of each text."""
    shares = None if config.text.mix is None else config.text.shares()
    train = {name: change(text.train) for name, text in texts.items()}
    held = {name: change(text.validation) for name, text in texts.items()}
    for name, part in train.items():
        if not len(part):
            raise UserError(f"text.sources.{name}: {part.too_few(1)}")
    first = next(iter(texts.values())).task
    around = next((text.task.around for text in texts.values() if text.task.around is not None), None)
    task = replace(first, scale=1.0, around=around)
    tasks = {name: replace(text.task, around=around) for name, text in texts.items()}
    evaluated = by_share(held, shares)
    sources = {name: Source(tasks[name], held[name], share) for name, share in evaluated.items()}
    of_units = by_share(train, shares)
    notes = [f"{name}: {note}" for name, text in texts.items() for note in text.notes]
    notes += [f"{name}: nothing is held out, so it has no validation loss" for name in texts if name not in sources]
    rounds = {name: config.budget_tokens * of_units[name] / (len(part) * part.units) for name, part in train.items()}
    about = ", ".join(f"{name} {of_units[name]:.0%} ({rounds[name]:.2g} epochs)" for name in texts)
    joined = Joined(list(train.values()), first.words.end, shares and list(of_units.values()))
    return Prepared(
        task, joined, Joined(list(held.values()), first.words.end),
        mix.data_hash({name: text.data_hash for name, text in texts.items()}),
        f"mix of {about}, vocabulary {first.vocab:,}", notes,
        {
            "validation_repeated": {name: text.repeated for name, text in texts.items()},
            "tokenizer_hash": first.words.hash,
        },
        lambda world: sources,
    )  # fmt: skip


def left_out(documents: int, windows: int, kept: int) -> list[str]:
    """A note about documents of the training text that are held out too; empty if there are none."""
    if not documents:
        return []
    return [
        f"{documents:,} documents of the training text are held out too, so the {windows - kept:,} of its {windows:,} "
        "windows that hold a part of one are left out"
    ]


def repeated_text(config: Config, share: float | None) -> list[str]:
    """A note about evaluated text that also occurs in the training text; empty if there is none, or it is unknown."""
    if not share or not config.eval_every:
        return []
    return [
        f"{share:.1%} of the evaluated windows hold {overlap.RUN} tokens in a row that the training text has too: what "
        "was learnt by heart lowers the validation loss there"
    ]


def restore(config: Config, folder: Path) -> CausalLM:
    tokenizer = Tokenizer.load(folder / "tokenizer.json", folder, runs.file_sum(folder, "tokenizer.json"))
    _check_vocab(config, tokenizer)
    if not config.text.conversations:
        return CausalLM(config, tokenizer.vocab, tokenizer)
    around = Around.load(folder / runs.ASKED, folder)
    if runs.file_sum(folder, runs.ASKED) != around.hash:
        raise UserError(f"{folder / runs.ASKED} is not what was written: copy the run's folder again")
    return CausalLM(config, tokenizer.vocab, tokenizer, around=around)


def rough(config: Config) -> CausalLM:
    return CausalLM(config, LEAST_VOCAB)
