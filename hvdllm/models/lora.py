"""Low-rank adapters (LoRA; Hu et al., 2021): frozen weights W, and trained A and B in W x + B A x alpha / rank.

The layers of a block are named q, k, v, qkv, out, up, gate and down. q, k and v are rows of the fused layer `qkv`, and
gate and up are rows of the fused `up` of SwiGLU, so an adapter may belong to some rows of a layer. It computes what
peft's does, in the same order of operations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hvdllm.errors import UserError
from hvdllm.models.gpt import GPT, Attention, Block, Linear
from hvdllm.settings import several

# peft's names of the layers, by ours. GPT-2 has q, k and v in one layer. In a Llama `qkv` becomes three of them.
GPT2 = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
LLAMA = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj"}
LLAMA |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class Adapter(nn.Module):
    """The low-rank product of some rows of a layer: x -> B A x scale, with A [rank, inputs] and B [rows, rank]."""

    def __init__(self, layer: nn.Linear, rows: slice, rank: int, scale: float) -> None:
        super().__init__()
        self.rows, self.scale = rows, scale
        self.a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.b = nn.Parameter(layer.weight.new_zeros(rows.stop - rows.start, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b) * self.scale


class Adapted(Linear):
    """A layer with adapters beside its weights, which keep their names and are frozen."""

    def __init__(self, layer: nn.Linear, rows: dict[str, slice], rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleDict({name: Adapter(layer, part, rank, scale) for name, part in rows.items()})

    def each(self) -> Iterator[tuple[str, Adapter]]:
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            yield name, adapter

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        for _, adapter in self.each():
            beyond = (adapter.rows.start, self.out_features - adapter.rows.stop)
            y = y + (F.pad(adapter(x), beyond) if any(beyond) else adapter(x))
        return y


def _rows(block: Block) -> Iterator[tuple[nn.Module, str, dict[str, slice]]]:
    """(module, name of its layer, the rows that each target has in it) for the four layers of a block."""
    attention: Attention = block.attention
    queries, keys = attention.heads * attention.features, attention.kv_heads * attention.features
    edges = [0, queries, queries + keys, queries + 2 * keys]
    qkv = {name: slice(*edges[i : i + 2]) for i, name in enumerate("qkv")} | {"qkv": slice(0, edges[-1])}
    wide, width, hidden = block.mlp.up.out_features, block.mlp.down.out_features, block.mlp.down.in_features
    up = {"gate": slice(0, hidden), "up": slice(hidden, wide)} if block.mlp.gated else {"up": slice(0, wide)}
    yield attention, "qkv", qkv
    yield attention, "out", {"out": slice(0, width)}
    yield block.mlp, "up", up
    yield block.mlp, "down", {"down": slice(0, width)}


@torch.no_grad()
def adapt(model: GPT, seed: int) -> None:
    """Freezes a model, and gives it the adapters that its settings name, which change nothing yet.

    A is drawn as peft does, uniformly within 1 / sqrt(inputs), from a generator of its own; B is 0.
    """
    settings, targets = model.settings, several(model.settings.lora_targets)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + 17) % 2**63)
    model.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        for module, name, rows in _rows(block):
            if chosen := {target: rows[target] for target in targets if target in rows}:
                layer = getattr(module, name)
                made = Adapted(layer, chosen, settings.lora_rank, settings.lora_alpha / settings.lora_rank)
                for _, adapter in made.each():
                    most = 1 / math.sqrt(layer.in_features)
                    adapter.a.copy_(torch.empty(adapter.a.shape).uniform_(-most, most, generator=generator))
                setattr(module, name, made)


def adapted(model: nn.Module) -> list[tuple[str, Adapted]]:
    """The layers that have adapters, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Adapted)]


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """Adds each adapter to the weights that it belongs to, in place. What is returned computes the same without any."""
    for name, layer in adapted(model):
        for _, adapter in layer.each():
            layer.weight[adapter.rows] += adapter.b @ adapter.a * adapter.scale
        plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model.requires_grad_(True)


def peft_tensors(model: GPT) -> tuple[list[str], dict[str, Tensor]]:
    """The names of the layers with adapters in peft's configuration, and the adapters by peft's names, on the CPU.

    Raises UserError if no architecture of transformers has these layers.
    """
    settings = model.settings
    if settings.positions == "rope":  # Llama, or Arcee, whose MLP has no gate
        layers, place = LLAMA, "model.layers"
    elif settings.mlp == "gelu" and settings.positions == "learned":
        layers, place = GPT2, "transformer.h"
    else:
        raise UserError(
            f"no model of transformers has model.mlp={settings.mlp} and model.positions={settings.positions}, so its "
            "adapters have no names there: merge them instead"
        )
    targets: list[str] = []
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted(model):
        number = path.split(".")[1]
        for name, adapter in layer.each():
            parts = {name: slice(0, len(adapter.b))}
            if name == "qkv" and layers is LLAMA:  # the same A for all three
                block = model.blocks[int(number)]
                assert isinstance(block, Block)
                parts = {part: rows for part, rows in next(_rows(block))[2].items() if part != "qkv"}
            for part, rows in parts.items():
                if part not in layers:
                    raise UserError(
                        f"a GPT-2 of transformers has one layer for q, k and v, and model.lora_targets names {part}: "
                        "adapters on qkv can be exported, and others be merged"
                    )
                stem = f"base_model.model.{place}.{number}.{layers[part]}"
                tensors[f"{stem}.lora_A.weight"] = adapter.a.detach().cpu().clone()
                tensors[f"{stem}.lora_B.weight"] = adapter.b[rows].detach().cpu().contiguous().clone()
                targets += [layers[part]] * (layers[part] not in targets)
    return targets, tensors


def write_adapter(folder: Path, model: GPT, base: str | None = None) -> None:
    """Writes the adapters in peft's format: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: is made if it is missing.
        model: with adapters.
        base: the name or path of the frozen model, as peft's configuration keeps it.

    Raises UserError if the model has no adapters, or if no architecture of transformers has its layers.
    """
    settings, (targets, tensors) = model.settings, peft_tensors(model)
    if not tensors:
        raise UserError("this model has no adapters: it was not trained with model.lora_rank")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": settings.mlp == "gelu",  # GPT-2's layers keep their weights transposed
        "target_modules": targets,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
