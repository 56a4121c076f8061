"""Reads what the group world says of speed: which ranks are slowed, and the simulated clock of virtual ranks.

It does not import torch.
"""

from __future__ import annotations

import math
import re
from random import Random

from hvdllm.errors import UserError
from hvdllm.world.parts import World


def slowed(value: object, size: int) -> dict[int, float]:
    """Parses world.slow.

    Args:
        value: `1:4`, several such with commas between, a list of them, or None.
        size: how many ranks there are.

    Returns the factor of each slowed rank. Raises UserError for any other value.
    """
    words = [] if value is None else value if isinstance(value, list) else str(value).split(",")
    out: dict[int, float] = {}
    for word in words:
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d+)?)\s*", word, re.ASCII) if isinstance(word, str) else None
        if found is None:
            raise UserError(
                f"world.slow={value}: give rank:factor, such as 1:4, or a list, [1:4,3:2]; in a file in quotes"
            )
        rank, factor = int(found[1]), float(found[2])
        if rank >= size:
            raise UserError(f"world.slow={word}: there is no rank {rank} among {size}, they are numbered from 0")
        if rank in out:
            raise UserError(f"world.slow names rank {rank} twice: once is enough")
        if factor < 1:
            raise UserError(f"world.slow={word}: a rank cannot be made faster, give a factor of at least 1")
        out[rank] = factor
    return out


def bits_per_second(link: str, setting: str = "--link ", without: str = "none for the network as it is") -> float:
    """Parses a rate such as 200mbit, 2.5gbit or 512kbit.

    Args:
        link: the rate.
        setting: the beginning of the setting or flag, for the sentence of the error.
        without: what else may be given, for the same sentence.

    Returns bits per second. Raises UserError for any other text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", link)
    if not found or not float(found[1]):
        raise UserError(f"{setting}{link}: give a rate such as 200mbit or 1gbit, or {without}")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def bandwidth(world: World) -> float:
    """The rate of a rank's link on the simulated clock, in bytes per second. Raises UserError if it is not a rate."""
    if world.bandwidth is None:
        return math.inf
    return bits_per_second(world.bandwidth, "world.bandwidth=", "null for transfers that take no time") / 8


def speeds(world: World, seed: int) -> list[float]:
    """The speed of each rank on the simulated clock, in tokens per second.

    Speeds are drawn from a log-normal distribution around tokens_per_s and divided by the factor of world.slow. The
    speed of a rank does not depend on the size of the world.
    """
    assert world.tokens_per_s is not None
    by = slowed(world.slow, world.size)
    draws = (Random(f"speed {seed} {rank}").gauss(0, 1) for rank in range(world.size))
    return [
        world.tokens_per_s * math.exp(world.speed_spread * draw) / by.get(rank, 1.0) for rank, draw in enumerate(draws)
    ]


def check(world: World, kind: str, size: int) -> None:
    """Checks the settings of speed.

    Args:
        world: the settings of the group.
        kind: which transport they come to.
        size: how many ranks there are.

    Raises UserError if they cannot work.
    """
    by = slowed(world.slow, size)
    bandwidth(world)
    if world.tokens_per_s is None:
        for name in ("speed_spread", "jitter", "bandwidth", "latency_ms"):
            if getattr(world, name):
                raise UserError(
                    f"world.{name} is of the simulated clock of world=virtual: give world.tokens_per_s with it"
                )
        if by and kind == "virtual":
            raise UserError(
                "world.slow with world=virtual: logical ranks take no time; give world.tokens_per_s, which simulates a "
                "clock"
            )
    elif kind != "virtual":
        raise UserError(f"world.tokens_per_s simulates the clock of world=virtual, and world={kind} has a real one")
