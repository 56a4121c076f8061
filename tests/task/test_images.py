"""Images: what is dealt is a function of position, folders are read with care, and the sizes are those of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hvdllm import runs
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.task import images
from hvdllm.world.detect import Place


def prepared(*words: str) -> Any:
    return images.prepare(compose(["task=images", *words]), say=pytest.fail, whole=True, wanted=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.RandomState(0)
    for label, tone in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(12):
            pixels = draw.randint(tone - 50, tone + 50, size=(20, 14, 3)).astype(np.uint8)
            ending = "png" if number % 2 else "jpg"
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.{ending}")
    return tmp_path / "photos"


# ------------------------------------------------------------------ data
def test_the_digits_are_all_there_and_equal_ones_on_one_side() -> None:
    data = prepared("task.validation_share=0.2")
    assert len(data.train) + len(data.validation) == 1797 and 280 < len(data.validation) < 440
    inputs, targets, units = data.train.take(np.arange(5), None)
    assert inputs.shape == (5, 1, 8, 8) and inputs.dtype == torch.float32 and (units == 1).all()
    assert inputs.min() >= -1 and inputs.max() <= 1 and set(targets.tolist()) <= set(range(10))
    assert data.data_hash == prepared("task.validation_share=0.2").data_hash != prepared().data_hash


def test_augmentation_is_a_function_of_seed_image_and_epoch() -> None:
    items = prepared("task.flip=true", "task.shift=2").train
    rows = np.array([4, 9, 4])
    a = items.take(rows, np.array([0, 0, 1]))[0]
    b = items.take(rows[::-1], np.array([1, 0, 0]))[0]
    assert torch.equal(a, b.flip(0))
    plain = items.take(rows, None)[0]
    assert torch.equal(plain[0], plain[2]) and torch.equal(plain, items.take(rows, None)[0])
    seen = {tuple(items.take(rows[:1], np.array([epoch]))[0].flatten().tolist()) for epoch in range(40)}
    assert len(seen) > 15, "five by five places, and both ways round"
    other = prepared("task.flip=true", "task.shift=2", "seed=1").train
    assert any(
        not torch.equal(items.take(rows, np.full(3, e))[0], other.take(rows, np.full(3, e))[0]) for e in range(5)
    )


def test_a_shift_moves_the_image_by_so_many_pixels() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    for epoch in range(30):
        moved = images.changed(image, 0, 1, False, 0, epoch)
        down, right = next(
            (d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)
            if np.array_equal(moved, np.pad(image, ((1, 1), (1, 1), (0, 0)))[1 + d : 5 + d, 1 + r : 5 + r])
        )  # fmt: skip
        assert abs(down) <= 1 and abs(right) <= 1


def test_a_folder_gives_its_classes_and_scaled_images(folder: Path) -> None:
    data = prepared(f"task.path={folder}", "task.size=10", "task.channels=3", "task.validation_share=0.3")
    assert data.task.classes == ("dark", "light") and len(data.train) + len(data.validation) == 24
    inputs, targets, _ = data.train.take(np.arange(len(data.train)), None)
    assert inputs.shape[1:] == (3, 10, 10)
    assert ((inputs.mean((1, 2, 3)) > 0).long() == targets).all(), "light images are those of the class light"
    again = prepared(f"task.path={folder}", "task.size=10", "task.channels=3", "task.validation_share=0.3")
    assert again.data_hash == data.data_hash
    held = prepared(f"task.path={folder}", f"task.validation={folder}")
    assert len(held.train) == len(held.validation) == 24


def test_a_data_set_that_shrank_is_another(folder: Path) -> None:
    before = prepared(f"task.path={folder}").data_hash
    (folder / "dark" / "3.png").unlink()
    assert prepared(f"task.path={folder}").data_hash != before


def test_what_is_no_image_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, *words: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            data = prepared(f"task.path={folder}", *words)
            data.train.take(np.arange(len(data.train)), None)
            data.validation.take(np.arange(len(data.validation)), None)
        assert "\n" not in str(error.value)

    other = folder / "dark" / "x.png"
    other.write_text("a text")
    refused("x.png is no PNG and no JPEG file")
    other.write_bytes((folder / "dark" / "1.png").read_bytes()[:60])
    refused("x.png cannot be decoded")
    other.unlink()
    (folder / "dark" / "y.png").symlink_to("/dev/zero")
    refused(r"y.png cannot be read \(is no regular file\)")
    (folder / "dark" / "y.png").unlink()
    with pytest.raises(UserError, match="there is no such folder"):
        prepared(f"task.path={tmp_path}/none")
    (tmp_path / "one" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has 1 folders and 0 images"):
        prepared(f"task.path={tmp_path}/one")
    (tmp_path / "more" / "grey").mkdir(parents=True)
    (tmp_path / "more" / "dark").mkdir()
    (tmp_path / "more" / "grey" / "1.png").write_bytes((folder / "dark" / "1.png").read_bytes())
    refused("has the class `dark`|has the class `grey`", f"task.validation={tmp_path}/more")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["task.channels=2"], "give 1 .grey. or 3"),
        (["task.shift=8"], "out of sight"),
        (["task.validation=x"], "the digits hold out images of their own"),
        (["model=tiny"], "task=images trains model=resnet"),
        (["batch_tokens=1", "world=virtual", "world.size=2"], "batch_tokens=1 is 1 images, fewer than the 2 ranks"),
        (["exchange=acco", "batch_tokens=7"], "batch_tokens=7 is 7 images, and exchange=acco takes them in 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        check(compose(["task=images", *words]), Place())


# ------------------------------------------------------------------ task
@pytest.mark.parametrize("words", [(), ("model.norm=batch", "model.depth=2"), ("model.stages=1", "task.channels=3")])
def test_sizes_are_those_of_the_model(words: tuple[str, ...]) -> None:
    task = prepared("task.size=12", *words).task
    model = task.build()
    assert task.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, task.config.task.channels, 12, 12))
    assert task.flops == 3 * counter.get_total_flops()


def test_loss_and_measure_are_sums_over_images() -> None:
    data = prepared()
    model = data.task.build()
    inputs, targets, _ = data.train.take(np.arange(6), None)
    logits = model(inputs)
    plain = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(data.task.loss(model, inputs, targets), plain)
    right = float((logits.argmax(1) == targets).sum())
    assert data.task.measure(model, inputs, targets).tolist() == pytest.approx([plain.item(), 6, right])
    assert data.task.metrics([3.0, 6.0, 5.0]) == {"loss": 0.5, "accuracy": 5 / 6}
    assert data.task.tell({"loss": 0.5, "accuracy": 0.5}) == "50.0% of the images right"


def test_with_group_norm_a_gradient_is_of_its_image_alone_and_with_batch_norm_it_is_not() -> None:
    for norm, alone in (("group", True), ("batch", False)):
        data = prepared(f"model.norm={norm}", "precision=fp64")
        model = data.task.build()
        inputs, targets, _ = data.train.take(np.arange(4), None)
        whole = torch.autograd.grad(data.task.loss(model, inputs, targets), model.stem.weight)[0]
        halves = sum(
            torch.autograd.grad(data.task.loss(model, inputs[k : k + 2], targets[k : k + 2]), model.stem.weight)[0]
            for k in (0, 2)
        )
        assert torch.allclose(whole, halves, rtol=1e-10, atol=1e-12) == alone


def test_what_a_run_keeps_is_checked(tmp_path: Path) -> None:
    task = prepared().task
    config = task.config
    runs.Folder(tmp_path).create(config, task.files)
    task.keep(tmp_path)
    assert images.restore(config, tmp_path).classes == task.classes
    for text in (json.dumps({"classes": ["a", "b"]}), "[]", '{"classes": [1, 2]}', "{", '{"classes": ["a"]}'):
        (tmp_path / "task.json").write_text(text)
        with pytest.raises(UserError, match=r"task.json is not what was written"):
            images.restore(config, tmp_path)
    (tmp_path / "task.json").unlink()
    with pytest.raises(UserError, match=r"task.json cannot be read"):
        images.restore(config, tmp_path)
