"""Small folders of transformers, written by that library itself, for the tests that read them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvdllm.text.tokenize import BYTES, Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # classes and random weights are all we want of it: nothing is looked up
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, POSITIONS = 258, 64  # neither padded nor the tokenizer's 257
GPT2 = dict(n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
    rms_norm_eps=2e-5,
    head_dim=8,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", dict(GPT2, tie_word_embeddings=False, n_inner=40)),
    "llama": ("Llama", LLAMA),
    "llama tied": ("Llama", dict(LLAMA, tie_word_embeddings=True, rope_theta=500.0)),
    "llama biases": ("Llama", dict(LLAMA, attention_bias=True, mlp_bias=True)),
    "llama linear": ("Llama", dict(LLAMA, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.5))),
    "llama3": ("Llama", dict(LLAMA, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=None)),
    "qwen2": ("Qwen2", {key: value for key, value in LLAMA.items() if key != "head_dim"}),
    "arcee": ("Arcee", dict(LLAMA, hidden_act="gelu_pytorch_tanh")),
}


def randomize(model: nn.Module) -> None:
    """No parameter at a value that hides it: biases are not 0, norms not 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)


def write(
    folder: Path, kind: str = "llama", shard: str = "1GB", dtype: torch.dtype = torch.float32, **more: Any
) -> Path:
    """Writes a folder of a kind with random weights and the tokenizer of bytes, and returns it."""
    name, values = KINDS[kind]
    values = dict(vocab_size=VOCAB, bos_token_id=256, eos_token_id=256) | values | more
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text(Tokenizer(BYTES).for_others())
    return folder


def load(folder: Path) -> nn.Module:
    """The model of a folder as transformers loads it, in fp32."""
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model
