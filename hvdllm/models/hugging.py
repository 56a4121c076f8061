"""Folders of the library transformers: what a config.json means for our settings, and which tensors go with it.

The same tables are read in both directions, by `init_from=FOLDER` and by `hvdllm export`. These are known:

    gpt2             learned positions, LayerNorm, GELU, biases everywhere
    llama, mistral   rotary positions, RMSNorm, SwiGLU, no biases (llama may have them in all linear layers)
    qwen2            the same, with biases in the layers of queries, keys and values alone
    arcee            the same as llama, with an MLP that is not gated; here with GELU
    bert             the encoder of task=masked_lm. Its first segment is added to its positions, because a window of
                     ours is one text; its pooler and the head for the next sentence are left out

A config.json is a stranger's: every value that would change what the model computes is either a setting of ours or
refused in a sentence. What shapes training alone (dropout, the deviation of initial weights) is not taken. Sources: the
configuration and modelling files of transformers 5; for llama3's rotary frequencies see gpt.py. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.models.parts import Bert, Model
from hvdllm.models.size import has_qkv_bias
from hvdllm.paths import short
from hvdllm.plain import Json

Settings: TypeAlias = Model | Bert

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
MOST_CONFIG = 2**20  # bytes of a config.json; those of large models have a few thousand
BY = "exported_by"  # a key of config.json by which a later export knows that it may replace the folder
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "arcee": "ArceeForCausalLM",
    "bert": "BertForMaskedLM",
}
USUAL_WINDOW = 4096  # tokens of a sliding window where config.json names none; null there means that nothing slides
SILU, GELU = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh")  # names of what our MLP computes
SHAPES_TRAINING = ("context", "dropout", "compile", "checkpointing")  # settings that a folder does not decide
# Tensors of older files that are no parameters: causal masks, rotary frequencies and numbers of positions, which follow
# from the settings.
NO_PARAMETERS = re.compile(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq|.*embeddings\.position_ids")
UNUSED = re.compile(r"bert\.pooler\..*|cls\.seq_relationship\..*")  # of a BERT, what guesses no token
SEGMENTS = 2  # rows of the table of segments in a BERT that is written


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config.json says.

    Attributes:
        kind: the architecture, a key of CLASSES.
        settings: of the model, by name, all but those of SHAPES_TRAINING.
        positions: the most tokens that a sequence may have.
        why: the name in config.json of what limits them.
        segments: rows of a BERT's table of segments.
    """

    kind: str
    settings: dict[str, Any]
    positions: int
    why: str
    segments: int = SEGMENTS

    @property
    def model(self) -> type[Settings]:
        """The class of the settings."""
        return Bert if self.kind == "bert" else Model


class Source(NamedTuple):
    """A tensor of a folder, and the rows of a parameter of ours that it is.

    Attributes:
        key: its name in the folder.
        name: of our parameter.
        start, stop: the rows of our parameter.
        shape: in the folder.
        transposed: whether the folder has inputs x outputs, as GPT-2's layers do.
        added: whether its first row is added to each of ours, which another tensor has filled.
    """

    key: str
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    transposed: bool = False
    added: bool = False


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of transformers, and not that of a run."""
    return os.path.exists(path / CONFIG) and not os.path.exists(path / "config.yaml")


def root_of(folder: Path) -> Path:
    """The folder out of which no link of this one may lead. In the cache of a hub, snapshots link to blobs beside."""
    real = Path(folder).absolute()
    return real.parents[1] if real.parent.name == "snapshots" else real


def described(folder: Path) -> Described:
    """Reads the config.json of a folder. Raises UserError if it cannot be read, or describes another model."""
    try:
        found = untrusted.read_json(folder / CONFIG, MOST_CONFIG, root_of(folder))
    except (OSError, untrusted.Unfit) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"its {CONFIG} cannot be read ({why}): save the model again with save_pretrained") from None
    if not isinstance(found, dict):
        raise UserError(f"its {CONFIG} holds no object: save the model again with save_pretrained")
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(
            f"its {CONFIG} says model_type={shown(kind)}, and hvdllm reads {', '.join(CLASSES)}: take one of these"
        )
    for key in ("auto_map", "quantization_config", "is_encoder_decoder", "add_cross_attention"):
        if found.get(key):
            raise _unknown(key, found[key], "hvdllm has no model for it")
    return {"gpt2": _gpt2, "bert": _bert}[kind](found) if kind in ("gpt2", "bert") else _llama(kind, found)


# ------------------------------------------------------------------ from config.json
def _gpt2(found: Json) -> Described:
    width = _whole(found, "n_embd")
    _one_of(found, "activation_function", GELU, "gelu_new")
    _one_of(found, "scale_attn_weights", (True,), True)
    _one_of(found, "scale_attn_by_inverse_layer_idx", (False,), False)
    settings = {
        "layers": _whole(found, "n_layer"),
        "width": width,
        "heads": _whole(found, "n_head"),
        "kv_heads": None,
        "mlp_width": _whole(found, "n_inner", 4 * width),
        "vocab": _whole(found, "vocab_size"),
        "positions": "learned",
        "norm": "layernorm",
        "norm_eps": _number(found, "layer_norm_epsilon", 1e-5),
        "mlp": "gelu",
        "bias": True,
        "tied": _flag(found, "tie_word_embeddings", True),
    }
    return Described("gpt2", settings, _whole(found, "n_positions"), "n_positions")


def _bert(found: Json) -> Described:
    _one_of(found, "hidden_act", ("gelu_python", "gelu"), "gelu")
    _one_of(found, "position_embedding_type", ("absolute",), "absolute")
    _one_of(found, "is_decoder", (False,), False)
    _one_of(found, "tie_word_embeddings", (True,), True)
    settings = {
        "layers": _whole(found, "num_hidden_layers"),
        "width": _whole(found, "hidden_size"),
        "heads": _whole(found, "num_attention_heads"),
        "mlp_width": _whole(found, "intermediate_size"),
        "vocab": _whole(found, "vocab_size"),
        "norm_first": False,
        "norm_eps": _number(found, "layer_norm_eps", 1e-12),
    }
    positions, segments = _whole(found, "max_position_embeddings"), _whole(found, "type_vocab_size", SEGMENTS)
    return Described("bert", settings, positions, "max_position_embeddings", segments)


def _llama(kind: str, found: Json) -> Described:
    width, heads = _whole(found, "hidden_size"), _whole(found, "num_attention_heads")
    _one_of(found, "hidden_act", GELU if kind == "arcee" else SILU, "relu2" if kind == "arcee" else "silu")
    if found.get("head_dim") is not None and _whole(found, "head_dim") * heads != width:
        raise _unknown(
            "head_dim", found["head_dim"], f"a head has hidden_size / num_attention_heads = {width / heads:g}"
        )
    bias, mlp_bias = (kind in ("llama", "arcee") and _flag(found, key, False) for key in ("attention_bias", "mlp_bias"))
    if bias != mlp_bias:
        raise _unknown("attention_bias", bias, f"mlp_bias is {mlp_bias}, and hvdllm has biases in both or in none")
    theta, scaling = _rope(found)
    settings = {
        "layers": _whole(found, "num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": _whole(found, "num_key_value_heads", heads),
        "mlp_width": _whole(found, "intermediate_size"),
        "vocab": _whole(found, "vocab_size"),
        "positions": "rope",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm": "rmsnorm",
        "norm_eps": _number(found, "rms_norm_eps", 1e-5 if kind == "arcee" else 1e-6),
        "mlp": "gelu" if kind == "arcee" else "swiglu",
        "bias": bias,
        "qkv_bias": True if kind == "qwen2" else None,
        "tied": _flag(found, "tie_word_embeddings", False),
    }
    positions, why = _whole(found, "max_position_embeddings"), "max_position_embeddings"
    # Within its window attention is whole, so a window is a bound for the context.
    slides = kind == "mistral" or (kind == "qwen2" and _flag(found, "use_sliding_window", False))
    window = {"sliding_window": USUAL_WINDOW} | found
    if slides and window["sliding_window"] is not None and _whole(window, "sliding_window") < positions:
        positions, why = _whole(window, "sliding_window"), "sliding_window"
    return Described(kind, settings, positions, why)


def _rope(found: Json) -> tuple[float, str | None]:
    """The base of the rotary frequencies, and how they are scaled, as model.rope_scaling says it.

    Before version 5 transformers wrote them as rope_theta and rope_scaling, since then as rope_parameters.
    """
    scaling = found.get("rope_scaling")
    about = found.get("rope_parameters") or {} if scaling is None else scaling
    if not isinstance(about, dict) or any(isinstance(value, dict) for value in about.values()):
        raise _unknown("rope_parameters", about, "all layers of hvdllm turn alike")
    theta = _number(about if "rope_theta" in about else found, "rope_theta", 10000.0)
    kind = about.get("rope_type", about.get("type", "default"))
    _one_of({**found, **about}, "partial_rotary_factor", (None, 1, 1.0), None)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, f"linear:{_digits(_number(about, 'factor'))}"
    if kind == "llama3":
        numbers = [_number(about, key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
        context = _whole(about, "original_max_position_embeddings")
        return theta, f"llama3:{':'.join(map(_digits, numbers))}:{context}"
    raise _unknown("rope_type", kind, "hvdllm scales rotary frequencies by linear or llama3")


def _digits(number: float) -> str:
    """All digits of a number, as short as they can be."""
    return str(number).removesuffix(".0")


MISSING = object()


def _value(found: Json, key: str, default: Any, kind: type, words: str) -> Any:
    value = found.get(key)
    if value is None and default is not MISSING:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"its {CONFIG} has no {words} `{key}`: save the model again with save_pretrained")
    return value


def _whole(found: Json, key: str, default: Any = MISSING) -> int:
    value: int = _value(found, key, default, int, "whole number")
    if not 1 <= value < 2**40:
        raise _unknown(key, value, "it must be at least 1, and no model is so large")
    return value


def _number(found: Json, key: str, default: Any = MISSING) -> float:
    value = _value(found, key, default, int | float, "number")  # type: ignore[arg-type]
    if not 0 < value < 1e30:
        raise _unknown(key, value, "it must be positive, and no model has one so large")
    return float(value)


def _flag(found: Json, key: str, default: bool) -> bool:
    return bool(_value(found, key, default, bool, "true or false"))


def _one_of(found: Json, key: str, known: tuple[Any, ...], default: Any) -> None:
    value = found.get(key, default)
    if value not in known:
        raise _unknown(key, value, f"hvdllm has {shown(known[-1])}")


def _unknown(key: str, value: object, why: str) -> UserError:
    return UserError(f"its {CONFIG} says {key}={shown(value)}: {why}")


def shown(value: object) -> str:
    """A value as it is typed: true and null as in JSON, a text as it is."""
    return short(value if isinstance(value, str) else json.dumps(value))


# ------------------------------------------------------------------ to config.json
def meaning(settings: Settings) -> Json:
    """The settings by name, in which null is replaced by what it stands for. The vocabulary stays as it is."""
    values = dataclasses.asdict(settings)
    if isinstance(settings, Bert):
        return values | {"mlp_width": settings.hidden}
    values["kv_heads"] = settings.kv_heads or settings.heads
    values["mlp_width"] = settings.mlp_width or 4 * settings.width
    values["qkv_bias"] = has_qkv_bias(settings)
    if settings.positions == "learned":
        del values["rope_theta"], values["rope_scaling"]
    return values


def kind_of(settings: Settings) -> str:
    """The architecture that a model of these settings is. Raises UserError, which names a setting, if it is none."""
    if isinstance(settings, Bert):
        if settings.norm_first:
            raise UserError(
                "transformers has no model with model.norm_first=true: the nearest is BertForMaskedLM, with "
                "model.norm_first=false"
            )
        return "bert"
    ways = {  # what each architecture needs
        "gpt2": {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qkv_bias": True},
        "llama": {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qkv_bias": settings.bias},
        "qwen2": {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qkv_bias": True},
        "arcee": {"positions": "rope", "norm": "rmsnorm", "mlp": "gelu", "qkv_bias": settings.bias},
    }
    ways["gpt2"]["kv_heads"] = settings.heads
    have = meaning(settings)
    wrong = {kind: {k: v for k, v in needs.items() if have[k] != v} for kind, needs in ways.items()}
    kind, odd = min(wrong.items(), key=lambda item: len(item[1]))
    if odd:
        key, value = next(iter(odd.items()))
        raise UserError(
            f"transformers has no model with model.{key}={shown(have[key])} beside the other settings: the nearest is "
            f"{CLASSES[kind]}, with model.{key}={shown(value)}"
        )
    return kind


def config_of(settings: Settings, rows: int, positions: int) -> Json:
    """The config.json of a model.

    Args:
        settings: of the model.
        rows: of its embedding.
        positions: the most tokens that a sequence may have.

    Raises UserError if transformers has no such model.
    """
    kind, have = kind_of(settings), meaning(settings)
    values: Json = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": rows,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    if isinstance(settings, Bert):
        drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), settings.dropout)
        return values | drops | {
            "hidden_size": settings.width,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "intermediate_size": settings.hidden,
            "max_position_embeddings": positions,
            "layer_norm_eps": settings.norm_eps,
            "hidden_act": "gelu",
            "type_vocab_size": SEGMENTS,
            "pad_token_id": None,
        }  # fmt: skip
    values["tie_word_embeddings"] = settings.tied
    if kind == "gpt2":
        drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), settings.dropout)
        return values | drops | {
            "n_embd": settings.width,
            "n_layer": settings.layers,
            "n_head": settings.heads,
            "n_inner": have["mlp_width"],
            "n_positions": positions,
            "layer_norm_epsilon": settings.norm_eps,
            "activation_function": "gelu_new",
        }  # fmt: skip
    values |= {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": have["kv_heads"],
        "head_dim": settings.width // settings.heads,
        "intermediate_size": have["mlp_width"],
        "max_position_embeddings": positions,
        "rms_norm_eps": settings.norm_eps,
        "hidden_act": "gelu_pytorch_tanh" if kind == "arcee" else "silu",
        "rope_theta": settings.rope_theta,
        "rope_scaling": _scaling(settings.rope_scaling),
        "attention_dropout": settings.dropout,
    }
    return values if kind == "qwen2" else values | dict.fromkeys(("attention_bias", "mlp_bias"), settings.bias)


def _scaling(text: str | None) -> Json | None:
    """What transformers' rope_scaling says for our model.rope_scaling."""
    if text is None:
        return None
    kind, factor, *more = text.split(":")
    out: Json = {"rope_type": kind, "factor": float(factor)}
    if more:
        low, high, context = more
        out |= {"low_freq_factor": float(low), "high_freq_factor": float(high)}
        out["original_max_position_embeddings"] = int(context)
    return out


# ------------------------------------------------------------------ tensors
def sources(
    kind: str, settings: Settings, rows: int, positions: int, segments: int = SEGMENTS
) -> Iterator[Source]:  # fmt: skip
    """The tensors that a folder must have, in the order of the forward.

    Args:
        kind: the architecture.
        settings: of the model.
        rows: of the embedding.
        positions: rows of a table of learned positions, of which a model with a smaller context has the first.
        segments: rows of a BERT's table of segments.
    """
    if isinstance(settings, Bert):
        yield from _bert_sources(settings, rows, positions, segments)
        return
    names = _GPT2 if kind == "gpt2" else _LLAMA
    have, width, context = meaning(settings), settings.width, settings.context
    whole, shared = settings.heads, have["kv_heads"]
    features = width // whole
    yield Source(names["embed"], "embed.weight", 0, rows, (rows, width))
    if settings.positions == "learned":
        yield Source(names["positions"], "positions.weight", 0, context, (positions, width))

    def norm(key: str, name: str) -> Iterator[Source]:
        for part in ("weight", *(["bias"] if settings.norm == "layernorm" and settings.bias else [])):
            yield Source(f"{key}.{part}", f"{name}.{part}", 0, width, (width,))

    def linear(keys: list[str], outs: list[int], ins: int, name: str, bias: bool) -> Iterator[Source]:
        """A layer of ours that has the outputs of several layers of the folder, one after the other."""
        turned = kind == "gpt2"
        for part in ("weight", *(["bias"] if bias else [])):
            start = 0
            for key, out in zip(keys, outs, strict=True):
                shape = (out,) if part == "bias" else (ins, out) if turned else (out, ins)
                yield Source(f"{key}.{part}", f"{name}.{part}", start, start + out, shape, turned and part == "weight")
                start += out

    for k in range(settings.layers):
        theirs, ours = f"{names['block']}.{k}.", f"blocks.{k}."
        heads = [whole * features, shared * features, shared * features]
        hidden = have["mlp_width"]
        qkv, up = names["qkv"].split(), names["gated" if settings.mlp == "swiglu" else "up"].split()
        heads = heads if len(qkv) == 3 else [sum(heads)]
        yield from norm(theirs + names["attention_norm"], f"{ours}attention_norm")
        yield from linear([theirs + x for x in qkv], heads, width, f"{ours}attention.qkv", have["qkv_bias"])
        yield from linear([theirs + names["out"]], [width], width, f"{ours}attention.out", settings.bias)
        yield from norm(theirs + names["mlp_norm"], f"{ours}mlp_norm")
        yield from linear([theirs + x for x in up], [hidden] * len(up), width, f"{ours}mlp.up", settings.bias)
        yield from linear([theirs + names["down"]], [width], hidden, f"{ours}mlp.down", settings.bias)
    yield from norm(names["norm"], "norm")
    if not settings.tied:
        yield Source(HEAD, "head.weight", 0, rows, (rows, width))


def _bert_sources(settings: Bert, rows: int, positions: int, segments: int) -> Iterator[Source]:
    width, hidden, embeddings = settings.width, settings.hidden, "bert.embeddings."
    table = "positions.weight"
    yield Source(f"{embeddings}word_embeddings.weight", "embed.weight", 0, rows, (rows, width))
    yield Source(f"{embeddings}position_embeddings.weight", table, 0, settings.context, (positions, width))
    yield Source(
        f"{embeddings}token_type_embeddings.weight", table, 0, settings.context, (segments, width), added=True
    )  # fmt: skip

    def layer(key: str, name: str, outs: int, ins: int | None, at: int = 0) -> Iterator[Source]:
        """Weights and biases; without inputs those of a norm."""
        yield Source(f"{key}.weight", f"{name}.weight", at, at + outs, (outs,) if ins is None else (outs, ins))
        yield Source(f"{key}.bias", f"{name}.bias", at, at + outs, (outs,))

    yield from layer(f"{embeddings}LayerNorm", "embed_norm", width, None)
    for k in range(settings.layers):
        theirs, ours = f"bert.encoder.layer.{k}.", f"blocks.{k}."
        for part, name in enumerate(("query", "key", "value")):
            yield from layer(f"{theirs}attention.self.{name}", f"{ours}qkv", width, width, part * width)
        yield from layer(f"{theirs}attention.output.dense", f"{ours}out", width, width)
        yield from layer(f"{theirs}attention.output.LayerNorm", f"{ours}attention_norm", width, None)
        yield from layer(f"{theirs}intermediate.dense", f"{ours}up", hidden, width)
        yield from layer(f"{theirs}output.dense", f"{ours}down", width, hidden)
        yield from layer(f"{theirs}output.LayerNorm", f"{ours}mlp_norm", width, None)
    yield from layer("cls.predictions.transform.dense", "head", width, width)
    yield from layer("cls.predictions.transform.LayerNorm", "head_norm", width, None)
    yield Source("cls.predictions.bias", "head_bias", 0, rows, (rows,))


HEAD = "lm_head.weight"
BERT_HEAD = "cls.predictions.decoder"
_GPT2 = {
    "embed": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "block": "transformer.h",
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "norm": "transformer.ln_f",
}
_LLAMA = {
    "embed": "model.embed_tokens.weight",
    "block": "model.layers",
    "attention_norm": "input_layernorm",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gated": "mlp.gate_proj mlp.up_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm": "model.norm",
}


def whole_name(key: str, kind: str) -> str:
    """The name that a tensor has in the whole model. A file of the model without its head lacks the beginning.

    The output layer of a BERT has two names, one of which is GPT-2's here, and norms of its oldest files have others.
    """
    if kind == "bert":
        key = key if key.startswith(("bert.", "cls.")) else f"bert.{key}"
        key = key.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")
        return {f"{BERT_HEAD}.weight": HEAD, f"{BERT_HEAD}.bias": "cls.predictions.bias"}.get(key, key)
    prefix = "transformer." if kind == "gpt2" else "model."
    return key if key == HEAD or key.startswith(prefix) else prefix + key
