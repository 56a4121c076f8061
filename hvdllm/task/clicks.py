"""Tables of clicks: rows of a user, an item and a label, from .csv or .parquet files into memory maps, or drawn.

Files are read once, in chunks, into a folder `data_dir/<key>/` (see text/shards.py, `once`), so memory is bounded by
the number of different ids, of which each takes 8 bytes. It holds train.bin and validation.bin (ROW), and about.json.

An id is any text; it becomes the place of its 64-bit hash among those of all ids, so rows do not depend on the order of
the files. Where a setting gives the size of the table, ids are whole numbers below it, and are rows themselves.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hvdllm import runs, untrusted
from hvdllm.errors import UserError
from hvdllm.order.epochs import drawn
from hvdllm.plain import Json
from hvdllm.task.parts import Ratings
from hvdllm.text.shards import once

FORMAT = 1
ROW = np.dtype([("user", "<i4"), ("item", "<i4"), ("label", "<f4")])
CHUNK = 2**17  # rows that are in memory at a time
ENDINGS = (".csv", ".parquet")
SHOWN = 40  # characters of a wrong value that a sentence shows
FACTORS, SPREAD, BASE = 4, 1.5, -0.5  # of drawn clicks: logits have this deviation around this mean


@dataclass(frozen=True)
class Table:
    """Clicks, open.

    Attributes:
        train, validation: of ROW.
        users, items: how many rows the tables of the model need.
        ids: a hash of the ids and their rows.
        content: a hash of the clicks.
        least: the least validation loss to be expected of any model, in nats a click; None if it is not known.
    """

    train: np.ndarray
    validation: np.ndarray
    users: int
    items: int
    ids: str
    content: str
    least: float | None = None


# ------------------------------------------------------------------ drawn
def draw(settings: Ratings) -> Table:
    """Clicks at known probabilities: a pure function of the settings.

    User u and item i have factors p, q of FACTORS normal numbers each. The logit of a click is BASE + SPREAD p q /
    sqrt(FACTORS). Items are not equally popular: the first tenth gets a third of the rows.
    """
    users, items, count = settings.users or 400, settings.items or 200, settings.clicks or 100_000
    source = drawn(settings.drawn_by)
    p, q = (source.standard_normal((rows, FACTORS)) for rows in (users, items))
    rows = np.zeros(count, ROW)
    rows["user"] = source.randint(users, size=count)
    rows["item"] = (items * source.random_sample(count) ** 2).astype(np.int64)
    logits = BASE + SPREAD / math.sqrt(FACTORS) * (p[rows["user"]] * q[rows["item"]]).sum(1)
    chance = 1 / (1 + np.exp(-logits))
    rows["label"] = source.random_sample(count) < chance
    out = held(rows["user"].astype(np.uint64), rows["item"].astype(np.uint64), settings.validation_share)
    entropy = -(chance * np.log(chance) + (1 - chance) * np.log1p(-chance))[out]
    least = float(entropy.mean()) if out.any() else None
    return Table(rows[~out], rows[out], users, items, "", _content(rows[~out], rows[out]), least)


def held(users: np.ndarray, items: np.ndarray, share: float) -> np.ndarray:
    """Which pairs are held out, by a hash of both (splitmix64), so that equal pairs are on one side.

    Args:
        users, items: uint64 [rows].
        share: of the pairs.
    """
    x = users * np.uint64(0x9E3779B97F4A7C15) + (items ^ np.uint64(0xD1B54A32D192ED03))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return np.asarray((x >> np.uint64(32)).astype(np.float64) < share * 2**32)


def _content(train: np.ndarray, validation: np.ndarray) -> str:
    digest = hashlib.sha256(f"{len(train)} {len(validation)} ".encode())
    for side in (train, validation):
        for at in range(0, len(side), CHUNK):
            digest.update(side[at : at + CHUNK].tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------ files
def prepare(settings: Ratings, data_dir: Path, say: Callable[[str], None], whole: bool) -> Table:
    """Opens the table of the user's files; reads them first if that was not done before.

    Args:
        settings: of the task; `path` is given.
        data_dir: the folder of all prepared data.
        say: gets a sentence before anything that takes time.
        whole: whether the sums of the prepared files are checked.

    Raises UserError if a file is missing, empty or damaged, or if a row cannot be used; the sentence names file and
    line.
    """
    files = listed(Path(str(settings.path)).expanduser())
    recipe = _recipe(settings, files)

    def build(part: Path) -> None:
        _build(settings, files, part)
        if _recipe(settings, files) != recipe:
            raise UserError(f"task.path={settings.path} changed while it was read: start again when it is complete")

    key = "clicks-" + hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    return _open(once(data_dir, key, build, "table of clicks", say), whole)


def listed(path: Path) -> list[Path]:
    """The files that a path names, in order. Raises UserError if there are none."""
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in ENDINGS)
        if not found:
            raise UserError(f"task.path={path} has no .csv and no .parquet file: give another folder, or one file")
        return found
    if path.suffix.lower() not in ENDINGS or not path.exists():
        raise UserError(f"task.path={path} is no .csv or .parquet file that is there, nor a folder of such: correct it")
    return [path]


def _recipe(settings: Ratings, files: list[Path]) -> Json:
    """Everything that shapes the prepared files, as plain values."""
    try:
        stats = [(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    except OSError as error:
        raise UserError(f"task.path: {error.filename} cannot be read ({error.strerror}): make it readable") from None
    return {"format": FORMAT, "files": stats, **asdict(settings), "path": None}


def _build(settings: Ratings, files: list[Path], part: Path) -> None:
    """Reads the files into the folder `part`: first ids as they are, then, when all are known, their rows."""
    part.mkdir(0o700)
    count = 0
    sides = [Ids(settings.users, "user", settings.user_column), Ids(settings.items, "item", settings.item_column)]
    raw = [part / name for name in ("users.raw", "items.raw", "labels.raw")]
    with raw[0].open("wb") as users, raw[1].open("wb") as items, raw[2].open("wb") as labels:
        for file in files:
            before = count
            for chunk in _chunks(file, settings):
                parsed = Parsed(file, settings, sides, chunk)
                parsed.users.tofile(users)
                parsed.items.tofile(items)
                parsed.labels.tofile(labels)
                count += len(chunk)
            if count == before:
                raise UserError(f"{file} is empty, it has no rows: give it some, or leave it out of task.path")
    known = [side.all() for side in sides]
    columns = [np.memmap(path, dtype, "r") for path, dtype in zip(raw, ("<u8", "<u8", "<f4"), strict=True)]
    with (part / "train.bin").open("wb") as train, (part / "validation.bin").open("wb") as validation:
        for at in range(0, count, CHUNK):
            users_, items_, labels_ = (column[at : at + CHUNK] for column in columns)
            rows = np.zeros(len(labels_), ROW)
            for name, column, ids in (("user", users_, known[0]), ("item", items_, known[1])):
                rows[name] = column if ids is None else np.searchsorted(ids, column)
            rows["label"] = labels_
            out = held(users_, items_, settings.validation_share)
            rows[~out].tofile(train)
            rows[out].tofile(validation)
    del columns
    for path in raw:
        path.unlink()
    names = "".join("" if ids is None else hashlib.sha256(ids.tobytes()).hexdigest() for ids in known)
    numbers = [side.size if ids is None else len(ids) for side, ids in zip(sides, known, strict=True)]
    content = _content(*(_mapped(part / f"{side}.bin") for side in ("train", "validation")))
    about = {"users": numbers[0], "items": numbers[1], "ids": hashlib.sha256(names.encode()).hexdigest()}
    (part / "about.json").write_text(json.dumps({**about, "content": content}))
    mode = 0o666
    for file in files:  # who may read all files of the user may read these
        mode &= file.stat().st_mode | 0o600
    for path in part.iterdir():
        path.chmod(mode & path.stat().st_mode)
        runs.sync_folder(path)
    part.chmod(0o700 | mode | (mode & 0o444) >> 2)
    runs.sync_folder(part)


def _mapped(path: Path) -> np.ndarray:
    """A memory map of ROW; NumPy cannot map an empty file."""
    return np.memmap(path, ROW, "r") if os.path.getsize(path) else np.zeros(0, ROW)


def _open(folder: Path, whole: bool) -> Table:
    try:
        about = untrusted.read_json(folder / "about.json", 2**16, folder)
        train, validation = _mapped(folder / "train.bin"), _mapped(folder / "validation.bin")
        found = Table(train, validation, **about)
        damaged = whole and _content(train, validation) != found.content
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the table in {folder} cannot be read ({error}): delete that folder to prepare it anew"
        ) from None
    if damaged:
        raise UserError(f"the table in {folder} is not what was written: delete that folder to prepare it anew")
    return found


# ------------------------------------------------------------------ rows of a file
Row = tuple[int, str, str, str]  # the number of its line, the ids of user and item, and the label


class Ids:
    """The ids of users or of items, as unsigned 64-bit numbers.

    Args:
        size: rows of the table, if ids are rows themselves; else None, and they are hashed.
        what: user or item.
        column: where they stand.
    """

    def __init__(self, size: int | None, what: str, column: str) -> None:
        self.size, self.what, self.column = size, what, column
        self._known = np.zeros(0, np.uint64)
        self._new: list[np.ndarray] = []

    def number(self, text: str) -> int:
        """The number of an id. Raises ValueError, with the end of a sentence, if it has none."""
        if self.size is None:
            if not text:
                raise ValueError(f"has no {self.what} (column `{self.column}`)")
            return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) >= self.size:
            raise ValueError(
                f"has the {self.what} {shown(text)}, which is outside the table: task.{self.what}s={self.size} takes "
                f"whole numbers from 0 to {self.size - 1}"
            )
        return int(text)

    def note(self, numbers: np.ndarray) -> None:
        """Remembers the numbers of a chunk."""
        if self.size is None:
            self._new.append(np.unique(numbers))
            if sum(map(len, self._new)) > max(8 * CHUNK, len(self._known)):
                self._merge()

    def _merge(self) -> None:
        self._known, self._new = np.unique(np.concatenate([self._known, *self._new])), []

    def all(self) -> np.ndarray | None:
        """All numbers, sorted: the row of an id is its place here. None if ids are rows themselves."""
        if self.size is not None:
            return None
        self._merge()
        return self._known


class Parsed:
    """A chunk of rows as arrays: `users` and `items`, uint64, and `labels`, float32.

    Raises UserError, naming file and line, for the first row that cannot be used.
    """

    def __init__(self, file: Path, settings: Ratings, sides: list[Ids], rows: list[Row]) -> None:
        lines, *columns = zip(*rows, strict=True)
        problems: list[tuple[int, str]] = []

        def parsed(texts: tuple[str, ...], of: Callable[[str], float]) -> list[float]:
            """The value of each text. Each text is looked at once, since a column has few different ones."""
            values: dict[str, float] = {}
            for text in dict.fromkeys(texts):
                try:
                    values[text] = of(text)
                except ValueError as error:
                    problems.append((texts.index(text), str(error)))  # the first one of this column
                    return []
            return [values[text] for text in texts]

        users, items = (parsed(texts, side.number) for texts, side in zip(columns[:2], sides, strict=True))
        labels = parsed(columns[2], lambda text: label_of(text, settings))
        if problems:
            at, problem = min(problems)
            raise UserError(f"{file}, line {lines[at]}, {problem}: correct or remove that row")
        self.users, self.items = np.array(users, np.uint64), np.array(items, np.uint64)
        self.labels = np.array(labels, np.float32)
        for side, numbers in zip(sides, (self.users, self.items), strict=True):
            side.note(numbers)


def label_of(text: str, settings: Ratings) -> float:
    """The label of a row, from 0 to 1. Raises ValueError, with the end of a sentence, if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"has the label {shown(text)}, which is no number (column `{settings.label_column}`)")
    if settings.threshold is not None:
        return float(value >= settings.threshold)
    if not 0 <= value <= 1:
        raise ValueError(
            f"has the label {shown(text)}, which is not between 0 and 1 (task.threshold would say from which rating on "
            "it is a click)"
        )
    return value


def shown(text: str) -> str:
    """A value of a stranger's file, short and without control characters."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def _chunks(file: Path, settings: Ratings) -> Iterator[list[Row]]:
    """The rows of a file, at most CHUNK at a time."""
    rows = _csv(file, settings) if file.suffix.lower() == ".csv" else _parquet(file, settings)
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _places(file: Path, names: list[str], settings: Ratings) -> list[int]:
    """The places of the three columns. Raises UserError if one is missing."""
    places = []
    for key in ("user_column", "item_column", "label_column"):
        column = getattr(settings, key)
        if names.count(column) != 1:
            has = ", ".join(shown(name) for name in names[:8]) + ", …" * (len(names) > 8)
            raise UserError(
                f"{file}, line 1, has {'no' if column not in names else 'more than one'} column {shown(column)} "
                f"(it has {has or 'none'}): give task.{key}"
            )
        places.append(names.index(column))
    return places


def _csv(file: Path, settings: Ratings) -> Iterator[Row]:
    """The rows of a .csv file in UTF-8 with commas, whose first line names the columns."""
    line = 0

    def lines(data: Iterable[bytes]) -> Iterator[str]:
        nonlocal line
        for each in data:
            line += 1
            yield each.decode("utf-8-sig" if line == 1 else "utf-8")

    try:
        with untrusted.opened(file) as data:
            rows = csv.reader(lines(untrusted.lines(data)), strict=True)
            names = next(rows, None)
            if names is None:
                return
            user, item, label = _places(file, [name.strip() for name in names], settings)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise UserError(
                        f"{file}, line {line}, has {len(row)} fields and the first line {len(names)}: correct that row"
                    )
                yield line, row[user].strip(), row[item].strip(), row[label].strip()
    except UnicodeDecodeError:
        raise UserError(f"{file}, line {line}, is no CSV in UTF-8: give another file, or convert it") from None
    except csv.Error as error:
        raise UserError(f"{file}, line {line}, is no CSV ({error}): correct it") from None
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"{file} cannot be read ({error}): correct or remove it") from None


def _parquet(file: Path, settings: Ratings) -> Iterator[Row]:
    """The rows of a .parquet file. Rows count as lines, from 1 on."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("task.path with .parquet files needs pyarrow: pip install 'hvdllm[ratings]'") from None
    try:
        with untrusted.opened(file) as data, ParquetFile(data) as table:
            _places(file, table.schema_arrow.names, settings)
            columns = [settings.user_column, settings.item_column, settings.label_column]
            line = 0
            for batch in table.iter_batches(CHUNK, columns=columns):
                for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    line += 1
                    user, item, label = ("" if value is None else str(value) for value in row)
                    yield line, user, item, {"True": "1", "False": "0"}.get(label, label)
    except (ArrowException, OSError, untrusted.Unfit) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"{file} is no Parquet file that can be read ({said}): correct or remove it") from None
