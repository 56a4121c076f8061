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
        ("x1", [f"init_from={place}/runs/lora"], "that run trained adapters"),
        ("x2", [*LORA, f"init_from={place}/runs/base", "init_optimizer=true"], "knows nothing of adapters"),
        ("x3", ["model.lora_rank=2", "model.lora_targets=[owl]"], "names 'owl', which this model has not"),
        ("x4", [*LORA, f"init_from={place}/runs/base", "model.width=16"], "does not fit this model"),
    ):
        assert main(["train", *words(place, name, *more)]) == 2
        assert said in capsys.readouterr().err


def test_without_a_trunk_the_drawn_weights_are_kept(tmp_path: Path) -> None:
    assert main(["train", *words(tmp_path, "a", *LORA)]) == 0
    assert main(["sample", str(tmp_path / "runs" / "a"), "x", "--tokens", "2"]) == 0
