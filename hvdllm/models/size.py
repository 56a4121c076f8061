"""How large a model is, how many operations a token costs, and what a device can do. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvdllm import registry
from hvdllm.errors import UserError
from hvdllm.models.parts import Bert, Model
from hvdllm.settings import Config, several

PAD = 64  # rows; matrix kernels are fastest with sizes that are multiples of 64


def pad_vocab(tokens: int) -> int:
    """The rows of the embedding for a vocabulary of `tokens`: the next multiple of 64. For example, 257 gives 320."""
    return -(-tokens // PAD) * PAD


def rows(settings: Model | Bert, tokens: int) -> int:
    """The rows of the embedding for a tokenizer of `tokens`: model.vocab, or as many as pad_vocab says."""
    return settings.vocab or pad_vocab(tokens)


def check_vocab(settings: Model | Bert, tokens: int) -> None:
    """Raises UserError if a tokenizer has ids for which the embedding has no row."""
    if rows(settings, tokens) < tokens:
        raise UserError(
            f"the tokenizer has {tokens:,} tokens and the model's embedding {settings.vocab:,} rows (model.vocab): "
            "take the tokenizer that belongs to the model"
        )


def has_qkv_bias(settings: Model) -> bool:
    """Whether the layers of queries, keys and values have biases."""
    return settings.bias if settings.qkv_bias is None else settings.qkv_bias


def _matrices(settings: Model, vocab: int) -> int:
    """How many weights multiply each token: all matrices of the blocks, and the output layer, tied or not."""
    width = settings.width
    kv_width = width // settings.heads * (settings.kv_heads or settings.heads)
    hidden = settings.mlp_width or 4 * width
    attention = width * (width + 2 * kv_width) + width * width
    mlp = width * hidden * (3 if settings.mlp == "swiglu" else 2)
    return settings.layers * (attention + mlp) + vocab * width


def count_parameters(settings: Model, vocab: int) -> int:
    """The exact number of parameters of GPT(settings, vocab), with a padded `vocab`. Tied weights count once."""
    width = settings.width
    kv_width = width // settings.heads * (settings.kv_heads or settings.heads)
    hidden = settings.mlp_width or 4 * width
    tables = (0 if settings.tied else vocab * width) + (
        settings.context * width if settings.positions == "learned" else 0
    )
    norm = width * (2 if settings.norm == "layernorm" and settings.bias else 1)
    up = hidden * (2 if settings.mlp == "swiglu" else 1)
    biases = (width + 2 * kv_width) * has_qkv_bias(settings) + (width + up + width) * settings.bias
    return _matrices(settings, vocab) + tables + settings.layers * (2 * norm + biases) + norm


def count_adapters(settings: Model) -> int:
    """The number of parameters of the adapters, which are then all that is trained; 0 without model.lora_rank."""
    if not settings.lora_rank:
        return 0
    width, hidden = settings.width, settings.mlp_width or 4 * settings.width
    kv_width = width // settings.heads * (settings.kv_heads or settings.heads)
    sides = {"q": width + width, "k": width + kv_width, "v": width + kv_width, "qkv": width + width + 2 * kv_width}
    sides |= {"out": width + width, "up": width + hidden, "gate": width + hidden, "down": hidden + width}
    return settings.layers * settings.lora_rank * sum(sides[target] for target in several(settings.lora_targets))


def flops_per_token(settings: Model, vocab: int) -> int:
    """The floating-point operations that training on one token costs, forward and backward, as MFU counts them.

    They are 6 x the weights of the matrices (with the output layer, without embeddings, biases and norms), plus
    12 x layers x width x context for attention (PaLM, appendix B; Chowdhery et al., 2022). By this convention the
    causal mask does not halve the attention, and what checkpointing computes again is not counted. Frozen weights have
    no gradient of their own, so they count 4 times, and their adapters 6 times.
    """
    adapters = count_adapters(settings)
    products = (4 if adapters else 6) * _matrices(settings, vocab) + 6 * adapters
    return products + 12 * settings.layers * settings.width * settings.context


@dataclass(frozen=True)
class Memory:
    """The bytes that a whole replica holds between two steps. Activations come on top of them."""

    weights: int
    gradients: int
    optimizer: int  # for AdamW, the running means of the gradient and of its square

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def memory(settings: Model, vocab: int, precision: str) -> Memory:
    """The bytes of weights, gradients and AdamW's state. With bf16 (autocast) all three are in fp32."""
    bytes_each, whole, adapters = (
        8 if precision == "fp64" else 4,
        count_parameters(settings, vocab),
        count_adapters(settings),
    )
    trained = bytes_each * (adapters or whole)
    return Memory(weights=bytes_each * (whole + adapters), gradients=trained, optimizer=2 * trained)


def least_activations(settings: Model) -> int:
    """The bytes of activations of a sequence at least: the residual stream, and the MLP's input, in each block."""
    return 4 * settings.context * settings.width * settings.layers * (1 if settings.checkpointing else 2)


def least_memory(config: Config, parameters: int, activations: int, ranks: int, frozen: int = 0) -> int:
    """The bytes that a rank holds at least while it trains, so that what surely does not fit is refused early.

    They are those of the weights, the gradients (as many vectors as the exchange holds), the optimizer's state and the
    anchors, and of the activations of a micro-batch.

    Args:
        config: the settings.
        parameters: how many the model has.
        activations: the bytes that an item needs at least.
        ranks: that train together.
        frozen: how many of the parameters are not trained.
    """
    bytes_each = 8 if config.precision == "fp64" else 4
    one = (parameters - frozen) * bytes_each
    exchange, optim = registry.of("exchange", config.exchange).facts, registry.of("optim", config.optim).facts
    shares = ranks if exchange.shares_state else 1
    anchors = int(exchange.local and not getattr(config.exchange, "host_memory", False))
    units = config.task.units(config)
    items = max(1, min(config.micro_batch, config.batch_tokens // units // ranks if units else 1))
    trained = one * (1 + config.exchange.gradients + anchors + optim.vectors / shares)
    return int(trained + frozen * bytes_each + activations * items)


# Dense peaks in TFLOP/s from NVIDIA's data sheets: what a matrix product reaches at best in each of our precisions
# (bf16: tensor cores with fp32 sums and no sparsity; fp32: no TF32; fp64: tensor cores, if there are any). The first
# pattern that is found in the device's name counts. None means that the hardware lacks it, or the sheet does not say.
_PEAKS: list[tuple[str, float | None, float | None, float | None]] = [
    # name                      bf16   fp32   fp64
    (r"\bGB300\b", 2500.0, 80.0, None),
    (r"\bB300\b", 2250.0, 75.0, 1.25),
    (r"\bGB200\b", 2500.0, 80.0, 40.0),
    (r"\bB200\b", 2250.0, 75.0, 37.0),
    (r"\bH200 NVL\b", 835.5, 60.0, 60.0),
    (r"\b(H200|GH200)\b", 989.4, 66.9, 66.9),
    (r"\bH100 PCIe\b", 756.0, 51.0, 51.0),
    (r"\bH100 NVL\b", 835.5, 60.0, 60.0),
    (r"\bH100\b", 989.4, 66.9, 66.9),
    (r"\bA100\b", 312.0, 19.5, 19.5),
    (r"\bA30\b", 165.0, 10.3, 10.3),
    (r"\bA10\b", 125.0, 31.2, None),
    (r"\bL40S\b", 362.0, 91.6, None),
    (r"\bL40\b", 181.0, 90.5, None),
    (r"\bL4\b", 121.0, 30.3, None),
    (r"\bV100-SXM", None, 15.7, 7.8),
    (r"\bV100-PCIE", None, 14.0, 7.0),
    (r"\bT4\b", None, 8.1, None),
    (r"\bRTX 6000 Ada\b", 364.2, 91.1, None),
    (r"\bRTX 5090$", 209.5, 104.8, None),
    (r"\bRTX 4090$", 165.2, 82.6, None),
    (r"\bRTX 3090$", 71.0, 35.6, None),
    (r"\bRTX A6000$", 154.8, 38.7, None),
]


def peak_flops(device_name: str, precision: str) -> float | None:
    """The dense peak in FLOP/s of the device that torch.cuda.get_device_name() names; None if it is not known.

    It is not known for any CPU, nor for a slice of a GPU (MIG), whose name does not say its share of the units.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    column = {"bf16": 1, "fp32": 2, "fp64": 3}[precision]
    for row in _PEAKS:
        if re.search(str(row[0]), device_name):
            peak = row[column]
            return None if peak is None else float(peak) * 1e12
    return None
