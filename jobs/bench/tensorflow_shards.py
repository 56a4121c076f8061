"""A prepared text of hvdllm as a tf.data.Dataset: the windows of each step, in the order of hvdllm's own stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hvdllm.order.epochs import Epochs, deal  # needs NumPy alone

HEADER = 1024  # bytes before the tokens: 8 of magic, then JSON, then spaces


def opened(shard: Path, context: int) -> np.ndarray:
    """The windows of a shard [windows, context + 1]: they begin `context` tokens apart. Nothing is read yet."""
    with open(shard, "rb") as file:
        head = json.loads(file.read(HEADER)[8:])
    tokens = np.memmap(shard, head["dtype"], "r", HEADER)
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def steps(
    shard: Path, context: int, batch: int, seed: int, places: Iterable[int], k: int, n: int
) -> Iterator[np.ndarray]:
    """What worker k of n takes of the batches at these places, int32 [its share, context + 1] each."""
    windows, (first, count) = opened(shard, context), deal(batch, k, n)
    order = Epochs(len(windows), seed)
    for place in places:
        yield windows[order.visits(place * batch + first + np.arange(count))[0]].astype(np.int32)


def dataset(shard: Path, context: int, batch: int, seed: int, places: range, k: int = 0, n: int = 1) -> Any:
    """The same as a tf.data.Dataset that reads two steps ahead."""
    import tensorflow as tf

    shape = tf.TensorSpec((deal(batch, k, n)[1], context + 1), tf.int32)
    made = tf.data.Dataset.from_generator(
        lambda: steps(shard, context, batch, seed, places, k, n), output_signature=shape
    )
    return made.prefetch(2)
