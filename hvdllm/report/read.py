"""From words of the command line to runs.

Invariant: nothing that stands in a folder raises an error. What cannot be used is skipped with a reason: a folder
becomes a `Skipped`, a record becomes one of the run's notes.

Folders come from clusters, crashes and strangers. A metrics.jsonl may be a pipe, may end in the middle of a line, may
hold strings where numbers belong, or names that are markup. Therefore files are opened by untrusted.py. Records are
read one by one and reduced to a bounded number of points, so that a long run fits into memory. Numbers must be finite
and of a size that a run can have (values.py). Text loses its control characters, and is cut if it is too long.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hvdllm import sums, untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.report.metric import LOSS, Metric
from hvdllm.report.streamed import Streamed
from hvdllm.report.values import measured, number
from hvdllm.settings import warmed_up

MOST_BYTES = 4 * 2**30  # of a metrics.jsonl: six million `commit` records
MOST_POINTS = 100_000  # of a curve over tokens; a longer one loses every second point until it fits
MOST_EVALS = 100_000
MOST_LIVES = 1000
MOST_LINE = 2**20  # bytes
MOST_CONFIG = 256 * 2**10  # bytes of a config.yaml
MOST_SETTINGS = 2000
MOST_TEXT = 120  # characters of a name or value
MOST_NOTES = 20
DEPTH = 4  # folders below a word in which runs are looked for
MOST_FOLDERS = 20_000


@dataclass(frozen=True)
class Skipped:
    """A folder that is no part of the report, and the reason."""

    where: str
    why: str


@dataclass(frozen=True)
class CurvePoint:
    """An `eval` record. None stands for what was not recorded.

    Attributes:
        tokens: committed up to here.
        loss: what is compared (Metric), by default in nats a token; inf if it was not finite.
        seconds: of the training clock.
        wall_s: seconds with evaluations, saves and samples, over all lives of the run.
        bytes: sent by rank 0 up to here.
        updates: made up to here.
    """

    tokens: float
    loss: float
    seconds: float | None = None
    wall_s: float | None = None
    bytes: float | None = None
    updates: float | None = None


@dataclass
class Sums:
    """What the `commit` records of a run add up to.

    Seconds are means over the ranks, but cpu_s is that of all ranks together. skew_s is the compute of the slowest rank
    minus that of the fastest.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    compute_s: float = 0.0
    blocked_s: float = 0.0
    flight_s: float = 0.0
    skew_s: float = 0.0
    cpu_s: float = 0.0
    updates: float = 0.0
    bytes: float = 0.0  # sent by rank 0
    loss: float | None = None  # the training loss of the last record, in nats a token
    stale: float = 0.0  # staleness, summed over updates
    stale_most: float = 0.0
    micro_batches: list[float] = field(default_factory=list)  # of each rank; so are the next two
    compute_by_rank: list[float] = field(default_factory=list)
    blocked_by_rank: list[float] = field(default_factory=list)
    records: int = 0  # how many say which rank the others waited for
    waited_for: dict[int, int] = field(default_factory=dict)  # rank: in how many records it was waited for


@dataclass
class History:
    """A run, as its records describe it.

    `settings` are those of the last life of the run as flat names (`optim.lr`), all as text. Beside them stands what
    was found where it ran (`world.ranks`, `data.hash`, `versions.torch`, ...).
    """

    path: str
    name: str
    settings: dict[str, str]
    metric: Metric = LOSS  # what its evaluations are read for
    unit: str = "tokens"  # what is counted
    evals: list[CurvePoint] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    status: str = "unfinished"  # or finished, stopped or failed, by the last `end` record
    lives: int = 1
    tokens: float = 0.0  # committed, by the last record of any kind
    computed: float | None = None  # tokens; known once the run has ended
    stragglers: list[int] = field(default_factory=list)  # ranks that were reported to delay the others
    notes: list[str] = field(default_factory=list)
    streamed: Streamed = field(default_factory=Streamed)  # empty if it trained on no stream
    fingerprint: str = ""  # hash of metrics.jsonl

    @property
    def seed(self) -> str:
        return self.settings.get("seed", "?")

    @property
    def virtual(self) -> bool:
        """Whether it ran on logical ranks without a simulated clock, so that its seconds mean nothing."""
        return self.settings.get("world.kind") == "virtual" and not self.simulated

    @property
    def simulated(self) -> bool:
        """Whether its seconds are those of a simulated clock."""
        return self.settings.get("world.clock") == "simulated"

    @property
    def warmup_tokens(self) -> float:
        """The tokens until which its exchange or its wire still does something simpler."""
        given = [self.settings.get(f"{part}.warmup_tokens") for part in ("exchange", "wire")]
        batch = _setting(self.settings.get("batch_tokens"))
        return max(warmed_up(None, batch or 0.0) if one == "null" else _setting(one) or 0.0 for one in given)

    @property
    def budget(self) -> float | None:
        return _setting(self.settings.get("budget_tokens"))

    @property
    def new_share(self) -> float:
        """The share of its tokens that a stream had not brought before; the rest is replay (text.replay)."""
        replay = _setting(self.settings.get("text.replay")) or 0.0
        return 1 - replay if 0 <= replay < 1 else 1.0

    def note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < MOST_NOTES:
            self.notes.append(text)


def gather(words: list[str], metric: Metric = LOSS) -> tuple[list[History], list[Skipped]]:
    """The runs that these words name, in the order given, and what was left out.

    Raises UserError if a word names nothing at all.
    """
    folders, skipped = find(words)
    found: list[History] = []
    for folder in folders:
        run = read(folder, metric)
        if isinstance(run, Skipped):
            skipped.append(run)
            continue
        twin = next((other for other in found if other.fingerprint == run.fingerprint), None)
        if twin is not None:  # a copied folder must not count as another replicate
            skipped.append(Skipped(run.path, f"has the records of {twin.path}: a copy"))
        else:
            found.append(run)
    return found, skipped


# ------------------------------------------------------------------ folders
def find(words: list[str]) -> tuple[list[Path], list[Skipped]]:
    """The folders of runs, each once: those that are named, and those below a folder that is named."""
    found: dict[str, Path] = {}
    skipped: list[Skipped] = []
    for word in words:
        paths = [word] if os.path.lexists(word) or not glob.has_magic(word) else sorted(glob.glob(word))
        if not paths or not os.path.lexists(paths[0]):
            raise UserError(f"{text(word)}: there is no such folder; give folders of runs or sweeps, or a pattern")
        for path in paths:
            before = len(found) + len(skipped)
            for folder in _walk(Path(path), skipped):
                if len(found) >= MOST_FOLDERS:
                    skipped.append(Skipped(text(path), f"more than {MOST_FOLDERS:,} runs: the rest is left out"))
                    break
                found.setdefault(os.path.realpath(folder), folder)
            if len(found) + len(skipped) == before and not _known(Path(path), found):
                skipped.append(Skipped(text(path), "holds no run (a folder with config.yaml or metrics.jsonl)"))
    return list(found.values()), skipped


def _known(path: Path, found: dict[str, Path]) -> bool:
    """Whether runs in this folder were found by an earlier word."""
    real = os.path.realpath(path)
    return any(one == real or one.startswith(real + os.sep) for one in found)


def _walk(path: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """This folder if it is that of a run, else the folders of runs below it. A link is followed once, so loops end."""
    seen: set[str] = set()
    todo = [(path, 0)]
    while todo:
        folder, depth = todo.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            if folder.name == "metrics.jsonl" and depth == 0 and not folder.is_dir():
                yield folder.parent
                continue
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except (OSError, ValueError) as error:
            skipped.append(Skipped(text(folder), f"cannot be read ({_reason(error)})"))
            continue
        if any(entry.name in ("config.yaml", "metrics.jsonl") for entry in inside):
            yield folder
        elif depth < DEPTH and len(seen) < MOST_FOLDERS:
            below = [(Path(entry.path), depth + 1) for entry in inside if _is_folder(entry)]
            todo += reversed(below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _reason(error: Exception) -> str:
    return text(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ------------------------------------------------------------------ one run
def read(folder: Path, metric: Metric = LOSS) -> History | Skipped:
    """The run in this folder, or why there is none that can be used."""
    name = text(os.path.basename(os.path.realpath(folder)))
    run = History(path=text(folder), name=name, settings={}, metric=metric)
    digest = hashlib.sha256()
    lives: list[Json] = []
    try:
        begun = _fill(run, _records(folder / "metrics.jsonl", run, digest), lives)
    except (OSError, ValueError) as error:
        return Skipped(run.path, f"metrics.jsonl: {_reason(error)}")
    run.fingerprint = digest.hexdigest()
    try:
        run.settings = _settings(folder, lives, run)
    except (OSError, ValueError, RecursionError) as error:
        return Skipped(run.path, f"no configuration: {_reason(error)}")
    if not begun:
        never = "it never got to its first record" if lives else "metrics.jsonl has no record of a run"
        return Skipped(run.path, never + (f" ({run.notes[0]})" if run.notes else ""))
    if not run.evals and not run.sums.tokens:
        return Skipped(run.path, f"no usable record ({'; '.join(run.notes[:3])})")
    if not run.evals:
        run.note("has no evaluation yet, so no validation loss to compare")
    return run


def _records(path: Path, run: History, digest: hashlib._Hash) -> Iterator[Json]:
    """The JSON objects of a file of records. Raises OSError or ValueError if there is no such file."""
    if not path.exists():
        raise ValueError("is missing" if not path.is_symlink() else "is a link to nothing")
    taken, bad, log = 0, 0, sums.Log()
    with untrusted.opened(path, path.parent) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:  # a part of it would give wrong numbers
            raise ValueError(f"is larger than {MOST_BYTES >> 20:,} MiB")
        while line := file.readline(MOST_LINE):
            taken += len(line)
            digest.update(line)
            if not line.strip():
                continue
            if (record := log.record(line)) is not None:
                yield record
            else:
                bad += 1
    if not taken:
        raise ValueError("is empty")
    if bad:
        run.note(f"{bad} lines of metrics.jsonl are no records (a kill cuts the last one short)")
    if problem := log.problem():
        run.note(f"metrics.jsonl {problem}")


def _settings(folder: Path, lives: list[Json], run: History) -> dict[str, str]:
    """The flat settings of the last life, and what was found where the run ran.

    What changed between the lives of the run is noted.
    """
    values = next((r["config"] for r in reversed(lives) if isinstance(r.get("config"), dict)), None)
    if values is None:
        values = _yaml(folder / "config.yaml")
        run.note("metrics.jsonl says nothing of its configuration: config.yaml is taken")
    out = dict(_flat(values))
    each = [_found(life) for life in lives]
    for key in dict.fromkeys(key for one in each for key in one):
        seen = list(dict.fromkeys(one.get(key, "?") for one in each))
        out[key] = ", then ".join(seen[:4])
        if len(seen) > 1:
            run.note(f"{key} changed between its lives: {out[key]}")
    return out


def _yaml(path: Path) -> Json:
    if not path.exists():
        raise ValueError("neither a `run` record nor a config.yaml")
    try:
        written = untrusted.read(path, MOST_CONFIG, path.parent)
        sums.verified(written)
        values = untrusted.parsed_yaml(written)
    except untrusted.Unfit as error:
        raise ValueError(f"config.yaml {error}") from None
    if not isinstance(values, dict):
        raise ValueError("config.yaml holds no settings")
    return values


def _flat(values: Json) -> Iterator[tuple[str, str]]:
    """Pairs such as (`optim.lr`, text).

    Raises ValueError if there are more settings than a run can have: aliases of YAML can multiply without bound.
    """
    todo: list[tuple[str, object]] = [("", values)]
    count = 0
    while todo:
        key, value = todo.pop()
        count += 1
        if count > MOST_SETTINGS:
            raise ValueError(f"more than {MOST_SETTINGS} settings")
        if isinstance(value, dict):
            inside = [(f"{key}.{text(name)}" if key else text(name), inner) for name, inner in value.items()]
            todo += reversed(inside)
        elif isinstance(value, list):
            flat = all(not isinstance(one, dict | list) for one in value[:MOST_SETTINGS])
            yield key, text(value[:MOST_SETTINGS]) if flat else "a nested list"
        else:
            yield key, plain(value)


def _found(life: Json) -> dict[str, str]:
    """What a `run` record says of where the run ran, under the names of the groups of settings that it belongs to."""
    ranks = [one for one in _list(life.get("ranks")) if isinstance(one, dict)]
    out = {
        "world.ranks": life.get("world"),
        "world.link": life.get("link"),
        "world.clock": life.get("clock") if life.get("clock") == "simulated" else None,
        "data.hash": life.get("data_hash"),
        "data.tokenizer": life.get("tokenizer_hash"),
        "model.parameters": life.get("parameters"),
        "device.threads_used": life.get("threads"),
        "device.names": ", ".join(sorted({text(one.get("device")) for one in ranks})) or None,
        "world.hosts_used": len({text(one.get("host")) for one in ranks}) or None,
        "hosts": ", ".join(sorted({text(one.get("host")) for one in ranks})) or None,
        "git.commit": _dict(life.get("git")).get("commit"),
        "git.dirty": _dict(life.get("git")).get("dirty"),
        **{f"versions.{text(name)}": value for name, value in list(_dict(life.get("versions")).items())[:40]},
    }
    return {key: plain(value) for key, value in out.items() if value is not None}


class Curve:
    """Points (tokens, a sum up to there), with ascending tokens."""

    def __init__(self) -> None:
        self.points = [(0.0, 0.0)]
        self._every, self._skipped = 1, 0

    def add(self, tokens: float, value: float) -> None:
        self._skipped += 1
        if self._skipped < self._every:
            return
        self.points.append((tokens, value))
        self._skipped = 0
        if len(self.points) > MOST_POINTS:
            del self.points[1:-1:2]
            self._every *= 2


def _fill(run: History, records: Iterator[Json], lives: list[Json]) -> bool:
    """Fills the evaluations and sums of a run, and appends its `run` records to `lives`.

    A record that goes back in tokens is left out. An evaluation that was made again replaces the earlier one. Returns
    False if there is no evaluation and no commit.
    """
    sums, odd, begun = run.sums, 0, False
    evals: list[tuple[int, Json, float, float]] = []  # life, record, tokens, loss
    begins: list[float] = []  # tokens at which each life begins
    clock, sent, made = Curve(), Curve(), Curve()
    no_bytes = False
    for record in records:
        kind, tokens = record.get("kind"), number(record.get("tokens"))
        begun = begun or kind in ("commit", "eval")
        if kind == "run":
            begins.append(0.0)
            run.lives = len(begins)
            if len(lives) == MOST_LIVES:  # keep the first and the latest ones
                del lives[MOST_LIVES // 2]
            lives.append(record)
            run.unit = unit_of(record)
            run.status, run.computed = "unfinished", None
        elif kind == "event" and begins and tokens is not None and str(record.get("what")).startswith("resumed"):
            begins[-1] = tokens
        elif kind == "event" and tokens is not None and ("change" in record or "drift" in record):
            run.streamed.event(record, tokens)
        elif kind == "event" and (rank := number(record.get("straggler"))) is not None:
            run.stragglers = list(dict.fromkeys([*run.stragglers, int(rank)]))[:16]
        elif kind == "end":
            run.status = {"budget": "finished", "stop": "stopped"}.get(str(record.get("reason")), "failed")
            run.computed = number(record.get("tokens_computed"))
            run.tokens = max(run.tokens, tokens or 0.0)
        elif kind == "eval":
            loss = measured(record.get(run.metric.name))
            loss = None if loss is None else run.metric.of(loss)
            if tokens is None or loss is None or (evals and tokens < evals[-1][2]):
                odd += 1
                continue
            if len(evals) == MOST_EVALS:
                run.note(f"has more than {MOST_EVALS:,} evaluations: the rest is left out")
                continue
            if evals and tokens == evals[-1][2]:
                evals.pop()
            evals.append((len(begins), record, tokens, loss))
            run.streamed.evaluated(record, tokens)
            run.tokens = max(run.tokens, tokens)
        elif kind == "commit":
            if tokens is None or tokens <= sums.tokens or _add(sums, record, tokens) is None:
                odd += 1
                continue
            run.tokens = max(run.tokens, tokens)
            run.streamed.commit(record, tokens)
            amount = number(record.get("bytes_sent"))
            no_bytes = no_bytes or amount is None or amount < 0
            sums.bytes += amount or 0.0
            sent.add(tokens, sums.bytes)
            made.add(tokens, sums.updates)
            clock.add(tokens, sums.seconds)
    if odd:
        run.note(f"{odd} records left out: tokens, loss or seconds that are no numbers, or go back")
    if any(math.isinf(loss) for _, _, _, loss in evals):
        run.note("diverged: an evaluation's loss is not finite")
    seconds_at = [(t, s) for _, r, t, _ in evals if (s := number(r.get("seconds"))) is not None]
    clock.points = sorted([*clock.points, *seconds_at])
    acts: dict[int, float] = {0: 0.0}  # life: seconds of acts up to its end
    wall = True
    for life, record, tokens, loss in evals:
        seconds, here = number(record.get("seconds")), number(record.get("wall_s"))
        wall = wall and seconds is not None and here is not None
        total = None
        if wall and seconds is not None and here is not None:
            began = begins[life - 1] if life else 0.0
            own = max(0.0, here - (seconds - (along(clock.points, began) or 0.0)))
            earlier = [value for k, value in acts.items() if k < life]
            acts[life] = (earlier[-1] if earlier else 0.0) + own
            total = seconds + acts[life]
        amount = None if no_bytes else along(sent.points, tokens)
        run.evals.append(CurvePoint(tokens, loss, seconds, total, amount, along(made.points, tokens)))
    return begun


def _add(sums: Sums, record: Json, tokens: float) -> Sums | None:
    """Adds a `commit` record. Returns None, and adds nothing, if it lacks what every such record has."""
    needed = [number(record.get(key)) for key in ("seconds", "compute_s", "blocked_s", "flight_s")]
    seconds, compute, blocked, flight = needed
    if seconds is None or compute is None or blocked is None or flight is None:
        return None
    if min(compute, blocked, flight) < 0 or seconds < sums.seconds:
        return None
    updates = number(record.get("updates")) or 0.0
    sums.compute_s, sums.blocked_s = sums.compute_s + compute, sums.blocked_s + blocked
    sums.flight_s, sums.skew_s = sums.flight_s + flight, sums.skew_s + (number(record.get("skew_s")) or 0.0)
    sums.cpu_s += (number(record.get("cpu_s_per_token")) or 0.0) * (tokens - sums.tokens)
    sums.updates += updates
    sums.loss = measured(record.get("loss"))
    sums.stale += (number(record.get("staleness_mean")) or 0.0) * updates
    sums.stale_most = max(sums.stale_most, number(record.get("staleness_max")) or 0.0)
    sums.micro_batches = _by_rank(sums.micro_batches, record.get("micro_batches_by_rank"))
    sums.compute_by_rank = _by_rank(sums.compute_by_rank, record.get("compute_s_by_rank"))
    sums.blocked_by_rank = _by_rank(sums.blocked_by_rank, record.get("blocked_s_by_rank"))
    if "waited_for" in record:
        sums.records += 1
        if (rank := number(record["waited_for"])) is not None and len(sums.waited_for) < 4096:
            sums.waited_for[int(rank)] = sums.waited_for.get(int(rank), 0) + 1
    sums.tokens, sums.seconds = tokens, seconds
    return sums


def _by_rank(sums: list[float], values: object) -> list[float]:
    """The sums of each rank. The first values, and those of another number of ranks, begin anew."""
    counts = [max(0.0, number(one) or 0.0) for one in _list(values)[:4096]]
    return [a + b for a, b in zip(sums, counts, strict=True)] if len(sums) == len(counts) else counts


def along(curve: list[tuple[float, float]], x: float) -> float | None:
    """The value of a curve at x, linear between its points.

    Beyond the last point the last slope goes on for at most one more interval, because the `commit` record that belongs
    to an evaluation comes one commit later. Farther out the result is None.
    """
    if len(curve) < 2:
        return None
    k = max(1, bisect_left(curve, x, key=lambda point: point[0]))
    if k < len(curve):
        (x0, y0), (x1, y1) = curve[k - 1], curve[k]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    (x0, y0), (x1, y1) = curve[-2:]
    return y1 + (y1 - y0) * (x - x1) / (x1 - x0) if x1 < x <= x1 + (x1 - x0) else None


# ------------------------------------------------------------------ values
def _setting(words: str | None) -> float | None:
    """The number that a setting spells; None if it spells none."""
    try:
        return number(float(words or ""))
    except ValueError:
        return None


def text(value: object) -> str:
    """The value as one line of bounded length that can be printed."""
    out = "".join(c if c.isprintable() else "�" for c in str(value)[: MOST_TEXT + 1])
    return out if len(out) <= MOST_TEXT else out[: MOST_TEXT - 1] + "…"


def unit_of(life: Json) -> str:
    """What a run counts, as its `run` record says; a run of an earlier version counts tokens."""
    unit = life.get("unit", "tokens")
    return unit if isinstance(unit, str) and re.fullmatch(r"[a-z]{1,20}", unit) else "units"


def plain(value: object) -> str:
    """A setting as text. Equal values give equal texts: 0.001 and 1e-3, or 1 and 1.0."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float) and (exact := number(value)) is not None:
        return str(int(exact)) if exact == int(exact) else repr(exact)
    return text(value)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict[object, object]:
    return value if isinstance(value, dict) else {}
