"""A prepared text of hvdllm as a tf.data.Dataset: the windows of each step, in the order of hvdllm's own stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from hvdllm.order.epochs import Epochs, deal  # needs NumPy alone

HEADER = 1024  # bytes before the tokens: 8 of magic, then JSON, then spaces


def opened(shard: Path, context: int) -> np.ndarray:
    """The windows of a shard [windows, context + 1]: they begin `context` tokens apart. Nothing is read yet."""
    with open(shard, "rb") as file:
        head = json.loads(file.read(HEADER)[8:])
    tokens = np.memmap(shard, head["dtype"], "r", HEADER)
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def steps(shard: Path, context: int, batch: int, seed: int, at: range, k: int, n: int) -> Iterator[np.ndarray]:
    """What worker k of n takes of the batches at these places of the run, int32 [its share, context + 1] each."""
    windows, (first, count) = opened(shard, context), deal(batch, k, n)
    order = Epochs(len(windows), seed)
    for place in at:
        yield windows[order.visits(place * batch + first + np.arange(count))[0]].astype(np.int32)


def dataset(shard: Path, context: int, batch: int, seed: int, at: range, k: int = 0, n: int = 1) -> object:
    """The same as a tf.data.Dataset that reads two steps ahead."""
    import tensorflow as tf

    shape = tf.TensorSpec((deal(batch, k, n)[1], context + 1), tf.int32)
    taken = partial(steps, shard, context, batch, seed, at, k, n)
    return tf.data.Dataset.from_generator(taken, output_signature=shape).prefetch(2)
