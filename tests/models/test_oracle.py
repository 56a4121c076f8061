"""With the same weights, logits and gradients equal those of transformers' GPT-2 and Llama classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hugging_kit import randomize, transformers
from torch import Tensor, nn

from hvdllm.models.gpt import GPT
from hvdllm.models.parts import Model

VOCAB, B, T = 128, 3, 24
# Of a tensor's largest value. Measured: at most 2e-6 and 5e-15, the order of sums and nothing else.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
FP32_FP64 = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def from_gpt2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT2LMHeadModel's weights, or their gradients, by our names. Its matrices are [in, out]."""
    ours = {}
    for name, value in theirs.items():
        *path, layer, kind = name.removeprefix("transformer.").split(".")
        layer = {
            "wte": "embed",
            "wpe": "positions",
            "ln_1": "attention_norm",
            "ln_2": "mlp_norm",
            "ln_f": "norm",
            "lm_head": "head",
            "c_attn": "attention.qkv",
            "c_fc": "mlp.up",
            "c_proj": "mlp.down" if "mlp" in path else "attention.out",
        }[layer]
        block = f"blocks.{path[1]}." if path else ""
        transposed = layer.startswith(("attention.", "mlp.")) and kind == "weight"
        ours[f"{block}{layer}.{kind}"] = value.T if transposed else value
    return ours


def from_llama(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """LlamaForCausalLM's weights, or their gradients, by our names. It has in parts what we have in one."""
    rest = {name.removeprefix("model.").removesuffix(".weight"): value for name, value in theirs.items()}
    ours = {"embed": rest.pop("embed_tokens"), "norm": rest.pop("norm")}
    if "lm_head" in rest:
        ours["head"] = rest.pop("lm_head")
    for i in range(2):
        take = {name: rest.pop(name) for name in list(rest) if name.startswith(f"layers.{i}.")}
        part = {name.split(".")[-1]: value for name, value in take.items()}
        ours |= {
            f"blocks.{i}.attention_norm": part["input_layernorm"],
            f"blocks.{i}.attention.qkv": torch.cat([part["q_proj"], part["k_proj"], part["v_proj"]]),
            f"blocks.{i}.attention.out": part["o_proj"],
            f"blocks.{i}.mlp_norm": part["post_attention_layernorm"],
            f"blocks.{i}.mlp.up": torch.cat([part["gate_proj"], part["up_proj"]]),
            f"blocks.{i}.mlp.down": part["down_proj"],
        }
    assert not rest
    return {f"{name}.weight": value for name, value in ours.items()}


def same(mine: Tensor, theirs: Tensor, name: str) -> None:
    error = float(((mine - theirs).abs().max() / theirs.abs().max()).detach())
    assert error < TOLERANCE[mine.dtype], f"{name} differs by {error:.1e} of the largest value"


def compare(theirs: nn.Module, settings: Model, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Load ours from theirs; then logits, loss and all gradients must agree."""
    dtype = next(theirs.parameters()).dtype
    mine = GPT(settings, VOCAB).to(dtype)
    mine.load_state_dict(rename({name: p for name, p in theirs.named_parameters()}))
    ids_BS = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(2))
    inputs_BT, targets_BT = ids_BS[:, :-1], ids_BS[:, 1:]

    logits_BTV = theirs(inputs_BT).logits
    same(mine(inputs_BT), logits_BTV, "logits")
    total = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    total.backward()
    loss = mine.loss(inputs_BT, targets_BT)
    loss.backward()
    same(loss, total, "loss")

    gradients = rename({name: p.grad for name, p in theirs.named_parameters()})
    for name, p in mine.named_parameters():
        same(p.grad, gradients[name], name)


@FP32_FP64
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(attention: str, tied: bool, dtype: torch.dtype) -> None:
    settings = Model(layers=2, width=32, heads=4, context=T, tied=tied)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=T,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    theirs = transformers.GPT2LMHeadModel(config).to(dtype)
    randomize(theirs)
    compare(theirs, settings, from_gpt2)


def build_llama(kv_heads: int, tied: bool, attention: str, theta: float = 10000.0) -> tuple[nn.Module, Model]:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=T,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    theirs = transformers.LlamaForCausalLM(config)
    settings = Model(
        layers=2,
        width=32,
        heads=4,
        kv_heads=kv_heads,
        mlp_width=48,
        context=T,
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        tied=tied,
        rope_theta=theta,
    )
    return theirs, settings


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, False), (1, True)])
def test_llama(kv_heads: int, tied: bool, attention: str) -> None:
    theirs, settings = build_llama(kv_heads, tied, attention)
    randomize(theirs)
    compare(theirs, settings, from_llama)


@pytest.mark.parametrize(("kv_heads", "theta"), [(4, 10000.0), (2, 500.0)])
def test_llama_in_fp64(kv_heads: int, theta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms and rotary tables in fp32 whatever the dtype: here both are replaced in it by
    their formulas in fp64, so that all the rest can be compared to fp64 rounding."""

    class Norm(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)

    def rotary(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.tensor([theta ** -(2 * i / 8) for i in range(4)], dtype=torch.float64)
        angle = position_ids[..., None].double() * torch.cat([inverse, inverse])
        return angle.cos(), angle.sin()

    theirs, settings = build_llama(kv_heads, tied=False, attention="sdpa", theta=theta)  # eager has an fp32 softmax
    theirs.double()
    for layer in theirs.model.layers:
        layer.input_layernorm = Norm(layer.input_layernorm.weight)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm.weight)
    theirs.model.norm = Norm(theirs.model.norm.weight)
    monkeypatch.setattr(theirs.model.rotary_emb, "forward", rotary)
    randomize(theirs)
    compare(theirs, settings, from_llama)
