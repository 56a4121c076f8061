"""TensorBoard: event files in the run's folder. The step is `tokens`.

TensorBoard's own writer is used, so that this process needs no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.track.base import Say, named

FLUSH_S = 5


def make(config: Config, folder: Path, kept: Json, before: list[Json], say: Say) -> Tracker:
    return Tracker(folder / "tensorboard")


class Tracker:
    """Writes one event file in each life of the run.

    What a resumed run computes again takes the place of what was written before.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(exist_ok=True)
        self._files = EventFileWriter(str(folder), flush_secs=FLUSH_S)
        self._event, self._session, self._summary = Event, SessionLog, Summary
        text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._text: Callable[[str], Json] = lambda words: {
            "metadata": text, "tensor": TensorProto(dtype=DT_STRING, string_val=[words.encode()]),
        }  # fmt: skip

    def record(self, number: int, record: Json) -> None:
        if record["kind"] == "run":
            return
        tokens = int(record.get("tokens", 0))
        if record["kind"] == "event":  # a life goes on from here, so what comes later is void
            start = self._session(status=self._session.START)
            self._files.add_event(self._event(step=tokens + 1, session_log=start))
        values = [self._summary.Value(tag=tag, **self._value(tag, value)) for tag, value in named(record)]
        self._files.add_event(self._event(wall_time=time.time(), step=tokens, summary=self._summary(value=values)))

    def close(self, failed: bool) -> None:
        self._files.close()

    def _value(self, tag: str, value: object) -> Json:
        if isinstance(value, (int, float)):
            return {"simple_value": float(value) if math.isfinite(value) else math.nan}
        return self._text(str(value))
