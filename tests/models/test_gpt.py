"""The module by itself: its loss, its weights, its dtypes, and what must not change them."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hvdllm.models import gpt
from hvdllm.models.gpt import GPT, compile_blocks, init_weights
from hvdllm.models.parts import Model

GPT2 = dict(layers=2, width=32, heads=4, context=16)
LLAMA = dict(GPT2, kv_heads=2, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False)
BOTH = pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
VOCAB = 64


def build(shape: dict, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, **more: object) -> GPT:
    model = GPT(Model(**{**shape, **more}), vocab).to(dtype)
    init_weights(model, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p *= 5 if p.dim() > 1 else 1  # larger than GPT-2's scheme, so that attention and MLP matter for the logits
    return model


def draw(sequences: int = 2, vocab: int = VOCAB, tokens: int = 16) -> tuple[Tensor, Tensor]:
    ids_BS = torch.randint(vocab, (sequences, tokens + 1), generator=torch.Generator().manual_seed(1))
    return ids_BS[:, :-1], ids_BS[:, 1:]


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


# ------------------------------------------------------------------ the loss
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_the_sum_of_cross_entropies(shape: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, the last one shorter, with an upstream gradient that is not 1."""
    monkeypatch.setattr(gpt, "CHUNK", 7 * VOCAB)
    monkeypatch.setattr(gpt, "LEAST_ROWS", {"cpu": 5})
    model, (inputs_BT, targets_BT) = build(shape, dtype=dtype), draw()
    logits_NV = model(inputs_BT).flatten(0, 1)
    plain = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")
    loss = model.loss(inputs_BT, targets_BT)
    assert loss.dtype == dtype and loss.shape == ()
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, plain, **close)
    for mine, theirs in zip(gradients(model, 0.5 * loss), gradients(model, 0.5 * plain), strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(inputs_BT, targets_BT), plain, **close)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_targets_are_left_out(shape: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk in which every target is masked, one in which none is, and values as by ignore_index."""
    monkeypatch.setattr(gpt, "CHUNK", 7 * VOCAB)
    monkeypatch.setattr(gpt, "LEAST_ROWS", {"cpu": 7})
    model, (inputs_BT, targets_BT) = build(shape, dtype=dtype), draw()
    targets_BT = targets_BT.masked_fill(torch.arange(32).view(2, 16) < 9, -1).index_fill(1, torch.tensor([15]), -1)
    logits_NV = model(inputs_BT).flatten(0, 1)
    plain = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum", ignore_index=-1)
    loss = model.loss(inputs_BT, targets_BT, masked=True)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, plain, **close)
    for mine, theirs in zip(gradients(model, 0.5 * loss), gradients(model, 0.5 * plain), strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    x_ND = model.features(inputs_BT).flatten(0, 1)  # as on a GPU, where no host looks at the targets
    blind = gpt.TokenLoss.apply(x_ND, model.output, targets_BT.flatten(), True, True)
    torch.testing.assert_close(blind, plain, **close)
    for mine, theirs in zip(
        gradients(model, blind), gradients(model, model.loss(inputs_BT, targets_BT, True)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **close)
    whole = draw()
    assert torch.equal(model.loss(*whole), model.loss(*whole, masked=True)), "nothing is masked: the same to the bit"
    nothing = model.loss(inputs_BT, torch.full_like(targets_BT, -1), masked=True)
    assert nothing == 0 and all(not g.any() for g in gradients(model, nothing))


def test_an_evaluation_computes_no_gradient() -> None:
    model, (inputs_BT, targets_BT) = build(GPT2), draw()
    with torch.no_grad(), FlopCounterMode(display=False) as logits:
        model(inputs_BT)
    with torch.no_grad(), FlopCounterMode(display=False) as loss:
        model.loss(inputs_BT, targets_BT)
    assert loss.get_total_flops() == logits.get_total_flops()


def test_loss_adds_up_over_micro_batches() -> None:
    model, (inputs_BT, targets_BT) = build(GPT2, dtype=torch.float64), draw(sequences=3)
    whole = gradients(model, model.loss(inputs_BT, targets_BT))
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 3)):
        model.loss(inputs_BT[part], targets_BT[part]).backward()
    for p, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-12)


@BOTH
def test_a_later_token_changes_no_earlier_logit(shape: dict) -> None:
    model, (ids_BT, _) = build(shape), draw()
    before_BTV = model(ids_BT)
    ids_BT = ids_BT.clone()
    ids_BT[:, 9] = (ids_BT[:, 9] + 1) % VOCAB
    after_BTV = model(ids_BT)
    assert torch.equal(before_BTV[:, :9], after_BTV[:, :9])
    changed_T = (before_BTV[:, 9:] != after_BTV[:, 9:]).any(-1).all(0)
    assert changed_T.all()


@BOTH
def test_order_of_tokens_matters(shape: dict) -> None:
    """Without positions, attention sees a set: the last logits would not know which of two came first."""
    model, (ids_BT, _) = build(shape, layers=1, dtype=torch.float64), draw(sequences=1)
    swapped_BT = ids_BT[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model(ids_BT)[:, -1], model(swapped_BT)[:, -1], rtol=1e-6)


# ------------------------------------------------------------------ the same gradients by other ways
@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(shape: dict, dropout: float) -> None:
    inputs_BT, targets_BT = draw()
    plain, again = build(shape, dropout=dropout), build(shape, dropout=dropout, checkpointing=True)
    calls = []
    again.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    expected = gradients(plain, plain.loss(inputs_BT, targets_BT))
    torch.manual_seed(5)
    found = gradients(again, again.loss(inputs_BT, targets_BT))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(calls) == 2, "the block ran once more in the backward"
    with torch.no_grad():
        again.eval().loss(inputs_BT, targets_BT)
    assert len(calls) == 3


@BOTH
def test_compiled_blocks_give_the_same_gradients(shape: dict) -> None:
    """Traced and differentiated by torch.compile, without the C++ compiler's seconds (backend aot_eager)."""
    inputs_BT, targets_BT = draw()
    plain = build(shape)
    compiled = copy.deepcopy(plain)
    names = [name for name, _ in compiled.named_parameters()]
    with warnings.catch_warnings():
        # Both from within torch's compiler: it imports what torch deprecated, and looks at .grad of what it traces.
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend("aot_eager")
        compile_blocks(compiled, backend=counter)
        found = gradients(compiled, compiled.loss(inputs_BT, targets_BT))
    assert counter.frame_count >= 1
    assert [name for name, _ in compiled.named_parameters()] == names
    expected = gradients(plain, plain.loss(inputs_BT, targets_BT))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the parameters
def test_parameters_are_registered_in_the_order_of_the_forward() -> None:
    model = build(LLAMA, positions="learned", bias=True)
    registered = list(dict.fromkeys(name.rsplit(".", 1)[0] for name, _ in model.named_parameters()))
    assert registered == [
        "embed",
        "positions",
        *(
            f"blocks.{i}.{layer}"
            for i in range(2)
            for layer in ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")
        ),
        "norm",
        "head",
    ]
    used: list[str] = []
    for name, module in model.named_modules():
        if name in registered:
            module.register_forward_pre_hook(lambda *_, name=name: used.append(name))
    model(draw()[0])
    assert used == [name for name in registered if name in used] and len(used) == len(registered) - 2


@BOTH
def test_weights_live_on_as_views_of_one_vector(shape: dict) -> None:
    """What flat.py does: tied weights stay tied, and the vector alone decides the logits."""
    model, (inputs_BT, targets_BT) = build(shape), draw()
    before = model(inputs_BT)
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    grads, at = torch.zeros_like(flat), 0
    for p in model.parameters():
        part = slice(at, at + p.numel())
        flat[part] = p.detach().flatten()
        p.data, p.grad = flat[part].view_as(p), grads[part].view_as(p)
        at += p.numel()
    assert torch.equal(model(inputs_BT), before)
    assert (model.output is model.embed.weight) == (shape is GPT2)
    model.loss(inputs_BT, targets_BT).backward()
    assert all(
        p.grad.data_ptr() == grads[i:].data_ptr() for p, i in zip(model.parameters(), starts(model), strict=True)
    )
    flat.zero_()
    assert not model(inputs_BT).any()


def starts(model: GPT) -> list[int]:
    return [0, *np.cumsum([p.numel() for p in model.parameters()])[:-1].tolist()]


def test_the_seed_alone_decides_the_weights() -> None:
    def draw_weights(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        model = GPT(Model(layers=2, width=128), 2048).to(dtype)
        init_weights(model, seed)
        return list(model.parameters())

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw_weights(7)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    torch.rand(3)
    torch.set_num_threads(2)  # the fixture puts it back
    second = draw_weights(7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.double(), b) for a, b in zip(first, draw_weights(7, torch.float64), strict=True))
    assert not torch.equal(first[0], draw_weights(8)[0])


def test_weights_follow_gpt2s_scheme() -> None:
    model = GPT(Model(layers=8, width=128, tied=False), 512)
    init_weights(model, 0)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < 0.05 * expected, name


# ------------------------------------------------------------------ dtypes
def test_rope_keeps_the_digits_of_fp64() -> None:
    model = build(LLAMA, dtype=torch.float64, context=2048)
    angle_TE2 = np.arange(2048)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    assert model.rope.dtype == torch.float64
    np.testing.assert_allclose(model.rope[0].numpy(), np.cos(angle_TE2), atol=1e-12)
    np.testing.assert_allclose(model.rope[1].numpy(), np.sin(angle_TE2), atol=1e-12)
    assert model(draw()[0]).dtype == torch.float64
    assert "rope" not in model.state_dict()


@BOTH
def test_autocast_computes_products_in_bf16_and_the_rest_in_fp32(shape: dict) -> None:
    model, (inputs_BT, targets_BT) = build(shape), draw(sequences=8)
    exact = model.loss(inputs_BT, targets_BT)
    exact_gradients = gradients(model, exact)
    dtypes: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding):
            module.register_forward_hook(lambda _m, _i, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(inputs_BT, targets_BT)
    found = gradients(model, loss)
    assert loss.dtype == torch.float32
    for name, dtype in dtypes.items():
        assert dtype == (torch.bfloat16 if name.endswith(("qkv", "out", "up", "down")) else torch.float32), name
    assert exact.item() != loss.item(), "nothing was rounded to bf16"
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    for mine, theirs in zip(found, exact_gradients, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.05 * theirs.norm() + 0.02


def test_loss_under_autocast_is_no_bf16_sum() -> None:
    """Thousands of nats in bf16 are known to a step of 32; and the gradient of the head adds up in fp32."""
    model = build(GPT2, context=128)
    inputs_BT, targets_BT = draw(sequences=16, tokens=128)
    with torch.autocast("cpu", torch.bfloat16):
        logits_NV = model(inputs_BT).flatten(0, 1)
        assert logits_NV.dtype == torch.bfloat16
        plain = F.cross_entropy(logits_NV.float(), targets_BT.flatten(), reduction="sum")
        assert model.loss(inputs_BT, targets_BT).item() == pytest.approx(plain.item(), rel=1e-5)


def test_the_output_layer_is_a_bf16_product_under_autocast() -> None:
    x_ND, head_VD = torch.randn(50, 32), torch.randn(VOCAB, 32)
    target_N = torch.arange(50)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gpt.TokenLoss.apply(x_ND, head_VD, target_N, False, False)
    logits_NV = (x_ND.bfloat16() @ head_VD.bfloat16().T).float()
    torch.testing.assert_close(rounded, F.cross_entropy(logits_NV, target_N, reduction="sum"), rtol=1e-6, atol=0)


# ------------------------------------------------------------------ dropout
@BOTH
def test_dropout_draws_from_the_global_generator_and_in_training_only(shape: dict) -> None:
    inputs_BT, _ = draw()
    model = build(shape, dropout=0.5)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(inputs_BT)

    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))
    assert torch.equal(logits(1), build(shape)(inputs_BT)), "dropout changes what eval computes"


@BOTH
def test_no_dropout_draws_nothing(shape: dict) -> None:
    model, (inputs_BT, targets_BT) = build(shape), draw()
    state = torch.get_rng_state()
    model.loss(inputs_BT, targets_BT).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_heads_repeated_for_those_that_share_them_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in full precision, where no kernel that spares the T x T weights knows shared heads."""
    model, (inputs_BT, targets_BT) = build(LLAMA), draw()
    shared = gradients(model, model.loss(inputs_BT, targets_BT))
    asked: list[bool] = []
    attention = F.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **rest: object) -> Tensor:
        asked.append(enable_gqa)
        assert q.shape == k.shape == v.shape
        return attention(q, k, v, **rest)

    monkeypatch.setattr(gpt, "repeats_heads", lambda q, mask: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    repeated = gradients(model, model.loss(inputs_BT, targets_BT))
    assert asked == [False, False]
    for mine, theirs in zip(repeated, shared, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
