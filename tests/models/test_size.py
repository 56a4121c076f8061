"""Sizes without torch agree with the real module; costs and peaks with what others published."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from hvdllm.models.gpt import GPT
from hvdllm.models.parts import Model
from hvdllm.models.size import count_parameters, flops_per_token, memory, pad_vocab, peak_flops

PRESETS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


def preset(path: Path) -> Model:
    values = OmegaConf.load(path)
    values.pop("defaults")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), values))


def real_count(model: Model, vocab: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(model, vocab).parameters())


def test_size_needs_no_torch() -> None:
    code = "import sys, hvdllm.models, hvdllm.models.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_can_be_built_and_counted(path: Path) -> None:
    model = preset(path)
    assert model.problem() is None
    assert count_parameters(model, 2048) == real_count(model, 2048)
    text = path.read_text()
    assert text.startswith("# ") and "/schema/model/gpt@_here_" in text


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("gpt2", 50257, 124_439_808),  # transformers' gpt2
        ("llama_1b", 32000, 1_100_048_384),  # TinyLlama 1.1B
        ("tiny", 2048, 984_192),
    ],
)
def test_presets_have_the_size_they_are_known_for(name: str, vocab: int, parameters: int) -> None:
    (path,) = (path for path in PRESETS if path.stem == name)
    assert count_parameters(preset(path), vocab) == parameters


@settings(max_examples=60)
@given(
    st.builds(
        lambda heads, head, groups, **more: Model(width=heads * head, heads=heads, kv_heads=groups, **more),
        heads=st.just(4),
        head=st.sampled_from([2, 4]),
        groups=st.sampled_from([None, 1, 2, 4]),
        layers=st.integers(1, 3),
        mlp_width=st.sampled_from([None, 5]),
        context=st.integers(1, 9),
        positions=st.sampled_from(["learned", "rope"]),
        norm=st.sampled_from(["layernorm", "rmsnorm"]),
        mlp=st.sampled_from(["gelu", "swiglu"]),
        bias=st.booleans(),
        tied=st.booleans(),
    ),
    st.integers(1, 20),
)
def test_parameters_are_counted_exactly(model: Model, vocab: int) -> None:
    assert model.problem() is None
    assert count_parameters(model, vocab) == real_count(model, vocab)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_flops_are_those_torch_counts(path: Path) -> None:
    """A forward's matrix products, counted by torch; training is three times a forward. (Its counter does not
    halve the attention for the causal mask either.)"""
    model = preset(path)
    with torch.device("meta"):
        module, ids_BT = GPT(model, 2048), torch.zeros(1, model.context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(ids_BT)
    assert flops_per_token(model, 2048) * model.context == 3 * counter.get_total_flops()


def test_memory() -> None:
    model = Model()
    n = count_parameters(model, 2048)
    assert memory(model, 2048, "fp32") == memory(model, 2048, "bf16")
    fp32, fp64 = memory(model, 2048, "fp32"), memory(model, 2048, "fp64")
    assert (fp32.weights, fp32.gradients, fp32.optimizer, fp32.total) == (4 * n, 4 * n, 8 * n, 16 * n)
    assert fp64.total == 2 * fp32.total


@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (64, 64), (65, 128), (257, 320), (2048, 2048), (50257, 50304)])
def test_pad_vocab(tokens: int, rows: int) -> None:
    assert pad_vocab(tokens) == rows


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(width=130, heads=4), "model.width=130 is no multiple of model.heads=4"),
        (dict(kv_heads=3), "model.kv_heads=3 is no divisor of model.heads=4"),
        (dict(kv_heads=8), "model.kv_heads=8 is no divisor"),
        (dict(kv_heads=0), "model.kv_heads=0 is no divisor"),
        (dict(width=12, heads=4, positions="rope"), "a head has 3"),
        (dict(mlp_width=0), "model.mlp_width=0"),
        (dict(dropout=1.0), "model.dropout=1.0"),
    ],
)
def test_impossible_models_are_refused_in_one_sentence(wrong: dict, words: str) -> None:
    problem = str(Model(**wrong).problem())
    assert re.search(words, problem) and "\n" not in problem


def test_an_odd_head_is_fine_with_learned_positions() -> None:
    assert Model(width=12, heads=4).problem() is None


@pytest.mark.parametrize(
    ("device", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA H200 NVL", 835.5e12, 60e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA B300 SXM6 AC", 2250e12, 75e12),
        ("NVIDIA GB300", 2500e12, 80e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12, 91.1e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("AMD EPYC 9654", None, None),
    ],
)
def test_peaks(device: str, bf16: float | None, fp32: float | None) -> None:
    assert peak_flops(device, "bf16") == (bf16 and pytest.approx(bf16))
    assert peak_flops(device, "fp32") == (fp32 and pytest.approx(fp32))
