"""Masked tokens of a text, from all others in the window: BERT's task (Devlin et al., 2018).

Items are windows of `model.context` tokens. In each, `task.share` of the tokens, the same number in every window, are
to be guessed. Of these 80 % are replaced by a mask token, 10 % by a token drawn at random, and 10 % stay. Which ones is
a pure function of the seed, the window and the epoch, so a resumed run and any number of ranks see the same. Units are
the tokens to be guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hvdllm.errors import UserError
from hvdllm.models import size
from hvdllm.models.bert import Bert, init_weights
from hvdllm.models.gpt import compile_blocks
from hvdllm.order.epochs import drawn
from hvdllm.settings import Config
from hvdllm.task import causal_lm
from hvdllm.task.base import DTYPES, Items, Prepared, Task
from hvdllm.task.joined import Joined
from hvdllm.text.parts import Mix
from hvdllm.text.tokenize import MASKS
from hvdllm.text.windows import Windows

EVALUATION = 2**31  # in the place of an epoch: an evaluation masks the same tokens each time


class Masked:
    """Windows with masked tokens.

    Args:
        windows: of the text.
        seed: of the run.
        count: how many tokens of each window are to be guessed.
        vocab: tokens of the tokenizer.
        mask: the id of the mask token; None: the next one.
    """

    name = "windows"

    def __init__(
        self, windows: Windows | Joined, seed: int, count: int, vocab: int, mask: int | None = None
    ) -> None:  # fmt: skip
        self.windows, self.mask = windows, vocab if mask is None else mask
        self.seed, self.count, self.vocab, self.units = seed, count, vocab, float(count)

    def __len__(self) -> int:
        return len(self.windows)

    def documents(self) -> np.ndarray:
        return self.windows.documents()

    def too_few(self, batch: int) -> str:
        return self.windows.too_few(batch)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Masked inputs, and targets, which are -1 where nothing is to be guessed: int64 [rows, context]."""
        inputs, _, _ = self.windows.take(rows, epochs)
        targets = torch.full_like(inputs, -1)
        for i, row in enumerate(rows):
            draw = drawn(self.seed, int(row), EVALUATION if epochs is None else int(epochs[i]))
            places = torch.from_numpy(draw.permutation(inputs.shape[1])[: self.count])
            how = torch.from_numpy(draw.random_sample(self.count))
            others = torch.from_numpy(draw.randint(self.vocab, size=self.count))
            targets[i, places] = whole = inputs[i, places]
            inputs[i, places] = torch.where(how < 0.8, self.mask, torch.where(how < 0.9, others, whole))
        return inputs, targets, np.full(len(rows), self.count)


@dataclass(frozen=True)
class MaskedLM(causal_lm.CausalLM):
    """The task over a vocabulary. The fields are those of CausalLM, whose tokenizer it keeps."""

    @property
    def mask(self) -> int:
        """The id of the mask token: the tokenizer's own, or the one after all of its tokens."""
        own = None if self.tokenizer is None else self.tokenizer.mask
        return self.vocab if own is None else own

    @property
    def rows(self) -> int:
        """Rows of the embedding: model.vocab, or the tokens and the mask token, padded."""
        return size.rows(self.config.model, max(self.vocab, self.mask + 1))

    @property
    def count(self) -> int:
        """How many tokens of a window are to be guessed."""
        return int(self.config.task.units(self.config))

    def build(self) -> nn.Module:
        model = Bert(self.config.model, self.rows).to(DTYPES[self.config.precision])
        init_weights(model, self.config.seed)
        if self.config.model.compile:
            compile_blocks(model)
        return model

    @property
    def parameters(self) -> int:
        model = self.config.model
        width, rows = model.width, self.rows
        block = 4 * width * width + 4 * width + 2 * width * model.hidden + model.hidden + width + 4 * width
        head = width * width + width + 2 * width + rows
        norms = 2 * width * (2 if model.norm_first else 1)
        return int((rows + model.context) * width + model.layers * block + norms + head)

    @property
    def frozen(self) -> int:
        return 0

    @property
    def flops(self) -> float:
        """Per guessed token, each of which needs the whole window to be read."""
        model, context = self.config.model, self.config.model.context
        block = 4 * model.width**2 + 2 * model.width * model.hidden
        read = context * (6 * model.layers * block + 12 * model.layers * model.width * context)
        return float(read / self.count + 6 * (model.width**2 + model.width * self.rows))

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, Bert)
        logits, wanted = model.guesses(inputs, targets, self.count)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(exact), wanted, reduction="sum")

    measures = 3

    def measure(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss, the guessed tokens, and how many of them were guessed right."""
        assert isinstance(model, Bert)
        logits, wanted = model.guesses(inputs, targets, self.count)
        loss = F.cross_entropy(logits.double(), wanted, reduction="sum")
        right = (logits.argmax(1) == wanted).sum()
        return torch.stack([loss, torch.full_like(loss, len(wanted)), right.double()])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean loss in nats a guessed token, and the share that was guessed right."""
        return {"loss": sums[0] / sums[1], "accuracy": sums[2] / sums[1]}

    def tell(self, metrics: dict[str, float]) -> str:
        return f"{metrics['accuracy']:.1%} of the masked tokens guessed"

    @torch.no_grad()
    def sample(self, model: nn.Module, units: int) -> str:
        """The prompt, each token of which is guessed from the others, one after the other."""
        assert isinstance(model, Bert)
        ids = torch.from_numpy(self.words.encode([self.config.sample_prompt])[0].astype(np.int64))
        ids = ids[: self.config.model.context]
        if not len(ids):
            return ""
        device, was = model.embed.weight.device, model.training
        model.eval()
        masked = ids.repeat(len(ids), 1).fill_diagonal_(self.mask).to(device)
        guessed = model(masked).diagonal().T[:, : self.vocab].argmax(1).tolist()
        model.train(was)
        return f"{self.words.decode(ids.tolist())!r} is guessed as {self.words.decode(guessed)!r}"


def prepare(config: Config, *, say: Callable[[str], None], whole: bool, wanted: str | None) -> Prepared:
    def masked(items: Items) -> Masked:
        assert isinstance(items, Windows | Joined)
        return Masked(items, config.seed, task.count, task.vocab, task.mask)

    if isinstance(config.text, Mix):
        texts = causal_lm.sources(config, config.text, say=say, whole=whole)
        task = _of(config, next(iter(texts.values())).task)
        return causal_lm.mixed(config, {name: replace(text, task=task) for name, text in texts.items()}, masked)
    data = causal_lm.prepare(config, say=say, whole=whole, wanted=wanted)
    task = _of(config, data.task)
    return replace(data, task=task, train=masked(data.train), validation=masked(data.validation))


def _of(config: Config, task: Task) -> MaskedLM:
    assert isinstance(task, causal_lm.CausalLM)
    return _checked(MaskedLM(config, task.vocab, task.tokenizer))


def restore(config: Config, folder: Path) -> MaskedLM:
    found = causal_lm.restore(config, folder)
    return _checked(MaskedLM(config, found.vocab, found.tokenizer))


def _checked(task: MaskedLM) -> MaskedLM:
    """The same. Raises UserError if the model's embedding has no row for the mask token."""
    if task.mask >= task.rows:
        raise UserError(
            f"the tokenizer has no mask token ({', '.join(MASKS)}), and the model's embedding no row for one "
            f"(model.vocab={task.rows}): take the tokenizer that belongs to the model, or add one to it"
        )
    return task


def rough(config: Config) -> MaskedLM:
    return MaskedLM(config, causal_lm.LEAST_VOCAB)
