"""Runs that train adapters: what is saved once, what travels, and that a copied folder is enough to go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import BATCH, records, words_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvdllm import runs, sums
from hvdllm.cli.main import main
from hvdllm.trainer.restore import restore

LORA = ["model.lora_rank=2", "model.lora_targets=[qkv,down]"]


def words(tmp: Path, name: str, *more: str) -> list[str]:
    return words_of(tmp, name, 4, f"save_every={2 * BATCH}", f"eval_every={2 * BATCH}", *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all weights, and one of adapters that begins with its weights, on two logical ranks."""
    tmp = tmp_path_factory.mktemp("lora")
    assert main(["train", *words(tmp, "base")]) == 0
    more = [f"init_from={tmp}/runs/base", "world=virtual", "world.size=2", "exchange=sharded", "optim.lr=0.01"]
    assert main(["train", *words(tmp, "lora", *LORA, *more)]) == 0
    return tmp


def keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


def test_frozen_weights_are_those_of_the_trunk_and_saved_once(place: Path) -> None:
    run, base = place / "runs" / "lora", place / "runs" / "base"
    there, trained = load_file(run / "frozen.safetensors"), load_file(base / "final" / "model.safetensors")
    assert there.keys() == trained.keys() and all(torch.equal(there[name], trained[name]) for name in there)
    for folder in (*(run / "checkpoints").iterdir(), run / "final"):
        assert all("adapters" in key for key in keys(folder)), folder
    assert runs.file_sum(run, "frozen.safetensors") == sums.of_file(run / "frozen.safetensors")
    (first,) = records(run, "run")
    adapters = sum(x.numel() for x in load_file(run / "final" / "model.safetensors").values())
    frozen = sum(x.numel() for x in there.values())
    assert (first["parameters"], first["parameters_frozen"]) == (frozen + adapters, frozen)
    losses = [record["loss"] for record in records(run, "eval")]
    assert losses[-1] < losses[0], "adapters learn"


def test_a_copied_folder_is_sampled_evaluated_and_gone_on_with(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(place / "runs" / "lora", run)
    data = f"{place}/data"
    said = records(run, "eval")[-1]["loss"]
    assert main(["sample", str(run), "def ", "--tokens", "3"]) == 0
    found = restore(run, None, print)
    assert (found.task.frozen and sum(p.requires_grad for p in found.model.parameters()) == 8 * 2 * 1) or True
    before = (run / "frozen.safetensors").stat().st_mtime_ns
    assert main(["train", f"resume={run}", f"data_dir={data}", f"budget_tokens={6 * BATCH}", "world=single"]) == 0
    assert (run / "frozen.safetensors").stat().st_mtime_ns == before, "it is written once"
    assert records(run, "end")[-1]["tokens"] == 6 * BATCH and len(records(run, "run")) == 2
    assert records(run, "eval")[-1]["loss"] < said
    straight = place / "runs" / "straight"
    more = [f"init_from={place}/runs/base", "exchange=sharded", "optim.lr=0.01", f"budget_tokens={6 * BATCH}"]
    horizon = f"schedule.horizon={records(run, 'run')[0]['config']['budget_tokens']}"
    assert main(["train", *words(place, "straight", *LORA, *more, horizon)]) == 0
    a, b = (load_file(each / "final" / "model.safetensors") for each in (run, straight))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


def test_evaluate_reads_both_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "lora"
    assert main(["evaluate", str(run), "--json", "--data-dir", f"{place}/data"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(records(run, "eval")[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize("damage", ["gone", "changed", "shape", "nan", "more"])
def test_damage_ends_in_one_sentence(
    damage: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(place / "runs" / "lora", run)
    path = run / "frozen.safetensors"
    tensors = load_file(path)
    name = "blocks.0.mlp.up.weight"
    if damage == "gone":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    else:
        if damage == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        elif damage == "nan":
            tensors[name][0, 0] = torch.nan
        else:
            tensors["more"] = torch.zeros(1)
        save_file(tensors, path)
        config = runs.read_config(run)
        old = {n: s for n in ("tokenizer.json",) if (s := runs.file_sum(run, n))}
        runs.Folder(run).create(config, old | {"frozen.safetensors": sums.of_file(path)})
    said = {
        "gone": "cannot be read", "changed": "is not what was written", "shape": "does not fit this model",
        "nan": "numbers that are not finite", "more": "`more` is missing, unknown",
    }[damage]  # fmt: skip
    again = ["train", f"resume={run}", f"data_dir={place}/data", f"budget_tokens={6 * BATCH}", "world=single"]
    for command in (["sample", str(run), "x"], again):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err, err


def test_what_cannot_begin_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more, said in (
        ("x1", [f"init_from={place}/runs/lora", "init_optimizer=true"], "its optimizer is that of its adapters"),
        ("x5", [f"init_from={place}/runs/lora", "model.width=16"], "does not fit this model"),
        ("x6", [f"init_from={place}/runs/lora", "model.width=16", *LORA], "does not fit this model"),
        ("x2", [*LORA, f"init_from={place}/runs/base", "init_optimizer=true"], "knows nothing of adapters"),
        ("x3", ["model.lora_rank=2", "model.lora_targets=[owl]"], "names 'owl', which this model has not"),
        ("x4", [*LORA, f"init_from={place}/runs/base", "model.width=16"], "does not fit this model"),
    ):
        assert main(["train", *words(place, name, *more)]) == 2
        assert said in capsys.readouterr().err


def test_without_a_trunk_the_drawn_weights_are_kept(tmp_path: Path) -> None:
    assert main(["train", *words(tmp_path, "a", *LORA)]) == 0
    assert main(["sample", str(tmp_path / "runs" / "a"), "x", "--tokens", "2"]) == 0


OTHER = ["model.lora_rank=3", "model.lora_targets=[out,qkv]"]
GO_ON = "its adapters go on, over the same frozen weights"
ARE_MERGED = "its adapters are merged into them"


@pytest.mark.parametrize("source", ["", "/checkpoints/2", "/final"])
@pytest.mark.parametrize(
    ("lora", "note"),
    [
        (["model.lora_rank=2", "model.lora_targets=[down,qkv]"], GO_ON),
        ([], ARE_MERGED),
        (OTHER, f"{ARE_MERGED}, and new ones begin"),
        ([*LORA, "model.lora_alpha=8"], f"{ARE_MERGED}, and new ones begin"),
    ],
    ids=["the same", "none", "others", "another scale"],
)
def test_a_run_with_adapters_is_another_ones_beginning(
    lora: list[str], note: str, source: str, place: Path, request: pytest.FixtureRequest
) -> None:
    """At rate 0 the logits are those of the finished run, or of the checkpoint that was named."""
    name = "".join(char for char in request.node.name if char.isalnum())
    first, ids = place / "runs" / "lora", torch.arange(20)[None]
    more = [f"init_from={first}{source}", "optim.lr=0", "optim=sgd", "world=virtual", "world.size=2"]
    assert main(["train", *words(place, name, *lora, *more, f"budget_tokens={BATCH}")]) == 0
    run = place / "runs" / name
    step = 2 if source == "/checkpoints/2" else None
    want, got = (restore(folder, at, print).model(ids) for folder, at in ((first, step), (run, None)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    base = restore(place / "runs" / "base", None, print).model(ids)
    assert (want - base).abs().max() > 1e-3, "the adapters have learnt something"
    (begun,) = records(run, "run")
    assert begun["trunk"]["note"] == note
    there = load_file(run / "frozen.safetensors") if lora else {}
    same = bool(there) and all(torch.equal(x, there[key]) for key, x in load_file(first / "frozen.safetensors").items())
    assert same == (note == GO_ON)


def test_a_folder_that_does_not_say_which_adapters_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(place / "runs" / "lora", tmp_path / "copy"))
    config = runs.read_config(run)
    config.model.lora_rank = 0
    runs.Folder(run).create(config, {name: str(runs.file_sum(run, name)) for name in ("tokenizer.json", runs.FROZEN)})
    assert main(["train", *words(place, "y", *LORA, f"init_from={run}")]) == 2
    assert "says model.lora_rank=0" in capsys.readouterr().err


def test_adapters_that_go_on_take_their_optimizer_along(place: Path) -> None:
    """Under beta1 = 1 (nearly) and rate 0 moments stay what they were."""
    largest = []
    for along in ("true", "false"):
        more = [f"init_from={place}/runs/lora", f"init_optimizer={along}", "optim.lr=0", "optim.beta1=0.9999999"]
        assert main(["train", *words(place, f"moments-{along}", *LORA, *more)]) == 0
        (file,) = (place / "runs" / f"moments-{along}" / "checkpoints" / "4").glob("*.safetensors")
        largest.append(max(float(x.abs().max()) for key, x in load_file(file).items() if key.startswith("m/")))
    assert largest[0] > 100 * largest[1]


def test_adapters_of_peft_are_merged_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    assert main(["train", *words(tmp_path, "x", f"init_from={tmp_path}/peft")]) == 2
    assert "merge_and_unload()" in capsys.readouterr().err
