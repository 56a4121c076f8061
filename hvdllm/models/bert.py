"""A bidirectional encoder with the head of a masked language model: BERT, by its settings.

With the same weights, its logits and gradients equal those of transformers' BertForMaskedLM up to rounding
(tests/models/test_bert.py). Sources: Devlin et al., 2018 (BERT); Xiong et al., 2020 (norms before each part instead of
after it). There are no segments, because a window is one text. The names of axes are those of gpt.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvdllm.models.gpt import Embedding, Linear, draw
from hvdllm.models.parts import Bert as Settings


class EncoderBlock(nn.Module):
    """Attention to all tokens of the window, and then an MLP with GELU. Norms come after each (BERT), or before."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.dropout, self.before = settings.heads, settings.dropout, settings.norm_first
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.up, self.down = Linear(width, settings.hidden), Linear(settings.hidden, width)
        self.mlp_norm = nn.LayerNorm(width, eps=settings.norm_eps)

    def attention(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTE, k_BHTE, v_BHTE = self.qkv(x_BTD).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, dropout_p=dropped)
        return F.dropout(self.out(y_BHTE.transpose(1, 2).reshape(B, T, D)), self.dropout, self.training)

    def mlp(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(self.down(F.gelu(self.up(x_BTD))), self.dropout, self.training)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.before:
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
            return x_BTD + self.mlp(self.mlp_norm(x_BTD))
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD))
        normed: Tensor = self.mlp_norm(x_BTD + self.mlp(x_BTD))
        return normed


class Bert(nn.Module):
    """An encoder over `vocab` token ids, a padded number. Its weights are not initialised; its output layer is tied."""

    def __init__(self, settings: Settings, vocab: int) -> None:
        super().__init__()
        self.settings = settings
        width, eps = settings.width, settings.norm_eps
        self.embed = Embedding(vocab, width)
        self.positions = Embedding(settings.context, width)
        self.embed_norm = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(EncoderBlock(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(width, eps=eps) if settings.norm_first else nn.Identity()
        self.head = Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=eps)
        self.head_bias = nn.Parameter(torch.empty(vocab))

    def features(self, ids_BT: Tensor) -> Tensor:
        """The residual stream after the last block, [B, T, D]."""
        x_BTD = self.embed_norm(self.embed(ids_BT) + self.positions.weight[: ids_BT.shape[1]])
        x_BTD = F.dropout(x_BTD, self.settings.dropout, self.training)
        for block in self.blocks:
            if self.settings.checkpointing:
                x_BTD = checkpoint(block, x_BTD, use_reentrant=False, preserve_rng_state=self.settings.dropout > 0)
            else:
                x_BTD = block(x_BTD)
        features: Tensor = self.norm(x_BTD)
        return features

    def logits(self, x_ND: Tensor) -> Tensor:
        """The logits of the tokens that stand where these features were taken, [N, V]."""
        return F.linear(self.head_norm(F.gelu(self.head(x_ND))), self.embed.weight, self.head_bias)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """The logits [B, T, V] of the token at each place of ids [B, T]."""
        return self.logits(self.features(ids_BT))

    def guesses(self, ids_BT: Tensor, targets_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The logits [N, V] and targets [N] of the places that count: those with a target that is not negative.

        Every sequence has `count` of them. Only they go through the head, and the host reads nothing.
        """
        places_Bn = (targets_BT >= 0).to(torch.int8).topk(count, dim=1).indices
        x_BTD = self.features(ids_BT)
        x_BnD = x_BTD.gather(1, places_Bn[:, :, None].expand(-1, -1, x_BTD.shape[2]))
        return self.logits(x_BnD.flatten(0, 1)), targets_BT.gather(1, places_Bn).flatten()


@torch.no_grad()
def init_weights(model: Bert, seed: int) -> None:
    """Initialises all weights by BERT's scheme: normal with deviation 0.02; biases are 0, weights of norms 1."""
    draw(model, seed, lambda name: 0.02)
