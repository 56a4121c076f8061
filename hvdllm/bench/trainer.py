"""The Trainer of the library transformers as the other side of `bench step`.

It trains the class of transformers that our settings make, with our weights and our batches, in the loop of its own
`train()`, with its data loader, accelerate and torch.optim.AdamW(fused=True). Logging and saving are off. Targets are
given as `shift_labels`, so both sides compute the same tokens. The loop runs in a thread, and a callback stops it after
the steps of each turn. So one side is idle while the other runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from hvdllm.bench.side import Side
from hvdllm.errors import UserError
from hvdllm.models import hugging
from hvdllm.models.gpt import GPT
from hvdllm.models.parts import Model
from hvdllm.settings import Config
from hvdllm.task.base import Prepared
from hvdllm.trainer.assemble import build_model, make_stream
from hvdllm.trainer.export import tensors
from hvdllm.world.single import SingleWorld

PACKAGES = ("transformers", "accelerate")
NEVER = 10**9  # steps
ROUNDS = 64  # of data, which are repeated


class Control(Protocol):
    """What a callback of the Trainer may ask of its loop."""

    should_training_stop: bool


def refuse(config: Config) -> None:
    """Raises UserError if a package is missing, or if transformers does not compute what these settings ask for."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--against hf: {missing[0]} is not installed: pip install {' '.join(missing)}")
    settings = config.model
    if not isinstance(settings, Model) or config.text.conversations:
        raise UserError("--against hf compares windows of text under task=causal_lm: leave task and text.chat out")
    hugging.kind_of(settings)
    for name in ("dropout", "lora_rank", "documents", "compile"):
        if getattr(settings, name):
            raise UserError(f"--against hf compares without model.{name}, which transformers does otherwise: leave it")
    if config.precision == "fp64":
        raise UserError("--against hf with precision=fp64: transformers takes its losses in fp32, give fp32 or bf16")
    if config.batch_tokens // settings.context % config.micro_batch:
        raise UserError(
            f"--against hf needs equal micro-batches: batch_tokens={config.batch_tokens} is "
            f"{config.batch_tokens // settings.context} sequences, no multiple of micro_batch={config.micro_batch}"
        )


def their_model(config: Config, data: Prepared) -> nn.Module:
    """The model of transformers that our settings make, with the weights that ours begins with."""
    transformers: Any = importlib.import_module("transformers")
    ours = build_model(data.task, torch.device("cpu"))
    assert isinstance(ours, GPT)
    rows, positions = len(ours.embed.weight), config.model.context
    values = hugging.config_of(config.model, rows, positions)
    kind = values.pop("model_type")
    ends = {"bos_token_id": None, "eos_token_id": None}  # the usual ones may be outside of our vocabulary
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **values, **ends)
    )
    found = model.load_state_dict(dict(tensors(ours, kind, rows, positions)), strict=False)
    assert not found.unexpected_keys and {*found.missing_keys} <= {hugging.HEAD}, found
    return model


def batches(config: Config, data: Prepared) -> list[dict[str, torch.Tensor]]:
    """Our items in our order, as a data set for the Trainer."""
    stream = make_stream(config, data.train, torch.device("cpu"), SingleWorld())
    rounds = range(min(ROUNDS, len(stream.items) // stream.batch))
    return [
        {"input_ids": inputs, "labels": targets, "shift_labels": targets}
        for number in rounds
        for batch in stream.share(number)
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True)
    ]


def side(config: Config, data: Prepared, device: torch.device) -> Side:
    """The Trainer, which waits for its first turn. Raises UserError as `refuse` does."""
    refuse(config)
    transformers: Any = importlib.import_module("transformers")  # its types differ from version to version
    transformers.utils.logging.disable_progress_bar()
    turns = Turns()
    optim, rounds = config.optim, config.batch_tokens // config.model.context // config.micro_batch
    folder = tempfile.TemporaryDirectory()
    arguments = transformers.TrainingArguments(
        output_dir=folder.name, max_steps=NEVER, per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=rounds, optim="adamw_torch_fused", learning_rate=optim.lr, adam_beta1=optim.beta1,
        adam_beta2=optim.beta2, adam_epsilon=optim.eps, weight_decay=optim.weight_decay, max_grad_norm=optim.clip,
        lr_scheduler_type="constant", bf16=config.precision == "bf16", use_cpu=device.type == "cpu",
        logging_strategy="no", save_strategy="no", report_to=[],
        disable_tqdm=True, remove_unused_columns=False,
        **dict.fromkeys(["gradient_checkpointing"] * config.model.checkpointing, True),
    )  # fmt: skip
    arguments._n_gpu = min(1, arguments.n_gpu)  # else it spreads a batch over all GPUs

    class Stopping(transformers.TrainerCallback):  # type: ignore[misc]  # it has no types
        def on_step_end(self, args: object, state: object, control: Control, **_: object) -> None:
            control.should_training_stop = turns.made_a_step()

    class Ordered(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *given: object, **named: object) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*given, **named)
            turns.losses.append(loss)
            return loss

    trainer = Ordered(
        model=their_model(config, data), args=arguments, train_dataset=batches(config, data), callbacks=[Stopping()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    turns.start(trainer.train, device)

    def steps(count: int) -> list[torch.Tensor]:
        losses = turns.take(count)
        return [torch.stack(losses[k : k + rounds]).sum() for k in range(0, len(losses), rounds)]

    def update() -> None:
        for p in trainer.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if optim.clip:
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), optim.clip)
        trainer.optimizer.step()

    def close() -> None:
        turns.end()
        folder.cleanup()

    return Side(steps, update, close)


class Turns:
    """Lets a loop in another thread go on by some steps, and waits meanwhile.

    Attributes:
        losses: of the micro-batches of this turn; the loop appends them.
    """

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self._left, self._ended = 0, False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, loop: Callable[[], object], device: torch.device) -> None:
        """Starts the loop's thread, which waits for its first turn. The loop calls made_a_step after each step."""
        threads = torch.get_num_threads()

        def run() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            torch.set_num_threads(threads)  # a thread may have a number of its own
            try:
                self._go.acquire()
                if not self._ended:
                    loop()
            except BaseException as error:  # it is raised by whoever waits for the turn
                self._error = error
            finally:
                self._ended = True
                self._done.release()

        self._thread = threading.Thread(target=run, name="their loop", daemon=True)
        self._thread.start()

    def made_a_step(self) -> bool:
        """Called by the loop after each step; waits for the next turn if this one is over. Returns whether to end."""
        self._left -= 1
        if self._left == 0:
            self._done.release()
            self._go.acquire()
        return self._ended

    def take(self, count: int) -> list[torch.Tensor]:
        """Lets the loop make so many steps, and returns the losses of their micro-batches."""
        if self._ended:
            raise RuntimeError("the loop has ended") from self._error
        self._left, self.losses = count, []
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self.losses

    def end(self) -> None:
        """Ends the loop and its thread."""
        self._ended = True
        self._go.release()
        if self._thread is not None:
            self._thread.join()
