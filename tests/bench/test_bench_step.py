"""The sides of `bench step`: they make the same steps, and each is idle while the other runs."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import words_of

from hvdllm.bench import step, trainer
from hvdllm.bench.side import Side
from hvdllm.cli.main import main
from hvdllm.config.compose import compose
from hvdllm.errors import RunError, UserError
from hvdllm.optim.parts import Constant
from hvdllm.settings import Config
from hvdllm.task import causal_lm, masked_lm
from hvdllm.task.base import Prepared

CPU = torch.device("cpu")
KINDS = {
    "arcee": ["model.positions=rope", "model.norm=rmsnorm", "model.bias=false", "model.kv_heads=2"],
    "gpt2": ["model.positions=learned", "model.norm=layernorm", "model.bias=true", "model.kv_heads=null"],
    "llama": ["model.positions=rope", "model.norm=rmsnorm", "model.bias=false", "model.mlp=swiglu", "model.tied=false"],
}


def prepared(tmp: Path, *more: str) -> tuple[Config, Prepared]:
    given = {word.partition("=")[0]: word for word in (*words_of(tmp, "x", 4, "micro_batch=2"), *more)}
    task = causal_lm
    if "task=masked_lm" in more:
        task = masked_lm
        del given["model.kv_heads"]
    config = replace(compose(list(given.values())), schedule=Constant(warmup=0.0))
    return config, task.prepare(config, say=print, whole=True, wanted=None)


def losses(side: Side, turns: int) -> list[float]:
    try:
        return [float(loss) for _ in range(turns) for loss in side.steps(3)]
    finally:
        side.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_of_transformers_makes_our_steps(kind: str, tmp_path: Path) -> None:
    """Also beyond the end of its data, which then begin anew, in several micro-batches a step."""
    pytest.importorskip("accelerate", reason="accelerate is missing, which the Trainer of transformers needs")
    config, data = prepared(tmp_path, *KINDS[kind])
    assert config.batch_tokens // config.model.context > config.micro_batch
    ours, theirs = losses(step.our_side(config, data, CPU), 2), losses(trainer.side(config, data, CPU), 2)
    assert len(ours) == 6 and ours[-1] < ours[0], "it learns"
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert not [thread for thread in threading.enumerate() if thread.name == "their loop"]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_the_plain_loop_makes_our_steps(task: str, tmp_path: Path) -> None:
    more = ["task=masked_lm", "batch_tokens=110"] if task == "masked_lm" else []
    config, data = prepared(tmp_path, *more)
    ours, plain = losses(step.our_side(config, data, CPU), 2), losses(step.plain_side(config, data, CPU), 2)
    assert plain == pytest.approx(ours, rel=1e-5)


def test_other_losses_are_not_measured() -> None:
    one, other = (Side(lambda count, x=x: [torch.tensor(x)] * count, lambda: None) for x in (5.0, 5.01))
    with pytest.raises(RunError, match=r"the loss of step 1 is 5.0.* and 5.01.*nothing is measured"):
        step.check_losses(one, other, "hf", 1e-4)
    assert len(step.check_losses(one, other, "hf", 1e-2)) == 8


def test_a_loop_runs_in_its_turns_alone_and_hands_its_error_over() -> None:
    turns, made = trainer.Turns(), []

    def loop() -> None:
        while True:
            made.append(1)
            if len(made) > 6:
                raise ValueError("seventh")
            if turns.made_a_step():
                return

    turns.start(loop, CPU)
    for count in (1, 3, 2):
        before = len(made)
        turns.take(count)
        assert len(made) == before + count
    with pytest.raises(ValueError, match="seventh"):
        turns.take(1)
    turns.end()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=masked_lm"], "compares windows of text"),
        (["model.dropout=0.1"], "without model.dropout"),
        (["model.lora_rank=2"], "without model.lora_rank"),
        (["model.norm=layernorm"], "transformers has no model with model.norm=layernorm"),
        (["precision=fp64"], "takes its losses in fp32"),
        (["micro_batch=3"], "no multiple of micro_batch=3"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "PACKAGES", ())
    assert main(["bench", "step", "--against", "hf", *words]) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("package", trainer.PACKAGES)
def test_a_missing_package_is_one_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = trainer.importlib.util.find_spec
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=f"{package} is not installed: pip install {package}"):
        trainer.refuse(compose([]))
