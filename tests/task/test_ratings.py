"""Ratings: clicks of a known optimum, tables of the user's that are read with care, sums that add up over ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from hvdllm import runs
from hvdllm.checkpoint.read import count_weights
from hvdllm.cli.main import main
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.task import clicks, ratings
from hvdllm.world.detect import Place


def prepared(*words: str) -> Any:
    return ratings.prepare(compose(["task=ratings", *words]), say=lambda text: None, whole=True, wanted=None)


def table(tmp: Path, text: str, *words: str, name: str = "clicks.csv") -> Any:
    (tmp / name).write_text(text)
    return prepared(f"task.path={tmp / name}", f"data_dir={tmp / 'data'}", *words)


def rows_of(data: Any) -> list[tuple[int, int, float]]:
    """All rows, of training and validation."""
    return sorted(tuple(row) for side in (data.train, data.validation) for row in side.rows.tolist())


RUN = ["task=ratings", "task.users=50", "task.items=30", "task.clicks=600", "model.width=4", "batch_tokens=24",
       "micro_batch=5", "budget_tokens=96", "eval_every=96", "eval_tokens=0", "save_every=48", "sample_every=0",
       "audit_every=48", "log_every=24", "device=cpu", "device.threads=1"]  # fmt: skip


def records(folder: Path, kind: str) -> list[Any]:
    return [record for record in runs.records(folder) if record["kind"] == kind]


# ------------------------------------------------------------------ drawn clicks
def test_drawn_clicks_are_a_function_of_the_settings_and_their_entropy_is_the_least_loss() -> None:
    words = ["task.users=300", "task.items=90", "task.clicks=40000", "task.validation_share=0.5"]
    data = prepared(*words)
    assert len(data.train) + len(data.validation) == 40000 and 17000 < len(data.validation) < 23000
    assert data.data_hash == prepared(*words, "seed=3").data_hash != prepared(*words, "task.drawn_by=1").data_hash
    pairs = [{(user, item) for user, item, _ in side.rows.tolist()} for side in (data.train, data.validation)]
    assert not pairs[0] & pairs[1], "equal pairs are on one side"
    least = data.record["least_loss"]
    assert f"{least:.4f} nats" in data.notes[0]
    # The loss of the probabilities that the clicks were drawn at is their entropy, up to chance.
    source = clicks.drawn(0)
    p, q = (source.standard_normal((rows, clicks.FACTORS)) for rows in (300, 90))
    user, item, label = (data.validation.rows[name] for name in clicks.ROW.names)
    logits = torch.from_numpy(clicks.BASE + clicks.SPREAD / 2 * (p[user] * q[item]).sum(1))
    loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(label.copy()).double())
    assert loss.item() == pytest.approx(least, abs=4 * 0.5 / len(label) ** 0.5)
    measured = data.task.metrics(
        data.task.measure(lambda pairs: logits, torch.zeros(1), torch.from_numpy(label.copy())).tolist()
    )
    assert measured["loss"] == pytest.approx(loss.item()) and measured["auc"] > 0.75


def test_training_comes_near_the_least_loss(tmp_path: Path) -> None:
    words = ["experiment=clicks", "budget_tokens=1000000", "eval_every=1000000", "save_every=0", "optim.lr=3e-2"]
    assert main(["train", *words, f"runs_dir={tmp_path}", "name=x", "device.threads=1"]) == 0
    found, least = records(tmp_path / "x", "eval")[-1], records(tmp_path / "x", "run")[0]["least_loss"]
    assert least < found["loss"] < least + 0.015 < 0.56 and found["auc"] > 0.77 and found["accuracy"] > 0.7


# ------------------------------------------------------------------ tables of the user's
CSV = "user,when,item,label\nanna,1,tea,1\nbob,2,\"a, b\",0\n\nanna,3,\"a, b\",0.5\n"  # fmt: skip


def test_a_csv_file_gives_its_rows(tmp_path: Path) -> None:
    data = table(tmp_path, CSV)
    assert (data.task.users, data.task.items) == (2, 2) and data.record == {}
    found = rows_of(data)
    names = {row[2]: row[:2] for row in found}
    assert len(found) == 3 and names[1.0][0] == names[0.5][0] != names[0.0][0] and names[0.0][1] == names[0.5][1]
    again = prepared(f"task.path={tmp_path / 'clicks.csv'}", f"data_dir={tmp_path / 'data'}")
    assert again.data_hash == data.data_hash and len(list((tmp_path / "data").glob("*/train.bin"))) == 1
    assert oct((tmp_path / "data").glob("*/train.bin").__next__().stat().st_mode)[-1] in "04"


def test_ids_are_rows_where_the_tables_have_a_size_and_a_threshold_makes_clicks(tmp_path: Path) -> None:
    text = "who,what,stars\n7,0,4\n3,19,3.5\n"
    words = ["task.user_column=who", "task.item_column=what", "task.label_column=stars", "task.threshold=4"]
    data = table(tmp_path, text, *words, "task.users=8", "task.items=20")
    assert rows_of(data) == [(3, 19, 0.0), (7, 0, 1.0)]
    assert (data.task.users, data.task.items) == (8, 20)


def test_files_of_a_folder_are_read_in_chunks_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of ids do not depend on chunks or files, and equal pairs are on one side, whatever their labels."""
    lines = [f"u{k % 100 * 7 % 23},i{k % 100 % 11},{k // 100}" for k in range(200)]
    monkeypatch.setattr(clicks, "CHUNK", 16)
    for number, part in enumerate((lines[:90], lines[90:])):
        (tmp_path / "whole").mkdir(exist_ok=True)
        (tmp_path / "whole" / f"{number}.csv").write_text("\n".join(["user,item,label", *part, ""]))
    cut = prepared(f"task.path={tmp_path / 'whole'}", f"data_dir={tmp_path / 'data'}")
    monkeypatch.undo()
    one = table(tmp_path, "\n".join(["user,item,label", *reversed(lines)]))
    assert rows_of(cut) == rows_of(one) and cut.task.ids == one.task.ids
    found = np.concatenate([cut.train.rows, cut.validation.rows])
    assert len(found) == 200 and cut.task.users == 23 and cut.task.items == 11
    assert set(found["user"]) == set(range(23)) and set(found["item"]) == set(range(11))
    pairs = [{row[:2] for row in side.rows.tolist()} for side in (cut.train, cut.validation)]
    assert pairs[1] and not pairs[0] & pairs[1]


def test_a_parquet_file_gives_the_same_as_csv(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {"user": ["anna", "bob", "anna"], "item": [5, 6, 6], "label": [True, False, True]}
    parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
    there = prepared(f"task.path={tmp_path / 'x.parquet'}", f"data_dir={tmp_path / 'data'}")
    assert rows_of(there) == rows_of(table(tmp_path, "user,item,label\nanna,5,1\nbob,6,0\nanna,6,1\n"))
    parquet.write_table(arrow.table({**columns, "item": [5, None, 6]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y.parquet, line 2, has no item \(column `item`\)"):
        prepared(f"task.path={tmp_path / 'y.parquet'}", f"data_dir={tmp_path / 'data'}")
    (tmp_path / "z.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(UserError, match=r"z.parquet is no Parquet file that can be read") as error:
        prepared(f"task.path={tmp_path / 'z.parquet'}", f"data_dir={tmp_path / 'data'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "match", "words"),
    [
        ("user,item,label\n1,2,1\n9,2,1\n", "line 3, has the user '9', which is outside the table: task.users", ["u"]),
        ("user,item,label\n-1,2,1\n", "line 2, has the user '-1', which is outside the table", ["u"]),
        ("user,item,label\n" + "0" * 30 + "5,2,1\n", "line 2, has the user '0{30}5', which is outside", ["u"]),
        ("user,item,label\n1,x\x1b[2J,1\n", r"line 2, has the item 'x\\x1b\[2J', which is outside the table", ["i"]),
        ("user,item,label\n1,,1\n", "line 2, has no item .column `item`.", []),
        ("user,item,label\n1,2,1\n1,2,five\n", "line 3, has the label 'five', which is no number", []),
        ("user,item,label\n1,2,nan\n", "line 2, has the label 'nan', which is no number", []),
        ("user,item,label\n1,2,4\n", "line 2, has the label '4', which is not between 0 and 1 .task.threshold", []),
        ("user,item,label\n1,2\n", "line 2, has 2 fields and the first line 3", []),
        ("user,item,rating\n1,2,4\n", "line 1, has no column 'label' .it has 'user', 'item', 'rating'.", []),
        ("user,user,item,label\n1,1,2,1\n", "line 1, has more than one column 'user'", []),
        ("user,item,label\n", "clicks.csv is empty, it has no rows", []),
        ("", "clicks.csv is empty, it has no rows", []),
        ('user,item,label\n1,"2,1\n', "line 2, is no CSV", []),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_one_sentence_with_its_line(
    tmp_path: Path, text: str, match: str, words: list[str]
) -> None:
    more = {"u": "task.users=9", "i": "task.items=9"}
    with pytest.raises(UserError, match=match) as error:
        table(tmp_path, text, *(more[word] for word in words))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert not list((tmp_path / "data").glob("clicks-*/")), "nothing half made is left"


def test_what_is_no_table_is_one_sentence(tmp_path: Path) -> None:
    def refused(match: str, path: Path) -> None:
        with pytest.raises(UserError, match=match) as error:
            prepared(f"task.path={path}", f"data_dir={tmp_path / 'data'}")
        assert "\n" not in str(error.value)

    refused("is no .csv or .parquet file that is there", tmp_path / "none.csv")
    refused("has no .csv and no .parquet file", tmp_path)
    (tmp_path / "x.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xd8")
    refused("x.csv, line 1, is no CSV in UTF-8", tmp_path / "x.csv")
    (tmp_path / "x.csv").unlink()
    (tmp_path / "x.csv").symlink_to("/dev/zero")
    refused(r"x.csv cannot be read \(is no regular file\)", tmp_path / "x.csv")


def test_a_damaged_table_is_noticed_and_a_shrunk_one_is_another(tmp_path: Path) -> None:
    before = table(tmp_path, CSV)
    file = next((tmp_path / "data").glob("*/train.bin"))
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(UserError, match="is not what was written: delete that folder"):
        prepared(f"task.path={tmp_path / 'clicks.csv'}", f"data_dir={tmp_path / 'data'}")
    assert table(tmp_path, CSV[: CSV.rindex("anna")]).data_hash != before.data_hash


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["task.threshold=3"], "task.threshold without task.path: clicks are drawn"),
        (["task.path=x.csv", "task.clicks=5"], "task.clicks with task.path: nothing is drawn"),
        (["task.path=x.csv", "task.item_column=user"], "must be three columns"),
        (["model=tiny"], "task=ratings trains model=towers"),
        (["batch_tokens=1", "world=virtual", "world.size=2"], "batch_tokens=1 is 1 clicks, fewer than the 2 ranks"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        check(compose(["task=ratings", *words]), Place())


# ------------------------------------------------------------------ task
@pytest.mark.parametrize("words", [(), ("model.layers=0",), ("model.layers=2", "model.mlp_width=5")])
def test_sizes_are_those_of_the_model(words: tuple[str, ...]) -> None:
    task = prepared("task.clicks=50", *words).task
    model = task.build()
    assert task.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 2, dtype=torch.int64))
    assert task.flops == 3 * counter.get_total_flops()


def test_loss_and_measure_are_sums_over_clicks() -> None:
    data = prepared("task.clicks=200")
    model = data.task.build()
    inputs, targets, units = data.train.take(np.arange(100), None)
    assert inputs.shape == (100, 2) and units.sum() == 100 and set(targets.tolist()) == {0, 1}
    logits = model(inputs)
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    torch.testing.assert_close(data.task.loss(model, inputs, targets), plain)
    sums = data.task.measure(model, inputs, targets)
    right = float(((logits > 0) == (targets > 0)).sum())
    assert sums[:3].tolist() == pytest.approx([plain.item(), 100, right])
    halves = sum(data.task.measure(model, inputs[k : k + 50], targets[k : k + 50]) for k in (0, 50))
    torch.testing.assert_close(sums, halves)
    assert len(sums) == data.task.measures


def test_the_area_under_the_curve_is_that_of_all_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, generator=draw) * 3, (torch.rand(300, generator=draw) < 0.4).double()
    task = prepared("task.clicks=50").task
    found = task.metrics(task.measure(lambda pairs: logits, torch.zeros(1), labels).tolist())
    above = logits[labels == 1][:, None] - logits[labels == 0][None]
    assert found["auc"] == pytest.approx(((above > 0).double() + (above == 0) / 2).mean().item(), abs=1e-3)
    one_sided = task.metrics(task.measure(lambda pairs: logits, torch.zeros(1), labels * 0).tolist())
    assert "auc" not in one_sided and "AUC" not in task.tell(one_sided)
    assert task.tell(found).endswith(f"of the clicks right, AUC {found['auc']:.4f}")


def test_what_a_run_keeps_is_checked(tmp_path: Path) -> None:
    task = prepared("task.clicks=50").task
    runs.Folder(tmp_path).create(task.config, task.files)
    task.keep(tmp_path)
    assert ratings.restore(task.config, tmp_path) == task
    good = {"users": 4, "items": 5, "ids": ""}
    for values in ([], {"users": 4}, {**good, "users": 0}, {**good, "items": 2**40}, {**good, "ids": 3}, good):
        (tmp_path / "task.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"task.json is not what was written"):
            ratings.restore(task.config, tmp_path)


# ------------------------------------------------------------------ runs
@pytest.mark.parametrize(
    "exchange",
    [("allreduce",), ("acco",), ("diloco", "exchange.local_steps=2"), ("parameter_server",)],
    ids=lambda words: words[0],
)
def test_every_family_of_exchanges_trains_it(exchange: tuple[str, ...], tmp_path: Path) -> None:
    words = [*RUN, f"exchange={exchange[0]}", *exchange[1:], "world=virtual", "world.size=2", f"runs_dir={tmp_path}"]
    assert main(["train", *words, "name=x"]) == 0
    last = records(tmp_path / "x", "eval")[-1]
    assert 0.3 < last["loss"] < 0.8 and 0 < last["auc"] < 1
    end = records(tmp_path / "x", "end")[-1]
    assert end["unit"] == "clicks" and end["tokens"] >= 96 and end["reason"] == "budget"


def test_prepare_reads_a_table_and_a_run_does_not_go_on_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.csv"
    file.write_text("user,item,label\n" + "".join(f"{k % 17},{k % 13},{k % 2}\n" for k in range(200)))
    where = [f"task.path={file}", f"data_dir={tmp_path / 'data'}"]
    assert main(["prepare", "task=ratings", *where]) == 0
    said = capsys.readouterr()
    assert "for training, 17 users and 13 items" in said.out and "preparing the table of clicks, once" in said.err
    own = [word for word in RUN if not word.startswith("task.")]
    words = ["train", *own, *where, f"runs_dir={tmp_path}", "name=x"]
    assert main(words) == 0
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert main([*words, "budget_tokens=192"]) == 2
    assert "the data are not those that" in capsys.readouterr().err


def test_a_run_on_a_file_is_evaluated_again_where_the_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder names no file to read. Seen to fail when `evaluate` took the task's settings from it."""
    lines = "\n".join(f"{k % 17},{k % 13},{k * k % 2}" for k in range(200))
    (tmp_path / "x.csv").write_text(f"user,item,label\n{lines}\n")
    own = [word for word in RUN if not word.startswith(("task.", "save"))]
    where = [f"task.path={tmp_path / 'x.csv'}", f"data_dir={tmp_path / 'data'}"]
    assert main(["train", *own, *where, "save_every=96", f"runs_dir={tmp_path}", "name=x"]) == 0
    loss = records(tmp_path / "x", "eval")[-1]["loss"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "x"), where[0], "--data-dir", str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, rel=1e-6)
    assert main(["evaluate", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1, "one sentence"


# ------------------------------------------------------------------ tables whose gradients are rows
SPARSE = [*RUN, "task.sparse=true", "optim.weight_decay=0"]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def run(tmp: Path, name: str, *words: str, ranks: int = 2) -> Path:
    assert main(["train", *words, "world=virtual", f"world.size={ranks}", f"runs_dir={tmp}", f"name={name}"]) == 0
    return tmp / name


def test_sparse_and_dense_runs_are_equal_under_plain_descent_for_any_number_of_ranks(tmp_path: Path) -> None:
    sgd = ["precision=fp64", "optim=sgd", "optim.lr=2", "optim.momentum=0", "optim.nesterov=false", "optim.clip=0.01"]
    dense = final(run(tmp_path, "dense", *RUN, *sgd, "optim.weight_decay=0"))
    for ranks in (1, 2, 3):
        words = [*SPARSE, *sgd, "task.table_optim=sgd", "task.table_lr=2"]
        sparse = final(run(tmp_path, f"sparse{ranks}", *words, ranks=ranks))
        assert sparse.keys() == {name.replace("users.weight", "tensor/table.users")
                                 .replace("items.weight", "tensor/table.items") for name in dense}  # fmt: skip
        for side in ("users", "items"):
            found, wanted = sparse[f"tensor/table.{side}"], dense[f"{side}.weight"]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    begun = prepared(*SPARSE[1:], "precision=fp64").task.build().users.weight
    assert (dense["users.weight"] - begun).abs().max() > 1e-3


def test_a_resumed_sparse_run_goes_on_bit_equal_at_any_world_size(tmp_path: Path) -> None:
    """Seen to fail without the sums of squares in the checkpoint."""
    horizon = "schedule.horizon=96"
    one = run(tmp_path, "one", *SPARSE, horizon)
    run(tmp_path, "two", *SPARSE, horizon, "budget_tokens=48")
    two = run(tmp_path, "two", *SPARSE, horizon)
    assert (one / "final/model.safetensors").read_bytes() == (two / "final/model.safetensors").read_bytes()
    run(tmp_path, "other", *SPARSE, horizon, "budget_tokens=48", ranks=3)
    other = final(run(tmp_path, "other", *SPARSE, horizon))
    for name, tensor in final(one).items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)
    assert [record["replicas_agree"] for record in records(one, "audit")] == [True, True]


def test_the_tables_of_a_run_are_evaluated_and_begun_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail when init_from took the flat map alone."""
    source = run(tmp_path, "x", *SPARSE, "model.layers=0")
    loss = records(source, "eval")[-1]["loss"]
    whole, kept = source / "checkpoints" / "4", source / "final"
    assert count_weights(whole) == count_weights(kept) == prepared(*SPARSE[1:], "model.layers=0").task.parameters
    for _ in range(2):  # from a checkpoint, then from final/
        capsys.readouterr()
        assert main(["evaluate", str(source), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, rel=1e-5)
        still = [*SPARSE, "model.layers=0", f"init_from={source}", "optim.lr=0", "task.table_lr=0", "budget_tokens=24"]
        begun = run(tmp_path, f"from{_}", *still)
        assert records(begun, "eval")[-1]["loss"] == pytest.approx(loss, rel=1e-5)
        shutil.rmtree(source / "checkpoints", ignore_errors=True)
    assert main(["train", *RUN, "model.layers=0", f"init_from={source}", f"runs_dir={tmp_path}", "name=dense"]) == 2
    assert "does not fit this model" in capsys.readouterr().err


def test_a_larger_table_costs_no_bytes(tmp_path: Path) -> None:
    """What a rank sends is a function of its clicks. Dense, it is one of the tables."""

    def sent(*words: str) -> float:
        few = [word for word in RUN if not word.startswith("task.users")]
        name = f"{len(list(tmp_path.iterdir()))}"  # all of one length, since names travel too
        run(tmp_path, name, *few, *words, "eval_every=0", "save_every=0")
        return float(records(tmp_path / name, "end")[-1]["bytes_total"])

    small, large = (sent("task.sparse=true", f"task.users={users}") for users in (64, 6400))
    assert small == large
    # Of a dense table each of two ranks sends 2 (N-1)/N = 1 times its bytes: 4 updates, rows of 4 numbers of 4 bytes.
    assert sent("task.users=6400") - sent("task.users=64") == 4 * (6400 - 64) * 4 * 4


def test_memory_that_a_sparse_table_does_not_need_is_not_asked_for() -> None:
    dense, sparse = (prepared("task.clicks=50", "task.users=100000", *more).task for more in ([], ["task.sparse=true"]))
    assert dense.parameters == sparse.parameters and dense.tables == 0
    assert sparse.parameters - sparse.tables == sum(p.numel() for p in sparse.build().parameters() if p.requires_grad)
