"""Folders of transformers: weights that come from one give its logits, and those that hvdllm writes give ours."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hugging_kit import KINDS, POSITIONS, load, transformers, write
from safetensors.torch import load_file
from torch import Tensor, nn

from hvdllm.checkpoint import hugging as reading
from hvdllm.config.compose import compose
from hvdllm.errors import RunError, UserError
from hvdllm.flat import Flat
from hvdllm.models import size
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.hugging import config_of, described, sources
from hvdllm.models.parts import Model
from hvdllm.settings import Config
from hvdllm.task.causal_lm import CausalLM
from hvdllm.text.tokenize import BYTES, Tokenizer, train_bpe
from hvdllm.trainer import export as exporting
from hvdllm.trainer.export import export
from hvdllm.trainer.restore import Language

TOLERANCE = 1e-5  # of a tensor's largest value


def read(folder: Path, *words: str) -> tuple[Config, GPT]:
    """The model of a folder as a run with these words begins with it."""
    config = compose([f"init_from={folder}", *words])
    model = GPT(config.model, size.rows(config.model, 257))
    flat = Flat(model, 1, math.inf)
    reading.check(folder, config.model)
    reading.fill(folder, config.model, flat.view)
    return config, model


def same(mine: Tensor, theirs: Tensor, name: str) -> None:
    error = float(((mine - theirs).abs().max() / theirs.abs().max()).detach())
    assert mine.shape == theirs.shape and error < TOLERANCE, f"{name} differs by {error:.1e} of the largest value"


def compare(mine: GPT, theirs: nn.Module, kind: str, tokens: int) -> None:
    """Logits, loss and all gradients must agree."""
    ids_BS = torch.randint(257, (3, tokens + 1), generator=torch.Generator().manual_seed(2))
    inputs_BT, targets_BT = ids_BS[:, :-1], ids_BS[:, 1:]
    logits_BTV = theirs(inputs_BT).logits
    same(mine(inputs_BT), logits_BTV, "logits")
    loss, total = (
        mine.loss(inputs_BT, targets_BT),
        F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"),
    )
    same(loss, total, "loss")
    mine.zero_grad()
    loss.backward()
    total.backward()
    ours, given = dict(mine.named_parameters()), dict(theirs.named_parameters())
    found = list(sources(kind, mine.settings, len(mine.embed.weight), mine.settings.context))
    assert {source.key for source in found} == given.keys(), "all of them, and no other"
    for source in found:
        gradient = ours[source.name].grad[source.start : source.stop]
        other = given[source.key].grad.T if source.transposed else given[source.key].grad
        same(gradient, other[: len(gradient)], source.key)  # of learned positions ours has the first alone


# ------------------------------------------------------------------ in
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_logits_and_gradients_that_transformers_has(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", kind)
    config, model = read(folder, "model.context=48")
    assert config.model.context == 48 and config.text.tokenizer == f"{folder}/tokenizer.json"
    compare(model, load(folder), KINDS[kind][0].lower(), 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_every_float_on_disk_is_read_exactly_as_transformers_reads_it(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write(tmp_path / "theirs", kind, dtype=dtype)
    _, model = read(folder)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    theirs = load(folder)
    ids_BT = torch.arange(100, 140)[None]
    same(model(ids_BT), theirs(ids_BT).logits, "logits")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_sharded_folder_is_the_same_as_a_whole_one(kind: str, tmp_path: Path) -> None:
    whole, sharded = write(tmp_path / "whole", kind), write(tmp_path / "sharded", kind, shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    (_, one), (_, other) = read(whole), read(sharded)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_no_more_than_a_tensor_is_in_memory_beside_the_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked for once, and gone when the next one is."""
    import weakref

    folder = write(tmp_path / "theirs", shard="20KB", dtype=torch.bfloat16)
    living: list[weakref.ref[Tensor]] = []
    opened = reading.safe_open

    class Watched:
        def __init__(self, *args: object, **more: object) -> None:
            self.file = opened(*args, **more)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def get_tensor(self, key: str) -> Tensor:
            assert sum(ref() is not None for ref in living) <= 1  # the last one, until its name is given to this one
            values: Tensor = self.file.get_tensor(key)
            living.append(weakref.ref(values))
            return values

    monkeypatch.setattr(reading, "safe_open", Watched)
    read(folder)
    assert len(living) == len(load_names(folder))


def load_names(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in load_file(file)}


def test_a_file_of_the_model_without_its_head_and_with_old_buffers_is_read(tmp_path: Path) -> None:
    """As the first GPT-2 files are: no `transformer.` before the names, and causal masks among the tensors."""
    from safetensors.torch import save_file

    folder = write(tmp_path / "theirs", "gpt2")
    theirs = load(folder)
    tensors = {key.removeprefix("transformer."): x for key, x in load_file(folder / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / "model.safetensors")
    _, model = read(folder)
    ids_BT = torch.arange(40)[None]
    same(model(ids_BT), theirs(ids_BT).logits, "logits")


def test_a_tied_head_that_is_stored_too_is_taken_if_it_is_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write(tmp_path / "theirs", "llama tied")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    read(folder)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="differs from its embedding"):
        read(folder)


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/<commit>/model.safetensors leads to blobs/<hash>, beside snapshots/."""
    cache = tmp_path / "models--someone--something"
    folder = write(cache / "snapshots" / "0123abcd")
    (cache / "blobs").mkdir()
    for k, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(cache / "blobs" / f"{k:040x}")
        file.symlink_to(Path("../../blobs") / blob.name)
    read(folder)


def test_words_that_say_the_same_as_the_folder_are_taken(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "llama")
    config, _ = read(folder, "model.layers=2", "model.kv_heads=2", "model.norm_eps=2e-5", "model.dropout=0.1")
    assert config.model.dropout == 0.1
    folder = write(tmp_path / "gpt2", "gpt2")
    config, _ = read(folder, "model.kv_heads=4", "model.mlp_width=128", "model.rope_theta=7", "model.qkv_bias=true")
    assert config.model.context == POSITIONS, "the default of 128 is more than the folder has"


def test_rope_scalings_of_llama3_are_those_of_transformers() -> None:
    """At a usual size, where all three parts of the rule occur."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from hvdllm.models.gpt import rope_tables

    about = dict(
        rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=32, rope_parameters=about)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    cos, sin = rope_tables(2, 64, 500000.0, "llama3:32:1:4:8192")
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]).float(), theirs, rtol=1e-5, atol=0)


ODD = (None, True, -1, 0, 0.5, 10**400, 1e308, float("nan"), "x", "", [], [1], {}, {"a": {}})


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "mistral", "qwen2", "arcee"])
def test_no_value_of_a_config_json_is_a_bug(kind: str, tmp_path: Path) -> None:
    """Each is the settings of a model, or refused in one sentence."""
    from hvdllm.config.compose import from_dict, to_dict

    folder = write(tmp_path / "theirs", kind)
    values = json.loads((folder / "config.json").read_text())
    deep = [("rope_parameters", key) for key in values.get("rope_parameters", {})]
    refused, usual = 0, compose([])
    for place in [*((key,) for key in (*values, "quantization_config", "rope_scaling", "sliding_window")), *deep]:
        for odd in ODD:
            changed = json.loads(json.dumps(values))
            (changed if len(place) == 1 else changed[place[0]])[place[-1]] = odd
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                model = replace(usual.model, **described(folder).settings)
                from_dict(to_dict(replace(usual, model=model)))
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 100


# ------------------------------------------------------------------ out
SHAPES = {
    "gpt2": dict(),
    "gpt2-untied": dict(tied=False, mlp_width=40),
    "llama": dict(kv_heads=2, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False, mlp_width=48),
    "llama-biases": dict(positions="rope", norm="rmsnorm", mlp="swiglu", rope_theta=77.0, norm_eps=3e-6),
    "llama-linear": dict(positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, rope_scaling="linear:1.7"),
    "llama-llama3": dict(positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, rope_scaling="llama3:8:1:4:16"),
    "qwen2": dict(kv_heads=1, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, qkv_bias=True),
    "arcee": dict(kv_heads=2, positions="rope", norm="rmsnorm", bias=False),
}


def made(tmp: Path, shape: str = "llama", tokenizer: Tokenizer | None = None, **more: object) -> Language:
    """A model with weights that hide nothing, as restore() gives it."""
    settings = Model(**{**dict(layers=2, width=32, heads=4, context=32), **SHAPES[shape], **more})
    tokenizer = tokenizer or Tokenizer(BYTES)
    model = GPT(settings, size.rows(settings, tokenizer.vocab))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    config = replace(compose([]), model=settings)
    task = CausalLM(config, tokenizer.vocab, tokenizer)
    return Language(config, task, model.eval(), torch.device("cpu"), tmp, tokenizer)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_parameters_is_known_without_the_model(shape: str, tmp_path: Path) -> None:
    model = made(tmp_path, shape, vocab=259).model
    assert size.count_parameters(model.settings, 259) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("linear", "give linear:FACTOR or llama3"),
        ("yarn:4", "give linear:FACTOR or llama3"),
        ("llama3:8:1:4", "give linear:FACTOR or llama3"),
        ("llama3:8:4:1:64", "LOW is below HIGH"),
        ("linear:0.5", "FACTOR is at least 1"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused(word: str, said: str) -> None:
    from hvdllm.config.check import check
    from hvdllm.world.detect import Place

    with pytest.raises(UserError, match=said):
        check(compose([f"model.rope_scaling={word}", "model.positions=rope"]), Place())


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_what_was_exported_with_our_logits_and_gradients(shape: str, tmp_path: Path) -> None:
    found = made(tmp_path, shape)
    kind = export(found, tmp_path / "out")
    assert kind.lower().startswith(shape.partition("-")[0])
    theirs = load(tmp_path / "out")
    assert type(theirs).__name__ == kind
    compare(found.model, theirs, shape.partition("-")[0], 32)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_exported_comes_back_bit_for_bit(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files, and with another context where positions are rotary."""
    monkeypatch.setattr(exporting, "MOST_SHARD", 20_000)
    found = made(tmp_path, shape)
    rotary = found.config.model.positions == "rope"
    export(found, tmp_path / "out", 4096 if rotary else None)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    config, model = read(tmp_path / "out", *(["model.context=4096"] if rotary else []))
    rows = len(model.embed.weight)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.model.parameters(), strict=True))
    assert config_of(config.model, rows, 1) == config_of(found.config.model, rows, 1)
    theirs, ids_BT = load(tmp_path / "out"), torch.arange(32)[None]
    same(found.model(ids_BT), theirs(ids_BT).logits, "logits of several files")


def test_the_tokenizer_says_the_same_there() -> None:
    """Of bytes, one of ours and, as it is, one of somebody else."""
    text = "def naïve(x):\n\treturn '🦔' + x  # \x00\x7f  two  blanks"
    for tokenizer in (Tokenizer(BYTES), train_bpe(iter([text * 20, "some more of it"]), 300)):
        spelled = Tokenizer(tokenizer.for_others())
        assert (spelled.vocab, spelled.end, spelled.end_text) == (tokenizer.vocab, tokenizer.end, "<|end|>")
        assert spelled.encode([text])[0].tolist() == tokenizer.encode([text])[0].tolist()
        assert spelled.decode(spelled.encode([text])[0]) == text
        assert (spelled.token_bytes == tokenizer.token_bytes).all()


def test_transformers_takes_tokenizer_and_ends_of_the_folder(tmp_path: Path) -> None:
    export(made(tmp_path), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Été")["input_ids"] == list("Été".encode()) and tokenizer.eos_token == "<|end|>"
    assert tokenizer.model_max_length == 32
    model = load(tmp_path / "out")
    assert model.generation_config.eos_token_id == 256
    assert model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[1] <= 4


@pytest.mark.parametrize(
    ("shape", "more", "said"),
    [
        ("gpt2", dict(norm="rmsnorm"), "no model with model.norm=rmsnorm beside the other settings"),
        ("gpt2", dict(bias=False), "model.bias=false"),
        ("gpt2", dict(kv_heads=2), "model.kv_heads=2"),
        ("llama", dict(norm="layernorm"), "model.norm=layernorm"),
        ("llama-biases", dict(qkv_bias=False), "model.qkv_bias=false"),
        ("arcee", dict(positions="learned"), "model."),
    ],
)
def test_a_model_that_transformers_has_not_is_refused(shape: str, more: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers has no model") as error:
        export(made(tmp_path, shape, **more), tmp_path / "out")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_only_what_an_export_wrote_is_replaced(tmp_path: Path) -> None:
    found, out = made(tmp_path), tmp_path / "out"
    export(found, out)
    values = json.loads((out / "config.json").read_text())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not written by hvdllm export"):
        export(found, out)
    (out / "notes.txt").unlink()
    (out / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "exported_by"}))
    with pytest.raises(UserError, match="was not written by hvdllm export"):
        export(found, out)
    (out / "config.json").write_text(json.dumps(values))
    export(made(tmp_path, "qwen2"), out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UserError, match="link is there"):
        export(found, tmp_path / "link")
    (tmp_path / "empty").mkdir()
    export(found, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "out"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, out = made(tmp_path), tmp_path / "out"
    export(found, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(RunError, match=r"No space left on device.*free some space"):
        export(made(tmp_path, "qwen2"), out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_positions_are_those_that_were_trained_or_more(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has learnt 32 positions"):
        export(made(tmp_path, "gpt2"), tmp_path / "out", 64)
    with pytest.raises(UserError, match="was trained on 32"):
        export(made(tmp_path, "llama"), tmp_path / "out", 16)
