"""Runs that begin with a folder of transformers: what they compute, what they keep, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_kit import POSITIONS, VOCAB, load, transformers, write
from launch import BATCH, CONTEXT, SEQUENCES, losses, records, runs, weights, words_of
from safetensors.torch import load_file, save_file

from hvdllm.cli.main import main
from hvdllm.config.compose import compose
from hvdllm.runs import read_config
from hvdllm.task.stream import Stream
from hvdllm.text import shards
from hvdllm.text.tokenize import Tokenizer, train_bpe
from hvdllm.text.windows import Windows
from hvdllm.trainer.restore import restore

STEPS = 50


def of(tmp: Path, name: str, folder: Path, steps: int = 2, *more: str) -> list[str]:
    """Words of a tiny run that begins with a folder, which decides the model and the tokenizer."""
    words = words_of(tmp, name, steps, "schedule.warmup=0", "optim.lr=1e-3")
    ours = ("model.layers", "model.width", "model.heads", "model.kv_heads", "text.tokenizer")
    kept = [word for word in words if word.partition("=")[0] not in ours]
    return list({word.partition("=")[0]: word for word in (*kept, f"init_from={folder}", *more)}.values())


def their_loop(tmp: Path, folder: Path, words: list[str]) -> list[float]:
    """The losses of transformers' model, with its own loss, torch's AdamW and the same batches, each as one."""
    config = compose(words)
    corpus = shards.prepare(config.text, tmp / "data", say=print)
    stream = Stream(
        Windows(corpus.train, CONTEXT), batch=SEQUENCES, micro_batch=SEQUENCES, seed=0, rank=0, size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    model = load(folder).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    said = []
    for step in range(STEPS):
        (batch,) = stream.share(step)
        window_BS = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
        loss = model(input_ids=window_BS, labels=window_BS).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        said.append(loss.item())
    return said


@pytest.mark.parametrize("kind", ["gpt2", "llama", pytest.param("qwen2", marks=pytest.mark.thorough)])
def test_fine_tuning_on_two_ranks_has_the_loss_curve_of_transformers_own_loop(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", kind)
    words = of(tmp_path, "two", folder, STEPS)
    assert main(["train", *words, "world=virtual", "world.size=2"]) == 0
    ours, theirs = losses(tmp_path / "runs" / "two"), their_loop(tmp_path, folder, words)
    assert len(ours) == STEPS and ours[-1] < 0.9 * ours[0], "it learns"
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.ranks
def test_on_real_ranks_rank_0_reads_the_weights_for_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "llama", shard="20KB", dtype=torch.bfloat16)
    assert main(["train", *of(tmp_path, "alone", folder, 3)]) == 0
    runs([{"words": of(tmp_path, "two", folder, 3)}], 2, tmp_path)
    assert losses(tmp_path / "runs" / "two") == pytest.approx(losses(tmp_path / "runs" / "alone"), rel=1e-5)


@pytest.mark.parametrize("experiment", ["laptop", "shakespeare_char"])
def test_the_folder_counts_more_than_an_experiment(experiment: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "llama")
    made = compose([f"experiment={experiment}", f"init_from={folder}"])
    assert (made.model.layers, made.model.width, made.model.context) == (2, 32, POSITIONS)
    assert made.text.tokenizer == f"{folder}/tokenizer.json"


# ------------------------------------------------------------------ what a run keeps
@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose folder of transformers is gone."""
    tmp = tmp_path_factory.mktemp("begun")
    folder = write(tmp / "theirs", "qwen2", dtype=torch.bfloat16)
    assert main(["train", *of(tmp, "run", folder, 2, f"save_every={BATCH}", "optim.lr=0")]) == 0
    folder.rename(tmp / "away")
    return tmp


def test_the_settings_stand_in_the_run(begun: Path) -> None:
    model = read_config(begun / "runs" / "run").model
    assert (model.layers, model.width, model.mlp_width, model.vocab) == (2, 32, 48, VOCAB)
    assert (model.positions, model.norm, model.norm_eps, model.bias, model.qkv_bias) == (
        "rope",
        "rmsnorm",
        2e-5,
        False,
        True,
    )
    (first,) = records(begun / "runs" / "run", "run")
    assert first["trunk"] == {"path": f"{begun}/theirs", "tokens": None, "steps": 0, "note": "", "adapters": ""}
    assert first["parameters"] == sum(p.numel() for p in load(begun / "away").parameters())
    assert (begun / "runs" / "run" / "tokenizer.json").read_bytes() == (begun / "away" / "tokenizer.json").read_bytes()


def test_at_rate_zero_what_is_exported_is_what_came_in(begun: Path) -> None:
    assert main(["export", f"{begun}/runs/run", f"{begun}/out", "--positions", str(POSITIONS)]) == 0
    ours, theirs = load(begun / "out"), load(begun / "away")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for key in ("model_type", "vocab_size", "max_position_embeddings", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key


def test_the_folder_is_not_needed_any_more(begun: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = f"{begun}/runs/run"
    assert main(["sample", run, "a", "--tokens", "4"]) == 0
    assert main(["evaluate", run, f"--data-dir={begun}/data"]) == 0
    words = [f"resume={run}", f"data_dir={begun}/data", f"budget_tokens={4 * BATCH}", "optim.lr=0", "device.threads=1"]
    capfd.readouterr()
    assert main(["train", *words]) == 0, capfd.readouterr().err
    assert records(begun / "runs" / "run", "end")[-1]["tokens"] == 4 * BATCH


def test_an_export_is_what_the_run_that_begins_with_it_had(tmp_path: Path) -> None:
    """Of a model of ours, with a tokenizer of ours and rows that no token has."""
    words = words_of(
        tmp_path, "first", 2, "text.tokenizer=bpe", "text.vocab=300", "model.bias=false", "model.norm=rmsnorm"
    )
    assert main(["train", *words, "model.positions=rope"]) == 0
    assert main(["export", f"{tmp_path}/runs/first", f"{tmp_path}/out"]) == 0
    assert main(["train", *of(tmp_path, "second", tmp_path / "out", 1, "optim.lr=0")]) == 0
    a, b = (weights(tmp_path / "runs" / name) for name in ("first", "second"))
    assert len(a["embed.weight"]) % 64 == 0
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = Tokenizer.load(tmp_path / "runs" / "first" / "tokenizer.json").encode(["an abc"])[0]
    assert tokenizer("an abc")["input_ids"] == ids.tolist()


# ------------------------------------------------------------------ what is refused
Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        found.update(values)
        (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value != "gone"}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change_file(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return change_file


def written(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def index(files: object) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(files))

    return change


def outside(name: str) -> Change:
    """A link to a file beside the folder."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def large_tokenizer(folder: Path) -> None:
    train_bpe(iter(["some words of a text " * 9, "and others that it also has"]), 300).save(folder / "tokenizer.json")


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
BAD: list[tuple[str, str, Change | None, list[str], str]] = [
    # tensors
    ("missing", "llama", tensors(lambda x: x.pop(NORM)), [], f"it has no tensor `{NORM}`"),
    ("additional", "llama", tensors(lambda x: x.update(more=torch.zeros(2))), [], "it has a tensor `model.more`"),
    ("biases", "llama", tensors(lambda x: x.update({"model.layers.0.mlp.up_proj.bias": x[NORM] + 1})), [], "up_proj.b"),
    ("misshapen", "llama", tensors(lambda x: x.update({NORM: torch.zeros(33)})), [], "is 33, and its config.json asks"),
    ("turned", "gpt2", tensors(lambda x: x.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)})), [],
     "is 128 x 32, and its config.json asks for 32 x 128"),
    ("integers", "llama", tensors(lambda x: x.update({NORM: torch.zeros(32, dtype=torch.int8)})), [], "holds I8"),
    ("nan", "llama", tensors(lambda x: x[NORM].fill_(float("nan"))), [], "numbers that are not finite"),
    ("untied", "llama tied", tensors(lambda x: x.update({"lm_head.weight": x[EMBED] + 1})), [], "differs from its emb"),
    ("escape", "llama", tensors(lambda x: x.update({"\x1b[31mred\n": torch.zeros(2)})), [], "it has a tensor"),
    # files
    ("cut", "llama", lambda f: os.truncate(f / "model.safetensors", 3000), [], "model.safetensors cannot be read"),
    ("no weights", "llama", lambda f: (f / "model.safetensors").unlink(), [], "it has neither model.safetensors nor"),
    ("bin", "llama", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), [], "pytorch_model.bin, who"),
    ("link", "llama", outside("model.safetensors"), [], "leads out of its folder by a link"),
    ("config link", "llama", outside("config.json"), [], "leads out of its folder by a link"),
    ("fifo", "llama", fifo("model.safetensors"), [], "is no regular file"),
    ("config fifo", "llama", fifo("config.json"), [], "is no regular file"),
    ("index", "llama", index({"weight_map": {NORM: "../theirs/one.safetensors"}}), [], "no safetensors file beside it"),
    ("index bin", "llama", index({"weight_map": {NORM: "one.bin"}}), [], "no safetensors file beside it"),
    ("index gone", "llama", index({"weight_map": {NORM: "two.safetensors"}}), [], "two.safetensors cannot be read"),
    ("index less", "llama", index({"weight_map": {NORM: "one.safetensors"}}), [], "and its files differ, first in"),
    ("index odd", "llama", index({"weight_map": [1]}), [], "has no weight_map"),
    ("index list", "llama", index([]), [], "has no weight_map"),
    # config.json
    ("not json", "llama", written("config.json", "{"), [], "is not JSON"),
    ("large", "llama", written("config.json", "[" + " " * 2**20 + "]"), [], "is larger than the 1 MiB"),
    ("list", "llama", written("config.json", "[1]"), [], "holds no object"),
    ("kind", "llama", config(model_type="mamba\x1b[31m"), [], "says model_type=mamba"),
    ("kind odd", "llama", config(model_type=[1]), [], "says model_type=[1]"),
    ("gone", "llama", config(hidden_size="gone"), [], "no whole number `hidden_size`"),
    ("text", "llama", config(hidden_size="64"), [], "no whole number `hidden_size`"),
    ("negative", "llama", config(num_hidden_layers=-1), [], "num_hidden_layers=-1"),
    ("huge", "llama", config(num_hidden_layers=10**6), [], "model.layers=1000000 is too large"),
    ("activation", "llama", config(hidden_act="gelu"), [], "hidden_act=gelu: hvdllm has swish"),
    ("exact gelu", "gpt2", config(activation_function="gelu"), [], "activation_function=gelu"),
    ("relu2", "arcee", config(hidden_act="relu2"), [], "hidden_act=relu2"),
    ("head_dim", "llama", config(head_dim=16), [], "head_dim=16"),
    ("half biases", "llama", config(attention_bias=True), [], "attention_bias=true"),
    ("yarn", "llama", config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), [], "rope_type=yarn"),
    ("dynamic", "llama", config(rope_parameters="gone", rope_scaling={"type": "dynamic"}), [], "rope_type=dynamic"),
    ("by layer", "llama", config(rope_parameters={"full_attention": {"rope_type": "default"}}), [], "turn alike"),
    ("partial", "llama", config(partial_rotary_factor=0.5), [], "partial_rotary_factor=0.5"),
    ("llama3", "llama", config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), [], "`low_freq_factor`"),
    ("quantized", "llama", config(quantization_config={"bits": 4}), [], "quantization_config="),
    ("code", "llama", config(auto_map={"AutoModel": "x.Y"}), [], "auto_map="),
    ("inverse", "gpt2", config(scale_attn_by_inverse_layer_idx=True), [], "scale_attn_by_inverse_layer_idx=true"),
    ("window", "mistral", config(sliding_window=16), ["model.context=32"], "more than the 16 tokens"),
    ("window qwen", "qwen2", config(sliding_window=16, use_sliding_window=True), ["model.context=32"], "the 16 tokens"),
    ("usual window", "mistral", config(sliding_window="gone", max_position_embeddings=9000),
     ["model.context=4097", "batch_tokens=4097"], "more than the 4096 tokens"),
    ("heads", "llama", config(num_key_value_heads=3), [], "model.kv_heads=3 is no divisor"),
    # the tokenizer
    ("tokenizer gone", "llama", lambda f: (f / "tokenizer.json").unlink(), [], "has no tokenizer.json"),
    ("tokenizer odd", "llama", written("tokenizer.json", "{}"), [], "describes no tokenizer"),
    ("tokenizer large", "llama", large_tokenizer, [], "tokens and the model's embedding 258 rows"),
    ("other tokenizer", "llama", None, ["text.tokenizer=bytes"], "its tokenizer.json is not that of this text"),
    # words
    ("layers", "llama", None, ["model.layers=3"], "model.layers=3 is not what the config.json"),
    ("preset", "llama", None, ["model=gpt2", "model.context=32"], "is not what the config.json"),
    ("null", "llama", None, ["model.kv_heads=null"], "model.kv_heads=4 is not what the config.json"),
    ("vocab", "llama", None, ["model.vocab=320"], "model.vocab=320 is not what the config.json"),
    ("theta", "llama", None, ["model.rope_theta=5"], "model.rope_theta=5.0 is not"),
    ("context", "llama", None, ["model.context=128", "batch_tokens=1280"], "more than the 64 tokens"),
    ("optimizer", "llama", None, ["init_optimizer=true"], "holds no optimizer"),
]  # fmt: skip


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("templates")
    for kind in {kind for _, kind, *_ in BAD}:
        write(tmp / kind, kind)
    return tmp


@pytest.mark.parametrize(("kind", "change", "more", "said"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_ends_in_one_sentence_before_training(
    kind: str, change: Change | None, more: list[str], said: str, templates: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp = templates / "work"
    shutil.rmtree(tmp / "theirs", ignore_errors=True)
    folder = Path(shutil.copytree(templates / kind, tmp / "theirs"))
    if change is not None:
        change(folder)
    capfd.readouterr()
    assert main(["train", *of(tmp, "run", folder, 1, *more)]) == 2
    out, err = capfd.readouterr()
    last = err.rstrip("\n").split("\n")[-1]
    assert said in last and last.startswith("hvdllm: ") and err.count("hvdllm: ") == 1, err
    assert (out + err).replace("\n", "").isprintable()
    assert not (tmp / "runs" / "run").exists()


def test_tensors_are_looked_at_before_the_text_is_prepared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "theirs")
    tensors(lambda x: x.pop(NORM))(folder)
    assert main(["train", *of(tmp_path, "run", folder, 1), "world=virtual", "world.size=2"]) == 2
    assert "it has no tensor" in capfd.readouterr().err and not list((tmp_path / "data").glob("*/train.bin"))


def test_weights_without_config_json_are_not_taken_for_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "theirs")
    (folder / "config.json").unlink()
    words = [word for word in of(tmp_path, "run", folder, 1)]
    assert main(["train", *words]) == 2
    assert "config.json" in capfd.readouterr().err


def test_adapters_on_a_folder_of_transformers_are_exported_merged_and_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The frozen weights are those of the folder. What is exported has the adapters in it, or is the adapters alone."""
    plain = [
        "text.tokenizer=bytes",
        "model.bias=false",
        "model.norm=rmsnorm",
        "model.positions=rope",
        "model.mlp=swiglu",
    ]
    assert main(["train", *words_of(tmp_path, "first", 2, *plain)]) == 0
    assert main(["export", f"{tmp_path}/runs/first", f"{tmp_path}/base"]) == 0
    lora = ["model.lora_rank=2", "model.lora_targets=[q,v]", "optim.lr=0.05"]
    assert main(["train", *of(tmp_path, "tuned", tmp_path / "base", 3, *lora)]) == 0
    run, first = tmp_path / "runs" / "tuned", weights(tmp_path / "runs" / "first")
    frozen = load_file(run / "frozen.safetensors")
    assert frozen.keys() == first.keys() and all(frozen[name].equal(first[name]) for name in frozen)
    assert main(["export", str(run), f"{tmp_path}/merged"]) == 0
    base, merged = load(tmp_path / "base"), load(tmp_path / "merged")
    changed = {
        name for (name, a), b in zip(base.named_parameters(), merged.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    found, ids = restore(run, None, print), torch.tensor([[1, 5, 9, 4]])
    torch.testing.assert_close(found.model(ids), merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["export", str(run), f"{tmp_path}/adapter", "--adapter"]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and set(config["target_modules"]) == {"self_attn.q_proj", "self_attn.v_proj"}
    capfd.readouterr()
    (tmp_path / "file").touch()
    assert main(["export", str(run), f"{tmp_path}/file/adapter", "--adapter"]) == 1
    assert "choose another folder, and export again" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), f"{tmp_path}/new", "--adapter", "--positions", "64"])
    assert "leave it out" in capfd.readouterr().err
    assert main(["export", str(run), f"{tmp_path}/adapter", "--adapter"]) == 2
    assert main(["export", f"{tmp_path}/runs/first", f"{tmp_path}/none", "--adapter"]) == 2
    said = capfd.readouterr().err
    assert "is there already" in said and "has no adapters" in said
