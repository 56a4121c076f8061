"""Numbers beyond reach are refused before anything is made: by their bounds, and by the memory there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdllm import device, registry, settings
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.models.size import count_parameters, least_activations, memory
from hvdllm.models.size import least_memory as least
from hvdllm.task.causal_lm import CausalLM
from hvdllm.trainer import agree
from hvdllm.world.single import SingleWorld


@pytest.mark.parametrize(
    "word",
    [
        "micro_batch=1e20", "micro_batch=100000000000000000000", "seed=18446744073709551616", "model.width=4000000000",
        "model.layers=1e8", "model.heads=1e9", "text.vocab=100000000000", "device.threads=100000000",
        "sample_tokens=1e11", "model.norm_eps=-1", "model.rope_theta=0", "budget_tokens=1e30", "eval_every=1e300",
        "model.mlp_width=-1", "world.timeout_s=1e12", "exchange.bucket_mb=1e9", "optim.lr=1e16", "keep=1e10",
    ],
)  # fmt: skip
def test_a_number_beyond_its_bounds_is_one_sentence(word: str) -> None:
    with pytest.raises(UserError, match=r"too (large|small): it must be at (most|least)|not a value of type") as error:
        compose([word])
    assert "\n" not in str(error.value) and word.partition("=")[0] in str(error.value)


def test_every_number_has_a_bound() -> None:
    import dataclasses

    kinds = [settings.Config, *(kind for kinds in registry.all_kinds().values() for kind in kinds.values())]
    for field in (field for kind in kinds for field in dataclasses.fields(kind)):
        if any(number in str(field.type) for number in ("int", "float")):
            assert field.metadata["most"] <= settings.LARGEST or field.name == "seed", field.name
            assert field.metadata["least"] is not None, field.name


@pytest.mark.parametrize("word", ["+=", "=5", "~", "++", "+", "=", "a b", "seed", "seed=", "~~seed", "seed==1"])
def test_words_that_are_no_settings_are_one_sentence(word: str) -> None:
    with pytest.raises(UserError) as error:
        compose([word])
    assert "\n" not in str(error.value)


def least_memory(config: settings.Config, vocab: int, ranks: int) -> int:
    return least(config, count_parameters(config.model, vocab), least_activations(config.model), ranks)


def test_what_a_rank_needs_at_least_is_no_more_than_it_takes() -> None:
    """A bound from below: what it refuses could not have trained."""
    config = compose(["micro_batch=4"])
    one = 4 * count_parameters(config.model, 320)
    assert 4 * one < least_memory(config, 320, 1) < 5 * one + 50e6
    assert memory(config.model, 320, "fp32").total <= least_memory(config, 320, 1)
    plain = compose(["optim=sgd", "optim.momentum=0", "micro_batch=4"])
    assert least_memory(config, 320, 1) - least_memory(plain, 320, 1) == one, "SGD keeps a velocity"
    sharded = compose(["exchange=sharded", "micro_batch=4"])
    assert least_memory(config, 320, 4) - least_memory(sharded, 320, 4) == pytest.approx(1.5 * one, abs=4)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = compose(["model.layers=9999", "model.width=16384", "model.heads=4"]), torch.device("cpu")
    with pytest.raises(UserError, match=r"M parameters, and a rank of it .* would take at least .* GiB") as error:
        agree.agreed_room(config, CausalLM(config, 257), cpu, SingleWorld())
    assert "\n" not in str(error.value)
    small, world = compose([]), SingleWorld()
    agree.agreed_room(small, CausalLM(small, 257), cpu, world)
    needs = least_memory(small, 320, 1)
    for there, fits in ((needs, True), (needs - 1, False), (None, True)):
        monkeypatch.setattr(device, "usable_memory", lambda kind, there=there: there)
        if fits:
            agree.agreed_room(small, CausalLM(small, 257), cpu, world)
        else:
            with pytest.raises(UserError, match="free here"):
                agree.agreed_room(small, CausalLM(small, 257), cpu, world)
    world.local_size = 2  # ranks of a host share its memory
    monkeypatch.setattr(device, "usable_memory", lambda kind: 2 * needs - 1)
    with pytest.raises(UserError, match="2 ranks of it"):
        agree.agreed_room(small, CausalLM(small, 257), cpu, world)


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to catch: the host's memory and cores, a limit of a group further out, one that is none."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(device, "cgroups", lambda: [inner, inner.parent])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert (device.usable_cores(), device.quota()) == (16, float("inf"))
    free = device.usable_memory(torch.device("cpu"))
    for name, text in {"memory.max": "max", "memory.current": "5", "cpu.max": "max 100000"}.items():
        (inner / name).write_text(f"{text}\n")
    assert device.usable_cores() == 16 and free is not None
    for name, text in {"memory.max": "1000", "memory.current": "400", "cpu.max": "250000 100000"}.items():
        (inner.parent / name).write_text(f"{text}\n")
    assert device.usable_memory(torch.device("cpu")) == 600
    assert device.usable_cores() == 3 and device.fair_share(2) == 1


@pytest.mark.parametrize(
    ("mine", "launcher", "ranks", "apart", "threads"),
    [
        (16, 16, 1, None, 16),
        (16, 16, 4, None, 4),  # nobody is bound
        (16, 64, 4, None, 16),  # each to its own
        (16, 32, 4, None, 8),  # two to a socket
        (16, 16, 4, 16, 16),  # srun --cpus-per-task=16
        (1, 2, 8, None, 1),
    ],
)
def test_cores_of_a_rank(
    mine: int, launcher: int, ranks: int, apart: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cgroups", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(launcher if pid == os.getppid() else mine)))
    assert device.fair_share(ranks, apart) == threads
