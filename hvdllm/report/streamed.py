"""What the records of a run say of the stream that it trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hvdllm.plain import Json
from hvdllm.report.values import measured, number

MOST_POINTS = 20_000  # of a curve; a longer one loses every second point until it fits
MOST_EVENTS = 1000
MOST_SLICES = 256  # of an evaluation
SLICE = re.compile(r"loss/slice-(\d{1,9})")


@dataclass(frozen=True)
class StreamPoint:
    """The prequential loss in a `commit` record, in nats a token; inf where it is not finite.

    Attributes:
        tokens: committed up to here.
        last: since the record before.
        recent: with weights that fall over text.window_tokens.
        whole: since the beginning.
        bits: the same in bits per byte.
    """

    tokens: float
    last: float
    recent: float
    whole: float
    bits: float | None


@dataclass
class Streamed:
    """The stream of a run.

    Attributes:
        points: of the curve, tokens ascending.
        changes: tokens after which each known text but the first begins, by the number of the text.
        drifts: tokens at which the test for drift has found one.
        slices: the tokens of each evaluation, and the loss of each held-out slice by its number.
    """

    points: list[StreamPoint] = field(default_factory=list)
    changes: dict[int, float] = field(default_factory=dict)
    drifts: list[float] = field(default_factory=list)
    slices: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    _every: int = 1
    _skipped: int = 0

    def commit(self, record: Json, tokens: float) -> None:
        """Takes a `commit` record. One without a prequential loss says nothing of a stream."""
        found = [measured(record.get(f"prequential{name}")) for name in ("", "_recent", "_whole")]
        last, recent, whole = found
        if last is None or recent is None or whole is None:
            return
        self._skipped += 1
        if self._skipped < self._every:
            return
        bits = number(record.get("prequential_whole_bits_per_byte"))
        self.points.append(StreamPoint(tokens, last, recent, whole, bits))
        self._skipped = 0
        if len(self.points) > MOST_POINTS:
            del self.points[1:-1:2]
            self._every *= 2

    def event(self, record: Json, tokens: float) -> None:
        """Takes an `event` record."""
        text, at = number(record.get("change")), number(record.get("change_tokens"))
        if text is not None and at is not None and at > 0 and len(self.changes) < MOST_EVENTS:
            self.changes[int(text)] = at
        if number(record.get("drift")) is not None and len(self.drifts) < MOST_EVENTS and tokens not in self.drifts:
            self.drifts.append(tokens)

    def evaluated(self, record: Json, tokens: float) -> None:
        """Takes an `eval` record. One that was made again replaces the earlier one."""
        named = ((SLICE.fullmatch(key), value) for key, value in record.items())
        found = {int(name[1]): loss for name, value in named if name and (loss := measured(value)) is not None}
        if self.slices and self.slices[-1][0] == tokens:
            self.slices.pop()
        if found:
            self.slices.append((tokens, dict(list(found.items())[:MOST_SLICES])))
