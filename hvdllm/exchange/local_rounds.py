"""Meetings of all groups at once, the whole model together: what local SGD, DiLoCo and FedAvg share.

    step h of H_i:  a pulse after every H_i / J steps but the last;  the meeting after the last
    meeting:        launch the deltas, post the last pulse, hear it and the one before, land, outer step

There are max(1, J - 1) marks in a round. With J pulses a round an ask is heard within 2 H / J steps.

by_speed: groups take about H_i = H v_i / max v steps a round, at least J, where v is their speed in the round before:
steps over seconds of compute (DyLU, Liu et al., 2024, arXiv 2401.09135). So all groups arrive together; steps_by_speed
says which whole numbers these are. Such a run cannot be repeated bit for bit, unless its clock is simulated.

late (overlap): the deltas of one round travel while the next is computed, and are applied after it. Each round then
begins with an anchor that lacks the progress of the last one, and the bounds on the outer rate fall (parts.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from hvdllm.device import Mark
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Commit, State, Values
from hvdllm.exchange.group import LocalGroup
from hvdllm.exchange.local import Pulse, Replica
from hvdllm.exchange.meta import MetaSum
from hvdllm.world.base import Flight


@dataclass
class Late:
    """Deltas that travel through the round after theirs.

    buffer: number of the gradient vector that they travel in
    meta: that of their pulse, once it was heard; tokens: committed at their meeting, once they are known
    """

    flights: list[Flight]
    launched: Mark
    buffer: int
    meta: MetaSum | None = None
    tokens: int = 0


def steps_by_speed(speeds: list[float], most: int) -> list[int]:
    """Steps of each group in a round where none makes more than `most` or less than 1, so that all together make the
    most steps a second. speeds: steps a second.

    Each group makes what it can in the time of the round. That is the time in which the fastest makes `most` steps, or
    a little more where a slow one just gets another step done.
    """
    shortest = max(most / max(speeds), 1 / min(speeds))

    def made(seconds: float) -> list[int]:
        return [max(1, min(most, int(speed * seconds + 1e-9))) for speed in speeds]

    behind = [(count + 1) / speed for count, speed in zip(made(shortest), speeds, strict=True) if count < most]
    ends = [shortest, *behind]
    return made(max(ends, key=lambda seconds: sum(made(seconds)) / seconds))


class Pace(Protocol):
    """How long a round is. planned: steps of each group, where they go by speed."""

    planned: list[int]

    def pulses(self) -> int:
        """Pulses in this round, its end included."""

    def own_steps(self) -> int:
        """Steps of this group in this round."""

    def next_round(self, compute_s: list[float]) -> None:
        """Plans the next round, the same on every rank. compute_s: seconds of each rank in this one."""


class Steps:
    """A round of local_steps steps, or by speed. warmup_tokens: at first a round is one step, until the tokens at a
    meeting have reached this number (post-local SGD)."""

    def __init__(self, settings: exchanges.LocalRounds, group: LocalGroup, warmup_tokens: float = 0) -> None:
        self.settings, self.group, self.warmup_tokens = settings, group, warmup_tokens
        self.planned = [settings.local_steps] * group.count

    def _most(self) -> int:
        """Steps of a group that is as fast as any."""
        return 1 if self.group.base < self.warmup_tokens else self.settings.local_steps

    def pulses(self) -> int:
        wanted = self.settings.pulses or round(self._most() / 10)
        return max(1, min(wanted, self._most()))

    def _steps_of(self, group: int) -> int:
        return max(self.pulses(), min(self.planned[group], self._most()))

    def own_steps(self) -> int:
        return self._steps_of(self.group.number)

    def next_round(self, compute_s: list[float]) -> None:
        """Speeds are those of the steps that were made. That a round was short (warm-up), or that a slow group made as
        many steps as there are pulses, says nothing of speed."""
        if self.settings.by_speed and all(compute_s):
            count = self.group.count
            each = len(compute_s) // count
            took = [max(compute_s[g * each : (g + 1) * each]) for g in range(count)]
            speeds = [self._steps_of(group) / seconds for group, seconds in enumerate(took)]
            self.planned = steps_by_speed(speeds, self.settings.local_steps)


class Together:
    """Meetings of the whole model. late: deltas are applied one round after theirs."""

    def __init__(self, replica: Replica, pace: Pace, late: bool = False) -> None:
        self.replica, self.pace, self.late = replica, pace, late
        self.whole = replica.fragments[0]
        self._pulse: Pulse | None = None
        self._air: Late | None = None
        self._exact = 0  # tokens of all groups up to the last meeting that is known
        self._compute_s = [0.0] * replica.world.size  # of each rank in this round

    # ------------------------------------------------------------------ pulses
    def stepped(self) -> Commit | None:
        done, steps, pulses = self.whole.steps, self.pace.own_steps(), self.pace.pulses()
        if done == steps:
            return self._late_meeting() if self.late else self._meeting()
        if done * pulses // steps == (done - 1) * pulses // steps:
            return None
        before, self._pulse = self._pulse, self.replica.post()
        return self._mark(before) if before is not None else None

    def _hear(self, pulse: Pulse) -> MetaSum:
        meta = self.replica.hear(pulse)
        self._compute_s = [a + b for a, b in zip(self._compute_s, meta.slots["compute_s"], strict=True)]
        if pulse.meeting and self.late:
            assert self._air is not None
            self._air.meta, self._air.tokens = meta, self.replica.tally.tokens + int(meta.tokens)
        return meta

    def _mark(self, pulse: Pulse) -> Commit:
        wait = Mark(self.replica.device)
        meta = self._hear(pulse)
        self.replica.stood_still(wait, wait)
        return self.replica.commit(meta, staleness=float(self.late))

    # ------------------------------------------------------------------ the end of a round
    def _meeting(self) -> Commit:
        """Everybody waits for the sum."""
        replica, wait = self.replica, Mark(self.replica.device)
        before, self._pulse = self._pulse, None
        sent = replica.send(self.whole)
        last = replica.post(True, sent)
        metas = [self._hear(pulse) for pulse in (before, last) if pulse is not None]
        replica.anchor.meet(self.whole, sent.flights, metas[-1])
        replica.stood_still(wait, wait)
        self._next_round()
        self._exact = replica.tally.tokens + sum(int(meta.tokens) for meta in metas)
        replica.group.base, replica.group.open, replica.anchor.tokens = self._exact, 0, self._exact
        return replica.commit(*metas)

    def _late_meeting(self) -> Commit | None:
        replica, wait = self.replica, Mark(self.replica.device)
        group, flat = replica.group, replica.anchor.flat
        before, self._pulse = self._pulse, None
        commit = self._mark(before) if before is not None else None
        air = self._air
        number = 3 - air.buffer if air is not None else 1
        replica.anchor.buffer = flat.gradients[number]
        sent = replica.send(self.whole)  # before the anchor moves: the deltas are from where it stood
        self._air = Late(sent.flights, wait, number)
        self._pulse = replica.post(True, sent)
        if air is not None:
            self._apply(air)
            replica.stood_still(wait, air.launched)
        else:
            flat.x.copy_(replica.anchor.x)
        self._next_round()
        group.base = self._exact + group.count * group.open
        group.open = 0
        return commit

    def _apply(self, air: Late) -> None:
        assert air.meta is not None
        anchor = self.replica.anchor
        anchor.buffer = anchor.flat.gradients[air.buffer]
        anchor.meet(self.whole, air.flights, air.meta)
        self._exact = anchor.tokens = air.tokens

    def _next_round(self) -> None:
        self.pace.next_round(self._compute_s)
        self._compute_s = [0.0] * len(self._compute_s)

    def meet_last(self) -> tuple[MetaSum, ...]:
        metas, anchor = [], self.replica.anchor
        if self._pulse is not None:
            metas.append(self._hear(self._pulse))
            self._pulse = None
        if self._air is not None:
            air, self._air = self._air, None
            if air.meta is None:
                air.meta = metas[-1]
            mine = anchor.flat.x - anchor.x.to(self.replica.device)
            self._apply(air)
            anchor.flat.x.add_(mine)  # what the unfinished round has made stays a delta of its own
            anchor.buffer = anchor.flat.gradients[-1]
        sent = self.replica.send(self.whole)
        metas.append(self._hear(self.replica.post(False, sent)))
        anchor.meet(self.whole, sent.flights, metas[-1])
        return tuple(metas)

    # ------------------------------------------------------------------ checkpoint
    def values(self) -> Values:
        pulse = self._pulse and [asdict(self._pulse.meta.land()), self._pulse.meeting]
        air = self._air
        if air is not None:
            for flight in air.flights:
                flight.land()
        return {
            "pulse": pulse, "exact": self._exact, "steps_of": self.pace.planned, "compute_s": self._compute_s,
            "late": air and [air.buffer, air.meta and asdict(air.meta), air.tokens],
        }  # fmt: skip

    def mine(self) -> Values:
        return {}

    def vectors(self) -> dict[str, torch.Tensor]:
        return {"late": self.replica.anchor.flat.gradients[self._air.buffer]} if self._air is not None else {}

    def load(self, state: State, mine: Values | None) -> None:
        shared = state.shared
        if shared["late"] is not None:
            buffer, meta, tokens = shared["late"]
            self.replica.anchor.flat.gradients[buffer].copy_(state.sharded["late"])
            self._air = Late([], Mark(self.replica.device), buffer, meta and MetaSum.of(meta), tokens)
        self._exact = shared["exact"]
        if mine is not None:
            self.pace.planned, self._compute_s = shared["steps_of"], shared["compute_s"]
            if shared["pulse"] is not None:
                self._pulse = Pulse.arrived(*shared["pulse"])
            return
        # At another world size the tokens of the last pulse are lost with the local steps that they were computed in,
        # but the deltas of a late meeting are not.
        self._exact = self.replica.tally.tokens
        if self._air is not None:
            self._air.tokens = self._exact
            self._air.meta = self._air.meta or MetaSum.of(shared["pulse"][0])
