"""Adapters: what they compute, what is frozen, and that transformers and peft take them as they are written."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.flat import Flat
from hvdllm.models import size
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.lora import Adapted, adapt, adapted, merge, write_adapter
from hvdllm.models.parts import Model
from hvdllm.task.causal_lm import CausalLM

os.environ["HF_HUB_OFFLINE"] = "1"
VOCAB = 128
GPT2 = dict(layers=2, width=32, heads=4, context=24, lora_rank=3, lora_alpha=12.0)
LLAMA = dict(GPT2, kv_heads=2, mlp_width=48, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False)
CASES = [
    pytest.param(GPT2, ["qkv"], id="gpt2-qkv"),
    pytest.param(GPT2, ["qkv", "out", "up", "down"], id="gpt2-all"),
    pytest.param(LLAMA, ["q", "v"], id="llama-qv"),
    pytest.param(LLAMA, ["qkv", "down"], id="llama-qkv"),
    pytest.param(LLAMA, ["q", "k", "v", "out", "gate", "up", "down"], id="llama-all"),
]


def build(shape: dict[str, Any], targets: list[str] | str, trained: bool = True, **more: object) -> GPT:
    """A model in fp64. trained: its B are not 0 any more."""
    model = GPT(Model(**{**shape, "lora_targets": targets, **more}), VOCAB).double()
    init_weights(model, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p *= 5 if p.dim() > 1 else 1
    adapt(model, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in adapted(model) if trained else []:
            for _, adapter in layer.each():
                adapter.b += 0.3 * torch.randn(adapter.b.shape, generator=generator)
    return model


def draw() -> Tensor:
    return torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("shape", "targets"), CASES)
def test_an_adapter_adds_its_product(shape: dict[str, Any], targets: list[str]) -> None:
    """At first nothing; then merged weights compute the same, and only adapters get gradients."""
    plain = GPT(Model(**{**shape, "lora_rank": 0}), VOCAB).double()
    fresh = build(shape, targets, trained=False)
    plain.load_state_dict({name: p for name, p in fresh.state_dict().items() if "adapters" not in name})
    ids = draw()
    assert torch.equal(fresh(ids), plain(ids))
    model = build(shape, targets)
    loss = model.loss(ids, ids.roll(-1))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("adapters" in name) == (p.grad is not None and bool(p.grad.any())), name
    merged = merge(copy.deepcopy(model))
    assert not adapted(merged) and merged.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(model(ids), plain(ids))
    torch.testing.assert_close(merged(ids), model(ids), rtol=1e-10, atol=1e-12)


def test_checkpointing_gives_the_same_gradients() -> None:
    ids, grads = draw(), []
    for checkpointing in (False, True):
        model = build(LLAMA, ["q", "v", "down"], checkpointing=checkpointing)
        model.loss(ids, ids.roll(-1)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("shape", "targets"), CASES)
def test_only_adapters_are_in_the_flat_map_and_counts_tell_both(shape: dict[str, Any], targets: list[str]) -> None:
    model = build(shape, targets)
    settings, count = model.settings, sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flat = Flat(model, 1, 1e9)
    assert flat.at.keys() == {name for name, _ in model.named_parameters() if "adapters" in name}
    assert size.count_adapters(settings) == trained
    assert size.count_parameters(settings, VOCAB) == count - trained
    memory = size.memory(settings, VOCAB, "fp32")
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count, 4 * trained, 8 * trained)


def test_the_task_counts_and_the_room_is_smaller() -> None:
    whole = compose([])
    words = ["model.lora_rank=4", "model.lora_targets=[qkv,down]"]
    config = compose(words)
    task, plain = CausalLM(config, 257), CausalLM(whole, 257)
    model = task.build()
    assert task.parameters == sum(p.numel() for p in model.parameters())
    assert task.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad) == plain.parameters
    assert plain.frozen == 0 and task.flops < 0.8 * plain.flops
    least = [size.least_memory(one.config, one.parameters, 0, 1, one.frozen) for one in (task, plain)]
    assert 4 * task.parameters < least[0] < 0.4 * least[1]
    same, other = CausalLM(config, 257).build(), CausalLM(compose([*words, "seed=1"]), 257).build()
    a = "blocks.1.attention.qkv.adapters.qkv.a"
    assert torch.equal(model.get_parameter(a), same.get_parameter(a)), "drawn from the seed"
    assert not torch.equal(model.get_parameter(a), other.get_parameter(a))
    assert model.get_parameter(a).abs().max() <= 128**-0.5 < 1.1 * model.get_parameter(a).abs().max()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["gate"], "names 'gate', which this model has not: choose of q, k, v, qkv, out, up, down"),
        (["c_attn"], "names 'c_attn'"),
        (["qkv", "q"], "nothing twice"),
        ([], "must name something"),
    ],
)
def test_targets_that_do_not_exist_are_refused(words: list[str], match: str) -> None:
    problem = Model(lora_rank=2, lora_targets=words).problem()
    assert problem is not None and match in problem
    assert Model(lora_rank=2, lora_targets="qkv").problem() is None
    assert Model(lora_rank=2, lora_targets=["gate"], mlp="swiglu").problem() is None


# ------------------------------------------------------------------ transformers and peft
def theirs_of(model: GPT) -> nn.Module:
    """The frozen weights in the class of transformers."""
    transformers = pytest.importorskip("transformers")
    s = model.settings
    state = {name: p for name, p in model.state_dict().items() if "adapters" not in name}
    if s.mlp == "gelu":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=s.context, n_embd=s.width, n_layer=s.layers, n_head=s.heads
        )
        made = transformers.GPT2LMHeadModel(config).double().eval()
        names = {"embed": "wte", "positions": "wpe", "norm": "ln_f", "attention_norm": "ln_1", "mlp_norm": "ln_2"}
        names |= {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj"}
        names |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        found = {}
        for name, p in state.items():
            *block, rest = name.split(".", 2) if name.startswith("blocks") else [name]
            layer, _, kind = rest.rpartition(".")
            matrix = layer.startswith(("attention.", "mlp.")) and kind == "weight"
            found[f"transformer.{f'h.{block[1]}.' if block else ''}{names[layer]}.{kind}"] = p.T if matrix else p
        missing, unexpected = made.load_state_dict(found, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
        return made
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=s.width, intermediate_size=s.mlp_width, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, max_position_embeddings=s.context,
        rms_norm_eps=s.norm_eps, rope_theta=s.rope_theta, tie_word_embeddings=False,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).double().eval()
    state = {name.removesuffix(".weight"): p for name, p in state.items()}
    found = {"model.embed_tokens": state["embed"], "model.norm": state["norm"], "lm_head": state["head"]}
    for i in range(s.layers):
        ours, there = f"blocks.{i}", f"model.layers.{i}"
        q, k, v = state[f"{ours}.attention.qkv"].split([s.width, s.width // 2, s.width // 2])
        gate, up = state[f"{ours}.mlp.up"].chunk(2)
        found |= {f"{there}.self_attn.{n}_proj": x for n, x in zip("qkv", (q, k, v), strict=True)}
        found |= {f"{there}.self_attn.o_proj": state[f"{ours}.attention.out"], f"{there}.mlp.gate_proj": gate}
        found |= {f"{there}.mlp.up_proj": up, f"{there}.mlp.down_proj": state[f"{ours}.mlp.down"]}
        found |= {f"{there}.input_layernorm": state[f"{ours}.attention_norm"]}
        found |= {f"{there}.post_attention_layernorm": state[f"{ours}.mlp_norm"]}
    made.load_state_dict({f"{name}.weight": p for name, p in found.items()})
    return made


def same(a: Tensor, b: Tensor) -> None:
    """Up to the rotary tables of transformers, which are in fp32. A wrong adapter changes half of the largest value."""
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize(("shape", "targets"), CASES)
def test_written_adapters_fit_transformers(shape: dict[str, Any], targets: list[str], tmp_path: Path) -> None:
    """By peft's names and formula, W + B A alpha / r, the model of transformers computes what ours does."""
    model, ids = build(shape, targets), draw()
    write_adapter(tmp_path / "a", model, "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    theirs = theirs_of(model)
    stems = {name.partition(".lora_")[0] for name in tensors}
    assert len(tensors) == 2 * len(stems)
    with torch.no_grad():
        for stem in stems:
            layer = theirs.get_submodule(stem.removeprefix("base_model.model."))
            assert any(stem.endswith(f".{target}") for target in config["target_modules"])
            change = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            change = change * config["lora_alpha"] / config["r"]
            assert isinstance(layer.weight, Tensor)
            layer.weight += change.T if config["fan_in_fan_out"] else change
        same(theirs(ids).logits, model(ids))


@pytest.mark.parametrize(("shape", "targets"), CASES)
def test_peft_loads_them(shape: dict[str, Any], targets: list[str], tmp_path: Path) -> None:
    """With equal logits and, for layers that it has one by one, equal gradients."""
    peft = pytest.importorskip("peft")
    model, ids = build(shape, targets), draw()
    write_adapter(tmp_path / "a", model)
    theirs = peft.PeftModel.from_pretrained(theirs_of(model), tmp_path / "a", is_trainable=True).double()
    logits = theirs(ids).logits
    same(logits, model(ids))
    logits.logsumexp(-1).sum().backward()
    model(ids).logsumexp(-1).sum().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for path, layer in adapted(model):
        for name, adapter in layer.each():
            assert isinstance(layer, Adapted)
            own = [g for key, g in grads.items() if f".{path.split('.')[1]}." in key and g.shape == adapter.b.shape]
            if name != "qkv" or shape is GPT2:
                assert any(torch.allclose(g, adapter.b.grad, rtol=1e-4, atol=1e-4) for g in own), (path, name)


def test_what_has_no_names_in_transformers_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has one layer for q, k and v, and model\.lora_targets names q"):
        write_adapter(tmp_path, build(GPT2, ["q"]))
    with pytest.raises(UserError, match=r"no model of transformers has model\.mlp=swiglu and model\.positions=learned"):
        write_adapter(tmp_path, build(dict(GPT2, mlp="swiglu"), ["qkv"]))
    plain = GPT(Model(layers=1, width=16, heads=2), VOCAB)
    with pytest.raises(UserError, match="this model has no adapters"):
        write_adapter(tmp_path, plain)
