"""The class of an image: the digits that come with hvdllm, or the user's folders. Items and units are images.

The digits are 1,797 handwritten ones of 8 x 8 pixels (Alpaydin and Kaynak, 1998; UCI Machine Learning Repository,
"Optical Recognition of Handwritten Digits", CC BY 4.0), as scikit-learn has them.

Images are decoded when they are dealt. The hash of a folder is of the classes, the sizes and the first bytes of its
files, so that a start need not read all of a large data set.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.models.resnet import ResNet, init_weights, operations
from hvdllm.order.epochs import drawn
from hvdllm.settings import Config
from hvdllm.task import kept
from hvdllm.task.base import DTYPES, Prepared

ENDINGS = (".png", ".jpg", ".jpeg")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
HEAD = 4096  # bytes of each file that enter the hash
MOST = 2**28  # the most bytes of a file
MOST_CLASSES, MOST_NAME = 100_000, 255


class Images:
    """Labelled images, decoded as they are dealt.

    Args:
        read: gives image number i as uint8 [size, size, channels].
        labels: the class of each, int64 [images].
        augment: how images are changed in training: seed, pixels of shift, and whether to mirror; None for none.
        what: names the data in a sentence.
    """

    name, units = "images", 1.0

    def __init__(
        self, read: Callable[[int], np.ndarray], labels: np.ndarray, augment: tuple[int, int, bool] | None, what: str
    ) -> None:
        self.read, self.labels, self.augment, self.what = read, labels, augment, what

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Images between -1 and 1, float32 [rows, channels, size, size], and classes, int64 [rows]."""
        images = []
        for i, row in enumerate(rows):
            image = self.read(int(row))
            if epochs is not None and self.augment is not None:
                image = changed(image, *self.augment, int(row), int(epochs[i]))
            images.append(image)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.contiguous(), torch.from_numpy(self.labels[rows]), np.ones(len(rows), np.int64)

    def documents(self) -> np.ndarray:
        """Each image is a document of its own."""
        return np.arange(len(self))

    def too_few(self, batch: int) -> str:
        if not batch:
            return (
                f"no image of {self.what} is held out: give task.validation, raise task.validation_share, or switch "
                "evaluation off with eval_every=0"
            )
        return (
            f"{self.what} has {len(self)} images for training, fewer than the {batch} that one batch takes: give more, "
            "or lower batch_tokens"
        )


def changed(image: np.ndarray, seed: int, shift: int, flip: bool, row: int, epoch: int) -> np.ndarray:
    """The image moved by up to `shift` pixels and maybe mirrored: a pure function of seed, row and epoch."""
    draw = drawn(seed, row, epoch)
    if shift:
        padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
        down, right = draw.randint(2 * shift + 1, size=2)
        image = padded[down : down + image.shape[0], right : right + image.shape[1]]
    return image[:, ::-1] if flip and draw.randint(2) else image


@dataclass(frozen=True)
class Classification:
    """The task over some classes, whose names are `classes`."""

    config: Config
    classes: tuple[str, ...]

    unit, measures, tables = "images", 3, 0

    @property
    def kept(self) -> str:
        """What the run's folder keeps, as JSON."""
        return json.dumps({"classes": self.classes})

    @property
    def files(self) -> dict[str, str]:
        return kept.digest(self.kept)

    def keep(self, folder: Path) -> None:
        kept.write(folder, self.kept)

    def build(self) -> nn.Module:
        model = ResNet(self.config.model, self.config.task.channels, len(self.classes))
        model.to(DTYPES[self.config.precision])
        init_weights(model, self.config.seed)
        if self.config.model.compile:
            for block in model.blocks:
                block.compile()
        return model

    @cached_property
    def _shape(self) -> ResNet:
        """The model without memory."""
        with torch.device("meta"):
            return ResNet(self.config.model, self.config.task.channels, len(self.classes))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._shape.parameters())

    @property
    def frozen(self) -> int:
        return 0

    @property
    def activations(self) -> int:
        model, size = self.config.model, self.config.task.size
        return int(4 * model.width * size * size * (1 + 2 * model.depth))

    @property
    def flops(self) -> float:
        return 6 * operations(self._shape, self.config.task.size, self.config.task.size)

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(inputs)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")

    def measure(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss, the images, and how many of them were classified rightly."""
        logits = model(inputs).double()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        right = (logits.argmax(1) == targets).sum()
        return torch.stack([loss, torch.full_like(loss, len(targets)), right.double()])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean loss in nats an image, and the share of images that were classified rightly."""
        return {"loss": sums[0] / sums[1], "accuracy": sums[2] / sums[1]}

    def tell(self, metrics: dict[str, float]) -> str:
        return f"{metrics['accuracy']:.1%} of the images right"

    def sample(self, model: nn.Module, units: int) -> str:
        return ""


def prepare(config: Config, *, say: Callable[[str], None], whole: bool, wanted: str | None) -> Prepared:
    task = config.task
    if task.path is None:
        return _digits(config)
    classes, files = listed(Path(task.path).expanduser(), "task.path")
    digest = hashes(files)
    if task.validation is not None:
        others, held = listed(Path(task.validation).expanduser(), "task.validation")
        if unknown := sorted(set(others) - set(classes)):
            raise UserError(f"task.validation={task.validation} has the class `{unknown[0]}`, which task.path has not")
        held = [(path, classes.index(others[label])) for path, label in held]
        digest_held = hashes(held)
    else:
        chosen = [_is_held(each, task.validation_share) for each in digest]
        held = [each for each, out in zip(files, chosen, strict=True) if out]
        files = [each for each, out in zip(files, chosen, strict=True) if not out]
        digest_held = []
    names = "\n".join([*classes, str(task.size), str(task.channels), *digest, "", *digest_held])
    sides = []
    for side, augment in ((files, _augment(config)), (held, None)):
        paths, labels = [path for path, _ in side], np.array([label for _, label in side], np.int64)
        sides.append(Images(Decoded(paths, task.size, task.channels), labels, augment, f"task.path={task.path}"))
    return _prepared(
        config, classes, sides[0], sides[1], hashlib.sha256(names.encode()).hexdigest(), Path(task.path).name
    )


def _digits(config: Config) -> Prepared:
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        images, labels = stored["images"], stored["labels"].astype(np.int64)
    size, channels = config.task.size, config.task.channels
    pixels = (images.astype(np.uint16) * 255 // 16).astype(np.uint8)
    if size != 8:
        scaled = F.interpolate(torch.from_numpy(pixels)[:, None].float(), (size, size), mode="bilinear")
        pixels = scaled[:, 0].round().to(torch.uint8).numpy()
    pixels = np.repeat(pixels[..., None], channels, axis=3)
    held = np.array([_is_held(hashlib.sha256(each).hexdigest(), config.task.validation_share) for each in images])
    sides = []
    for rows, augment in ((np.flatnonzero(~held), _augment(config)), (np.flatnonzero(held), None)):
        own = pixels[rows]
        sides.append(Images(own.__getitem__, labels[rows], augment, "the set of digits"))
    key = f"digits {size} {channels} {config.task.validation_share}"
    digest = hashlib.sha256(key.encode() + images.tobytes() + labels.tobytes()).hexdigest()
    return _prepared(config, [str(digit) for digit in range(10)], sides[0], sides[1], digest, "digits")


def _prepared(config: Config, classes: list[str], train: Images, held: Images, digest: str, name: str) -> Prepared:
    size, channels = config.task.size, config.task.channels
    about = f"{name}, {len(train):,} training images of {size} x {size} x {channels}, {len(classes)} classes"
    return Prepared(Classification(config, tuple(classes)), train, held, digest, about)


def _augment(config: Config) -> tuple[int, int, bool]:
    return config.seed, config.task.shift, config.task.flip


def _is_held(digest: str, share: float) -> bool:
    """Whether an image is held out. Equal images are on one side."""
    return int(digest[:8], 16) < share * 2**32


def listed(folder: Path, key: str) -> tuple[list[str], list[tuple[Path, int]]]:
    """The classes, which are the names of the folders, and the files with the numbers of their classes, in order.

    Raises UserError if there are no two classes, or if a file is none of an image.
    """
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: there is no such folder; it has a folder of images for each class")
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    if len(classes) < 2 or not files:
        raise UserError(
            f"{key}={folder} has {len(classes)} folders and {len(files)} images: it needs a folder of .png or .jpg "
            "files for each of at least two classes"
        )
    return classes, files


def hashes(files: list[tuple[Path, int]]) -> list[str]:
    """A hash for each file, of its class, its size and its first bytes. Raises UserError if one is no image."""

    def one(each: tuple[Path, int]) -> str:
        path, label = each
        try:
            with untrusted.opened(path) as file:
                head, size = file.read(HEAD), file.seek(0, io.SEEK_END)
        except (OSError, untrusted.Unfit) as error:
            raise UserError(f"the image {path} cannot be read ({error}): correct or remove it") from None
        if not head.startswith(MAGIC):
            raise UserError(f"{path} is no PNG and no JPEG file: correct or remove it")
        if size > MOST:
            raise UserError(f"{path} has {size:,} bytes, more than the {MOST:,} that an image may have: remove it")
        return hashlib.sha256(f"{label} {size} ".encode() + head).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, files))


class Decoded:
    """Reads image number i of a list of files, scaled to size x size."""

    def __init__(self, paths: list[Path], size: int, channels: int) -> None:
        self.paths, self.size, self.channels = paths, size, channels
        try:
            from PIL import Image
        except ImportError:
            raise UserError("task.path needs the package pillow: pip install pillow, or leave it out") from None
        self.library: Any = Image

    def __call__(self, number: int) -> np.ndarray:
        """uint8 [size, size, channels]. Raises UserError, naming the file, if it cannot be decoded."""
        path = self.paths[number]
        try:
            with untrusted.opened(path) as file, self.library.open(file, formats=("PNG", "JPEG")) as image:
                scaled = image.convert("L" if self.channels == 1 else "RGB").resize((self.size, self.size))
                return np.asarray(scaled, np.uint8).reshape(self.size, self.size, self.channels)
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise UserError(f"the image {path} cannot be decoded ({error}): correct or remove it") from None


def restore(config: Config, folder: Path) -> Classification:
    def made(values: Any) -> Classification | None:
        classes = values["classes"]
        known = isinstance(classes, list) and all(isinstance(c, str) and len(c) <= MOST_NAME for c in classes)
        return Classification(config, tuple(classes)) if known and 2 <= len(classes) <= MOST_CLASSES else None

    return kept.read(folder, made)


def rough(config: Config) -> Classification:
    return Classification(config, ("", ""))
