"""Local steps whose groups meet all at once, the whole model together: what local SGD and DiLoCo share.

    step h of H_i:  a pulse after every H_i / J steps but the last;  the meeting after the last
    meeting:        launch the deltas, post the last pulse, await it and the one before, land, outer step

so that there are max(1, J - 1) marks a round. With J pulses a round an ask is heard within 2 H / J steps.

by_speed: groups take about H_i = H v_i / max v steps a round, at least J, where v is the speed of the round before
(steps over seconds of compute; DyLU, Liu et al., 2024, arXiv 2401.09135), so that all arrive together; which whole
numbers, steps_by_speed says. Such a run cannot be repeated bit for bit, but with a simulated clock.

late (overlap): the deltas of one round travel while the next is computed, and are applied after it. Each round then
begins with an anchor that lacks the last one's progress, and the bounds on the outer rate fall (config/bounds.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.exchange.base import Commit, State, Update, Wire
from hvdllm.exchange.local import LocalSteps, Pulse, again
from hvdllm.exchange.meta import MetaSum
from hvdllm.world.base import Flight, World


@dataclass
class Late:
    """Deltas on their way through the round after theirs. meta: their pulse, once heeded. tokens: committed at their
    meeting, once known."""

    flights: list[Flight]
    launched: Mark
    buffer: int
    meta: MetaSum | None = None
    tokens: int = 0


def steps_by_speed(speeds: list[float], most: int) -> list[int]:
    """Steps of each group in a round where none makes more than `most` or less than 1, so that all together make the
    most steps a second. Each makes what it can in the time of the round: that of the fastest's `most`, or a little more
    where a slow one just gets another step done. speeds: steps a second."""
    shortest = max(most / max(speeds), 1 / min(speeds))

    def made(seconds: float) -> list[int]:
        return [max(1, min(most, int(speed * seconds + 1e-9))) for speed in speeds]

    behind = [(count + 1) / speed for count, speed in zip(made(shortest), speeds, strict=True) if count < most]
    ends = [shortest, *behind]
    return made(max(ends, key=lambda seconds: sum(made(seconds)) / seconds))


class LocalRounds(LocalSteps):
    def __init__(self, settings: Any, nominal: int) -> None:
        super().__init__(settings, nominal)
        self.late = bool(getattr(settings, "overlap", False))
        if self.late:
            self.copies = 3  # of one round while the next one's gradients and then its deltas are made
        self._pulse: Pulse | None = None
        self._air: Late | None = None
        self._exact = 0  # tokens of all groups up to the last meeting that is known
        self._compute_s: list[float] = []  # of each rank in this round

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        module = super().attach(model, flat, update, wire, world)
        self._steps_of = [self.settings.local_steps] * self.groups
        self._compute_s = [0.0] * world.size
        return module

    # ------------------------------------------------------------------ how long a round is
    def round_steps(self) -> int:
        """Of a group that is no slower than any."""
        return int(self.settings.local_steps)

    def pulses(self) -> int:
        """In this round, its end included."""
        wanted = self.settings.pulses or round(self.round_steps() / 10)
        return max(1, min(wanted, self.round_steps()))

    def steps_of(self, group: int) -> int:
        """Of a group in this round."""
        return max(self.pulses(), min(self._steps_of[group], self.round_steps()))

    def own_steps(self) -> int:
        return self.steps_of(self.group)

    def synchronise(self) -> Commit | None:
        done, steps, pulses = self.fragments[0].steps, self.own_steps(), self.pulses()
        if done == steps:
            return self._meeting()
        if done * pulses // steps == (done - 1) * pulses // steps:
            return None
        before, self._pulse = self._pulse, self.pulse()
        return self._mark(before) if before is not None else None

    def heed(self, pulse: Pulse) -> MetaSum:
        meta = super().heed(pulse)
        self._compute_s = [a + b for a, b in zip(self._compute_s, meta.slots["compute_s"], strict=True)]
        if pulse.meeting and self.late:
            assert self._air is not None
            self._air.meta, self._air.tokens = meta, self.tokens + int(meta.tokens)
        return meta

    def _mark(self, pulse: Pulse) -> Commit:
        wait = Mark(self.device)
        meta = self.heed(pulse)
        self.blocked(wait, wait)
        return self.commit(meta, staleness=float(self.late))

    # ------------------------------------------------------------------ the end of a round
    def _meeting(self) -> Commit | None:
        return self._late_meeting() if self.late else self.commit(*self._meet_now())

    def _meet_now(self) -> list[MetaSum]:
        """Everybody waits for the sum. The pulses heeded."""
        fragment, wait = self.fragments[0], Mark(self.device)
        before, self._pulse = self._pulse, None
        flights, weight, steps = self.launch(fragment)
        last = self.pulse(True, weight, steps)
        metas = [self.heed(pulse) for pulse in (before, last) if pulse is not None]
        self.meet(fragment, flights, metas[-1])
        self.blocked(wait, wait)
        self._set_pace()
        self._exact = self._base = self.anchor_tokens = self.tokens + sum(int(meta.tokens) for meta in metas)
        self._open = 0
        return metas

    def _late_meeting(self) -> Commit | None:
        fragment, wait = self.fragments[0], Mark(self.device)
        before, self._pulse = self._pulse, None
        commit = self._mark(before) if before is not None else None
        air = self._air
        number = 3 - air.buffer if air is not None else 1
        self.buffer = self.flat.gradients[number]
        flights, weight, steps = self.launch(fragment)  # before the anchor moves: its deltas are from where it stood
        self._air = Late(flights, wait, number)
        self._pulse = self.pulse(True, weight, steps)
        if air is not None:
            self._apply(air)
            self.blocked(wait, air.launched)
        else:
            self.flat.x.copy_(self.anchor)
        self._set_pace()
        self._base = self._exact + self.groups * self._open
        self._open = 0
        return commit

    def _apply(self, air: Late) -> None:
        assert air.meta is not None
        self.buffer = self.flat.gradients[air.buffer]
        self.meet(self.fragments[0], air.flights, air.meta)
        self._exact = self.anchor_tokens = air.tokens

    def _set_pace(self) -> None:
        """Steps of the next round, from what those of this one took; the same on every rank. Before the next begins:
        that a round is short (post-local warm-up) or a slow group has as many steps as pulses says nothing of speed."""
        if getattr(self.settings, "by_speed", False) and all(self._compute_s):
            each = len(self._compute_s) // self.groups
            took = [max(self._compute_s[g * each : (g + 1) * each]) for g in range(self.groups)]
            speeds = [self.steps_of(group) / seconds for group, seconds in enumerate(took)]
            self._steps_of = steps_by_speed(speeds, self.settings.local_steps)
        self._compute_s = [0.0] * len(self._compute_s)

    # ------------------------------------------------------------------ acts
    def close(self) -> tuple[MetaSum, ...]:
        metas = []
        if self._pulse is not None:
            metas.append(self.heed(self._pulse))
            self._pulse = None
        if self._air is not None:
            air, self._air = self._air, None
            if air.meta is None:
                air.meta = metas[-1]
            mine = self.flat.x - self.anchor.to(self.device)
            self._apply(air)
            self.flat.x.add_(mine)  # what the unfinished round has made stays a delta of its own
            self.buffer = self.flat.gradients[-1]
        flights, weight, steps = self.launch(self.fragments[0])
        metas.append(self.heed(self.pulse(False, weight, steps)))
        self.meet(self.fragments[0], flights, metas[-1])
        return tuple(metas)

    # ------------------------------------------------------------------ checkpoint
    def values(self) -> dict[str, Any]:
        pulse = self._pulse and [asdict(self._pulse.meta.land()), self._pulse.meeting]
        air = self._air
        if air is not None:
            for flight in air.flights:
                flight.land()
        return {
            "pulse": pulse, "exact": self._exact, "steps_of": self._steps_of, "compute_s": self._compute_s,
            "late": air and [air.buffer, air.meta and asdict(air.meta), air.tokens],
        }  # fmt: skip

    def vectors(self) -> dict[str, torch.Tensor]:
        return {"late": self.flat.gradients[self._air.buffer]} if self._air is not None else {}

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        super().load(state, mine)
        shared = state.shared
        if shared["late"] is not None:
            buffer, meta, tokens = shared["late"]
            self.flat.gradients[buffer].copy_(state.sharded["late"])
            self._air = Late([], Mark(self.device), buffer, meta and MetaSum.of(meta), tokens)
        self._exact = shared["exact"]
        if len(mine) == self.world.size:
            self._steps_of, self._compute_s = shared["steps_of"], shared["compute_s"]
            if shared["pulse"] is not None:
                meta, meeting = shared["pulse"]
                self._pulse = again(MetaSum.of(meta), meeting)
            return
        # Another world size: the last pulse's tokens are lost with the local steps that they were computed in, a late
        # meeting's deltas are not.
        self._exact = self.tokens
        if self._air is not None:
            self._air.tokens = self.tokens
            self._air.meta = self._air.meta or MetaSum.of(shared["pulse"][0])
