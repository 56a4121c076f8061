"""A small residual network for images (He et al., 2015), with GroupNorm (Wu and He, 2018) or BatchNorm.

Stages of basic blocks: two 3 x 3 convolutions each, beside a shortcut. Every stage after the first halves height and
width and doubles the channels. The mean over all places goes through one linear layer.

With GroupNorm an image's gradient depends on that image alone, so any number of ranks computes the same. With BatchNorm
it depends on the images of the same micro-batch, and each rank keeps running means of its own (trainer/buffers.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdllm.models.gpt import Linear, draw
from hvdllm.models.parts import ResNet as Settings


class Conv(nn.Conv2d):
    """nn.Conv2d of 3 x 3 or 1 x 1 without a bias, whose weights are not initialised here."""

    def __init__(self, channels: int, out: int, size: int, stride: int = 1) -> None:
        super().__init__(channels, out, size, stride, padding=size // 2, bias=False)

    def reset_parameters(self) -> None:
        pass


def make_norm(settings: Settings, channels: int) -> nn.Module:
    """The normalisation that the settings name. Groups have four channels, or as many as divide their number."""
    if settings.norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 4)), channels)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution of 1 x 1 where the shape changes."""

    def __init__(self, settings: Settings, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = Conv(channels, out, 3, stride), make_norm(settings, out)
        self.second, self.second_norm = Conv(out, out, 3), make_norm(settings, out)
        self.shortcut = Conv(channels, out, 1, stride) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Maps images [B, channels, height, width] to the logits of `classes` classes. Its weights are not initialised."""

    def __init__(self, settings: Settings, channels: int, classes: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = Conv(channels, settings.width, 3), make_norm(settings, settings.width)
        blocks, width = [], settings.width
        for stage in range(settings.stages):
            out = settings.width * 2**stage
            for block in range(settings.depth):
                blocks.append(Residual(settings, width, out, 2 if stage and not block else 1))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.head = Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.head.weight.dtype)
        x = F.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def init_weights(model: ResNet, seed: int) -> None:
    """Initialises all weights: convolutions by He's scheme, and the linear layer with deviation 1 / sqrt(inputs)."""
    fans = {name: p[0].numel() for name, p in model.named_parameters() if p.dim() > 1}
    draw(model, seed, lambda name: math.sqrt((1 if name.startswith("head") else 2) / fans[name]))


@torch.no_grad()
def operations(model: ResNet, height: int, width: int) -> float:
    """The multiplications of one image's forward pass: those of its convolutions and of the linear layer."""
    total, (h, w) = 0, (height, width)
    total += model.stem.weight.numel() * h * w
    for block in model.blocks:
        assert isinstance(block, Residual)
        stride = block.first.stride[0]
        h, w = -(-h // stride), -(-w // stride)
        convolutions = [block.first, block.second] + [block.shortcut] * (block.shortcut is not None)
        total += sum(each.weight.numel() for each in convolutions if each is not None) * h * w
    return float(total + model.head.weight.numel())
