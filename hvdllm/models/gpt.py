"""A decoder-only transformer. Its settings make it GPT-2, Llama, or anything between them.

With the same weights, its logits and gradients equal those of transformers' GPT2LMHeadModel and LlamaForCausalLM
up to rounding (tests/models/test_oracle.py). Sources: Radford et al., 2019 (GPT-2); Touvron et al., 2023 (Llama);
Su et al., 2021 (rotary positions, the form that pairs feature i with i + E/2); Ainslie et al., 2023 (grouped
queries); Zhang and Sennrich, 2019 (RMSNorm); Shazeer, 2020 (SwiGLU).

Names end in their axes:
    B  sequences of the micro-batch     D  width of the residual stream     M  hidden features of the MLP
    T  tokens of a sequence             H  heads of queries                 V  vocabulary, padded
    E  features of a head, D / H        K  heads of keys, and of values     N  B x T, tokens of the micro-batch
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hvdllm.models.parts import Model
from hvdllm.models.size import has_qkv_bias

# TokenLoss takes so many tokens at a time that they have CHUNK logits (2 MiB in fp32, which fit into a core's cache),
# but not so few that the products become slow. A GPU has no such cache, and each chunk costs kernel launches.
CHUNK = 2**19
LEAST_ROWS = {"cpu": 256, "cuda": 2048}


class Linear(nn.Linear):
    """nn.Linear whose weights are not initialised here: init_weights does it, or they come from a checkpoint."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding whose weights are not initialised here, as in Linear."""

    def reset_parameters(self) -> None:
        pass


def make_norm(settings: Model) -> nn.Module:
    """The normalisation that the settings name, over the width of the residual stream."""
    if settings.norm == "rmsnorm":
        return nn.RMSNorm(settings.width, eps=settings.norm_eps)
    return nn.LayerNorm(settings.width, eps=settings.norm_eps, bias=settings.bias)


def rope_tables(context: int, features: int, theta: float, scaling: str | None = None) -> Tensor:
    """The cosine and the sine of position x frequency, [2, context, features / 2], in fp64.

    `scaling` is model.rope_scaling: `linear:F` divides all frequencies by F. `llama3:F:L:H:C` (Llama 3.1, Grattafiori
    et al., 2024) divides by F those that turn fewer than L times within C tokens, leaves those that turn more than H
    times, and goes linearly from one to the other in between.

    They are computed in fp64 whatever the model's dtype is, and rounded where they are used. In fp32 an angle of 2,000
    radians has lost three digits, which an fp64 model would never get back.
    """
    frequency_E2 = theta ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    if scaling is not None:
        factor, *more = map(float, scaling.split(":")[1:])
        kept_E2 = torch.zeros_like(frequency_E2)  # the share of a frequency that is not divided
        if more:
            low, high, trained = more
            turns_E2 = trained * frequency_E2 / (2 * math.pi)
            kept_E2 = ((turns_E2 - low) / (high - low)).clamp(0, 1)
        frequency_E2 = kept_E2 * frequency_E2 + (1 - kept_E2) * frequency_E2 / factor
    angle_TE2 = torch.outer(torch.arange(context, dtype=torch.float64), frequency_E2)
    return torch.stack([angle_TE2.cos(), angle_TE2.sin()])


def rotate(x_BHTE: Tensor, rope_2TE2: Tensor) -> Tensor:
    """Rotates each pair of features (i, i + E/2) of the token at place t by the angle t x frequency_i."""
    cos_TE2, sin_TE2 = rope_2TE2
    left, right = x_BHTE.chunk(2, dim=-1)
    return torch.cat([left * cos_TE2 - right * sin_TE2, right * cos_TE2 + left * sin_TE2], dim=-1)


def repeats_heads(q_BHTE: Tensor, mask_B1TT: Tensor | None = None) -> bool:
    """Whether the heads of keys and values must be repeated for the heads of queries that share them.

    In full precision, the only GPU kernel that supports shared heads keeps all T x T weights in memory. The kernel that
    does not keep them needs one head of keys and values for each head of queries. (Flash attention supports shared
    heads, in 16 bits and without a mask.)
    """
    return q_BHTE.is_cuda and (q_BHTE.dtype is torch.float32 or mask_B1TT is not None)


def places(begins_BT: Tensor) -> Tensor:
    """The place of each token in its document. begins: where documents begin; what precedes the first counts from 0."""
    at_T = torch.arange(begins_BT.shape[1], device=begins_BT.device)
    first_BT = (at_T * begins_BT).cummax(dim=1).values
    return at_T - first_BT


def inside_documents(begins_BT: Tensor) -> Tensor:
    """Which tokens [B, 1, T, T] each token attends to: those of its document up to itself. It takes B x T x T bytes."""
    document_BT = begins_BT.cumsum(dim=1)
    return (document_BT[:, None, :, None] == document_BT[:, None, None, :]).tril()


class Attention(nn.Module):
    """Causal self-attention. The rows of `qkv` are those of query heads, then of key heads, then of value heads."""

    def __init__(self, settings: Model) -> None:
        super().__init__()
        self.heads = settings.heads
        self.kv_heads = settings.kv_heads or settings.heads
        self.features = settings.width // settings.heads
        self.dropout = settings.dropout
        rows = (self.heads + 2 * self.kv_heads) * self.features
        self.qkv = Linear(settings.width, rows, bias=has_qkv_bias(settings))
        self.out = Linear(settings.width, settings.width, bias=settings.bias)

    def forward(self, x_BTD: Tensor, rope_2TE2: Tensor | None, mask_B1TT: Tensor | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        H, K = self.heads, self.kv_heads
        qkv_BHTE = self.qkv(x_BTD).view(B, T, H + 2 * K, self.features).transpose(1, 2)
        if rope_2TE2 is None:
            q_BHTE, k_BKTE, v_BKTE = qkv_BHTE.split([H, K, K], dim=1)
        else:
            qk_BHTE, v_BKTE = qkv_BHTE.split([H + K, K], dim=1)
            # Under autocast the tables are in fp32, and so is the rotation. Attention rounds its result to bf16.
            q_BHTE, k_BKTE = rotate(qk_BHTE, rope_2TE2).split([H, K], dim=1)
        if K < H and repeats_heads(q_BHTE, mask_B1TT):
            k_BKTE, v_BKTE = (x_BKTE.repeat_interleave(H // K, dim=1) for x_BKTE in (k_BKTE, v_BKTE))
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BKTE,
            v_BKTE,
            attn_mask=mask_B1TT,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B1TT is None,
            enable_gqa=k_BKTE.shape[1] < H,
        )
        y_BTD = self.out(y_BHTE.transpose(1, 2).reshape(B, T, D))
        return F.dropout(y_BTD, self.dropout, self.training)


class MLP(nn.Module):
    """GELU (in its tanh form) or SwiGLU. For SwiGLU `up` holds the rows of the gate, then those that it multiplies."""

    def __init__(self, settings: Model) -> None:
        super().__init__()
        hidden = settings.mlp_width or 4 * settings.width
        self.gated = settings.mlp == "swiglu"
        self.dropout = settings.dropout
        self.up = Linear(settings.width, 2 * hidden if self.gated else hidden, bias=settings.bias)
        self.down = Linear(hidden, settings.width, bias=settings.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTM = self.up(x_BTD)
        if self.gated:
            gate_BTM, h_BTM = h_BTM.chunk(2, dim=-1)
            h_BTM = F.silu(gate_BTM) * h_BTM
        else:
            h_BTM = F.gelu(h_BTM, approximate="tanh")
        return F.dropout(self.down(h_BTM), self.dropout, self.training)


class Block(nn.Module):
    """Attention and then the MLP. Each reads a normalised copy of the residual stream and adds its result to it."""

    def __init__(self, settings: Model) -> None:
        super().__init__()
        self.attention_norm = make_norm(settings)
        self.attention = Attention(settings)
        self.mlp_norm = make_norm(settings)
        self.mlp = MLP(settings)

    def forward(self, x_BTD: Tensor, rope_2TE2: Tensor | None, mask_B1TT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_2TE2, mask_B1TT)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD


class TokenLoss(torch.autograd.Function):
    """The sum of the cross entropies of the output layer. The logits of all tokens are never in memory at once.

    It equals F.cross_entropy(x @ head.T, target, reduction="sum") up to rounding, in its value and its gradients. With
    `masked`, negative targets are left out, as by ignore_index, without a read of where they are. Value and gradients
    are computed for one chunk of tokens after the other, while the logits of the chunk are in the cache. The gradient
    is computed in the forward already, and the backward only scales it. The idea is that of Liger's fused linear cross
    entropy (Hsu et al., 2024).

    A step of model=tiny takes 5 to 10 % less time, and with a vocabulary of 50,000 it saves gigabytes. Under autocast
    the products are in its dtype, the softmax and the sums over chunks in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, target_N: Tensor, graded: bool, masked: bool) -> Tensor:
        kind, (N, V) = x_ND.device.type, (len(x_ND), len(head_VD))
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        rows = max(LEAST_ROWS[kind], CHUNK // V)
        total = torch.zeros((), dtype=exact, device=x_ND.device)
        head_graded = graded and head_VD.requires_grad  # it may be frozen
        if graded:
            dx_ND, dhead_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD) if head_graded else None
        with torch.autocast(kind, enabled=False):
            head_VD = head_VD.to(dtype)
            for start in range(0, N, rows):
                x_nD = x_ND[start : start + rows].to(dtype)
                target_n1 = target_N[start : start + rows, None]
                logits_nV = (x_nD @ head_VD.T).to(exact)
                p_nV = logits_nV.softmax(dim=-1)
                # The largest probability is at least 1 / V, so its logarithm is exact. This takes less time than
                # log_softmax and exp of all logits.
                log_sum_n1 = logits_nV.amax(-1, keepdim=True) - p_nV.amax(-1, keepdim=True).log()
                if masked:
                    counts_n1 = (target_n1 >= 0).to(exact)
                    target_n1 = target_n1.clamp(min=0)
                log_p_n1 = logits_nV.gather(1, target_n1) - log_sum_n1
                del logits_nV  # or it would lie beside those of the next chunk
                total -= (log_p_n1 * counts_n1 if masked else log_p_n1).sum()
                if graded:
                    dlogits_nV = p_nV
                    dlogits_nV.scatter_add_(1, target_n1, dlogits_nV.new_full(target_n1.shape, -1.0))
                    if masked:
                        dlogits_nV *= counts_n1
                    dlogits_nV = dlogits_nV.to(dtype)
                    dx_ND[start : start + rows] = dlogits_nV @ head_VD
                    if dhead_VD is not None:
                        dhead_VD += dlogits_nV.T @ x_nD
        if graded:
            ctx.save_for_backward(dx_ND, dhead_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        dx_ND, dhead_VD = ctx.saved_tensors
        return grad * dx_ND, None if dhead_VD is None else grad * dhead_VD, None, None, None


class GPT(nn.Module):
    """A decoder-only transformer over `vocab` token ids, a number that size.rows gives.

    Its weights are not initialised. Its parameters are registered in the order in which the forward uses them. A tied
    output layer is no parameter of its own: it reads `embed.weight`, and so it stays tied when the trainer moves the
    data of that parameter into its flat vector. The model computes in the dtype of its parameters.

    `end` is the token between documents. With settings.documents attention stays inside a document, which begins at its
    end token, as a sample does. Learned positions begin anew there; rotary ones are relative anyway.
    """

    def __init__(self, settings: Model, vocab: int, end: int | None = None) -> None:
        super().__init__()
        self.settings, self.end = settings, end if settings.documents else None
        self.embed = Embedding(vocab, settings.width)
        learned = settings.positions == "learned"
        self.positions = Embedding(settings.context, settings.width) if learned else None
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = make_norm(settings)
        self.head = None if settings.tied else Linear(settings.width, vocab, bias=False)
        features = settings.width // settings.heads
        rope = None
        if not learned:
            rope = rope_tables(settings.context, features, settings.rope_theta, settings.rope_scaling)
        self.rope: Tensor | None
        self.register_buffer("rope", rope, persistent=False)

    @property
    def output(self) -> Tensor:
        """The weights of the output layer, [V, D]."""
        return self.embed.weight if self.head is None else self.head.weight

    def features(self, ids_BT: Tensor) -> Tensor:
        """The input of the output layer: the normalised residual stream after the last block, [B, T, D]."""
        T = ids_BT.shape[1]
        x_BTD = self.embed(ids_BT)
        begins_BT = None if self.end is None else ids_BT == self.end
        if self.positions is not None:
            learned = self.positions.weight[:T] if begins_BT is None else self.positions(places(begins_BT))
            x_BTD = x_BTD + learned
        mask_B1TT = None if begins_BT is None else inside_documents(begins_BT)
        rope_2TE2 = None if self.rope is None else self.rope[:, :T].to(x_BTD.dtype)
        x_BTD = F.dropout(x_BTD, self.settings.dropout, self.training)
        for block in self.blocks:
            if self.settings.checkpointing:
                x_BTD = checkpoint(
                    block,
                    x_BTD,
                    rope_2TE2,
                    mask_B1TT,
                    use_reentrant=False,
                    preserve_rng_state=self.settings.dropout > 0,  # saving it costs a copy a block
                )
            else:
                x_BTD = block(x_BTD, rope_2TE2, mask_B1TT)
        features: Tensor = self.norm(x_BTD)
        return features

    def forward(self, ids_BT: Tensor) -> Tensor:
        """The logits [B, T, V] of the token after each of ids [B, T], integers below V; T is at most `context`."""
        return F.linear(self.features(ids_BT), self.output)

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor, masked: bool = False) -> Tensor:
        """The sum (not the mean) of -ln p(target) over the B x T tokens, in nats: an fp32 scalar, fp64 in fp64 models.

        Targets are int64. If `masked` is true they may be negative, and then do not count. Padded ids take part in the
        softmax, as in nanoGPT. They are never a target, so their probability soon is nearly zero.
        """
        x_ND, target_N = self.features(inputs_BT).flatten(0, 1), targets_BT.flatten()
        if masked and not x_ND.is_cuda:  # to read where they are stops no queue here, and spares their logits
            counts_N = target_N >= 0
            x_ND, target_N, masked = x_ND[counts_N], target_N[counts_N], False
        # It must be told: inside its forward autograd is always off, and needs_input_grad is true under no_grad too.
        graded = torch.is_grad_enabled()
        total: Tensor = TokenLoss.apply(x_ND, self.output, target_N, graded, masked)  # type: ignore[no-untyped-call]
        return total


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Initialises all weights by GPT-2's scheme.

    Weights are normal with deviation 0.02, or 0.02 / sqrt(2 x layers) in the two layers of a block that add to the
    residual stream. Biases are 0, and the weights of norms are 1.

    """

    def deviation(name: str) -> float:
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        return 0.02 / math.sqrt(2 * model.settings.layers) if residual else 0.02

    draw(model, seed, deviation)


@torch.no_grad()
def draw(model: nn.Module, seed: int, deviation: Callable[[str], float]) -> None:
    """Draws weights from a normal distribution; biases become 0, and other vectors, which are weights of norms, 1.

    They are drawn on the CPU in fp32, in order of registration, from a generator of their own. So the same seed gives
    the same weights on every rank, on every device and in every precision, and the global generators stay as they were.

    Args:
        model: whose weights are drawn.
        seed: of the run.
        deviation: the standard deviation for a parameter of this name.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation(name), generator=generator))


def compile_blocks(model: nn.Module, backend: str | Callable[..., object] = "inductor") -> None:
    """Compiles each block in place with torch.compile.

    The whole model is never compiled as one: its backward would be a single graph, and all gradient hooks would fire in
    the last half millisecond of it.
    """
    for block in model.get_submodule("blocks").children():
        block.compile(backend=backend)
