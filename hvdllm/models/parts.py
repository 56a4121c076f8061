"""The settings of a model."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import part
from hvdllm.settings import Settings, Setup, Several, setting, several

NUMBER = r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?"
SCALINGS = (
    rf"linear:{NUMBER}|llama3:{NUMBER}:{NUMBER}:{NUMBER}:[0-9]+",
    "linear:FACTOR or llama3:FACTOR:LOW:HIGH:CONTEXT",
)


@dataclass
class Module(Settings):
    """What is common to every model."""

    compile: bool = setting(False, "torch.compile, block by block; about 10 s at the start, worth it on long runs")

    def problem(self) -> str | None:
        """Why no model has these settings, in one sentence, or None."""
        return None

    def refusal(self, setup: Setup) -> str | None:
        if self.compile and setup.transport == "virtual":
            return "world=virtual with model.compile=true: logical ranks share a process, and what is compiled with it"
        return None


@part("model", "gpt", "hvdllm.models.gpt:GPT")
@dataclass
class Model(Module):
    """A decoder-only transformer: GPT-2 or Llama by its settings. The presets in conf/model set them."""

    layers: int = setting(4, "blocks of attention and MLP, one after the other", least=1, most=10_000)
    width: int = setting(128, "features of the residual stream (d_model)", least=1, most=1_000_000)
    heads: int = setting(4, "attention heads; a divisor of the width", least=1, most=100_000)
    kv_heads: int | None = setting(
        None, "heads of keys and values (grouped-query attention); null: as heads", least=1, most=100_000
    )
    mlp_width: int | None = setting(None, "hidden features of the MLP; null: 4 x width", most=10_000_000, least=1)
    context: int = setting(128, "tokens a sequence (window) has", least=1, most=10_000_000)
    positions: str = setting(
        "learned", "how a token knows its place: learned (GPT-2) or rope (Llama)", choices=("learned", "rope")
    )
    norm: str = setting("layernorm", "layernorm (GPT-2) or rmsnorm (Llama)", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, "added to the variance before its root", most=1.0, least=1e-12)
    mlp: str = setting("gelu", "gelu (GPT-2, tanh form) or swiglu (Llama)", choices=("gelu", "swiglu"))
    bias: bool = setting(True, "biases in linear layers and LayerNorm; true in GPT-2, false in Llama")
    qkv_bias: bool | None = setting(
        None, "biases in the layers of queries, keys and values; null: as bias; true beside bias=false in Qwen2"
    )
    tied: bool = setting(True, "the output layer shares the embedding's weights; spares vocabulary x width")
    rope_theta: float = setting(
        10000.0, "base of the rotary frequencies; read where positions=rope", most=1e12, least=1
    )
    rope_scaling: str | None = setting(
        None,
        "how the rotary frequencies are lowered for contexts longer than the pretraining's: linear:FACTOR or "
        "llama3:FACTOR:LOW:HIGH:CONTEXT; null: not at all; read where positions=rope",
        form=SCALINGS,
    )
    vocab: int | None = setting(
        None,
        "rows of the embedding; null: the tokenizer's tokens, padded to a multiple of 64, or those of init_from where "
        "it is a folder of transformers",
        least=1,
        most=10_000_000,
    )
    dropout: float = setting(
        0.0,
        "share of activations dropped; 0, because below one epoch it only costs, and worlds agree only at 0",
        least=0,
    )
    checkpointing: bool = setting(
        False, "compute each block's activations again in the backward: less memory, about a third more time"
    )
    documents: bool = setting(
        False,
        "attention stays inside a document where a window holds several, and learned positions begin anew in each; "
        "costs a mask of context x context bytes a sequence",
    )
    lora_rank: int = setting(
        0,
        "rank of the adapters (LoRA), which are then all that is trained; 0: none, all weights are",
        least=0,
        most=10_000,
    )
    lora_alpha: float = setting(16.0, "an adapter's product is scaled by lora_alpha / lora_rank", least=1e-6, most=1e6)
    lora_targets: Several = setting(
        "qkv",
        "what gets an adapter, one or a list: q, k, v, qkv (one for all three), out, up, down, and gate (mlp=swiglu)",
    )

    def problem(self) -> str | None:
        width, heads, kv_heads = self.width, self.heads, self.kv_heads
        if width % heads:
            return f"model.width={width} is no multiple of model.heads={heads}: choose a width that is."
        if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            return (
                f"model.kv_heads={kv_heads} is no divisor of model.heads={heads}: "
                "each head of keys serves as many query heads as the others."
            )
        if self.positions == "rope" and width // heads % 2:
            return (
                f"model.positions=rope turns pairs of features, and a head has {width // heads} "
                f"(model.width={width} / model.heads={heads}): choose an even number."
            )
        if self.mlp_width is not None and self.mlp_width < 1:
            return f"model.mlp_width={self.mlp_width} leaves the MLP no features: choose at least 1."
        if self.dropout >= 1:
            return f"model.dropout={self.dropout} drops everything: choose a share below 1."
        if self.rope_scaling is not None:
            factor, *more = map(float, self.rope_scaling.split(":")[1:])
            if factor < 1 or (more and not 0 < more[0] < more[1]) or (more and more[2] < 1):
                return f"model.rope_scaling={self.rope_scaling}: FACTOR is at least 1, and LOW is below HIGH"
        return self._lora_problem() if self.lora_rank else None

    def _lora_problem(self) -> str | None:
        there = ["q", "k", "v", "qkv", "out", "up", "down"] + ["gate"] * (self.mlp == "swiglu")
        targets = several(self.lora_targets)
        if odd := [target for target in targets if target not in there]:
            return f"model.lora_targets names {odd[0]!r}, which this model has not: choose of {', '.join(there)}."
        if not targets or len(set(targets)) < len(targets) or ("qkv" in targets and {"q", "k", "v"} & {*targets}):
            return f"model.lora_targets={targets} must name something, and nothing twice (qkv is q, k and v)."
        return None

    def refusal(self, setup: Setup) -> str | None:
        if self.documents and setup.config.text.conversations:
            return "model.documents=true with text=chat: each conversation is a sequence of its own, leave it out"
        return super().refusal(setup)


@part("model", "bert", "hvdllm.models.bert:Bert")
@dataclass
class Bert(Module):
    """A bidirectional encoder for masked language modelling: BERT by its settings, without segments."""

    layers: int = setting(4, "blocks of attention and MLP, one after the other", least=1, most=10_000)
    width: int = setting(128, "features of the residual stream", least=1, most=1_000_000)
    heads: int = setting(4, "attention heads; a divisor of the width", least=1, most=100_000)
    mlp_width: int | None = setting(None, "hidden features of the MLP; null: 4 x width", most=10_000_000, least=1)
    context: int = setting(128, "tokens a sequence (window) has", least=1, most=10_000_000)
    norm_first: bool = setting(
        False, "norms before attention and MLP (pre-norm), which learns at higher rates; false: after them, as in BERT"
    )
    norm_eps: float = setting(1e-12, "added to the variance before its root; 1e-12 as in BERT", most=1.0, least=1e-12)
    vocab: int | None = setting(
        None,
        "rows of the embedding; null: the tokenizer's tokens and the mask token, padded to a multiple of 64, or those "
        "of init_from where it is a folder of transformers",
        least=1,
        most=10_000_000,
    )
    dropout: float = setting(0.0, "share of activations dropped", least=0)
    checkpointing: bool = setting(
        False, "compute each block's activations again in the backward: less memory, about a third more time"
    )

    @property
    def hidden(self) -> int:
        """Hidden features of the MLP."""
        return self.mlp_width or 4 * self.width

    def problem(self) -> str | None:
        if self.width % self.heads:
            return f"model.width={self.width} is no multiple of model.heads={self.heads}: choose a width that is"
        if self.dropout >= 1:
            return f"model.dropout={self.dropout} drops everything: choose a share below 1"
        return None


@part("model", "resnet", "hvdllm.models.resnet:ResNet")
@dataclass
class ResNet(Module):
    """A small residual network for images."""

    width: int = setting(16, "channels of the first stage; each later one has twice as many", least=1, most=4096)
    depth: int = setting(1, "blocks of two convolutions in each stage", least=1, most=1000)
    stages: int = setting(3, "stages; each after the first halves height and width", least=1, most=8)
    norm: str = setting(
        "group",
        "group (GroupNorm: an image's gradient depends on that image alone, so any number of ranks computes the same) "
        "or batch (BatchNorm: it depends on the micro-batch; running means are averaged over ranks at marks)",
        choices=("group", "batch"),
    )


@part("model", "towers", "hvdllm.models.towers:Towers")
@dataclass
class Towers(Module):
    """A two-tower recommender: tables of users and items, a small MLP on each side, and their dot product."""

    width: int = setting(16, "features of a row of the tables, and of what the towers make", least=1, most=65_536)
    layers: int = setting(1, "residual blocks of two linear layers in each tower; 0: plain factors", least=0, most=1000)
    mlp_width: int | None = setting(None, "hidden features of a block; null: 4 x width", least=1, most=10_000_000)

    @property
    def hidden(self) -> int:
        """Hidden features of a block."""
        return self.mlp_width or 4 * self.width


@part("model", "own", None)
@dataclass
class Own(Module):
    """A torch module of your own, given to hvdllm.Session."""
