"""Optimizers and schedules: the settings of each."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import OptimizerFacts, part
from hvdllm.settings import Numbers, Settings, Setup, setting


class OptimizerSettings(Settings):
    """What is common to every optimizer: `lr`, `clip`, and coefficients of decay that must be smaller than 1."""

    lr: float
    clip: float

    def refusal(self, setup: Setup) -> str | None:
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name, 0) >= 1:
                return f"optim.{name}={getattr(self, name)} must be smaller than 1"
        return None


@dataclass
class Adam(OptimizerSettings):
    """What is common to Adam's kind. Decays matrices and embeddings only."""

    lr: float = setting(3e-3, "peak learning rate; small models take more than large ones", least=0)
    beta1: float = setting(0.9, "decay of the mean of gradients, a step", least=0)
    beta2: float = setting(
        0.95, "decay of the mean of squared gradients, a step; .95 as usual for language models", least=0
    )
    eps: float = setting(1e-8, "added to the root of the second moment", least=0)
    weight_decay: float = setting(0.1, "decay a step, times the learning rate", least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", least=0)


@part("optim", "adamw", "hvdllm.optim.adamw", OptimizerFacts(vectors=2, second_moments=True, freezes=True))
@dataclass
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    freeze_tokens: int | None = setting(
        None,
        "committed tokens after which second moments stay as they are, the second stage of 1-bit Adam (Tang et "
        "al., 2021): for wire=sign; null: never",
        least=1,
    )


@part("optim", "nadam", "hvdllm.optim.nadam", OptimizerFacts(vectors=2, second_moments=True))
@dataclass
class NAdam(Adam):
    """Adam that looks ahead along its momentum, decoupled decay (Dozat, 2016): for exchange=delayed, beta1 of .99 is
    Nesterov's method for delay (Ajanthan et al., 2025)."""

    beta1: float = setting(0.99, "decay of the mean of gradients, a step; .99 as that paper's code", least=0)


@part("optim", "sgd", "hvdllm.optim.sgd", OptimizerFacts(vectors=1, linear=True))
@dataclass
class SGD(OptimizerSettings):
    """Stochastic gradient descent with momentum; the decay is added to the gradient, as in torch.optim.SGD."""

    lr: float = setting(0.1, "peak learning rate", least=0)
    momentum: float = setting(0.9, "decay of the velocity, a step; 0: plain descent", least=0)
    nesterov: bool = setting(False, "look ahead along the velocity (Sutskever et al., 2013)")
    weight_decay: float = setting(0.0, "times the weights, added to the gradient of matrices and embeddings", least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", least=0)

    def refusal(self, setup: Setup) -> str | None:
        if self.nesterov and not self.momentum:
            return "optim.nesterov=true needs optim.momentum above 0"
        return super().refusal(setup)


@dataclass
class Schedule(Settings):
    """What is common to every schedule: the rate is optim.lr times a factor of committed tokens."""

    warmup: float = setting(0.05, "share of the horizon over which the rate rises linearly from 0", least=0)
    horizon: int | None = setting(
        None, "tokens over which the schedule runs; null: budget_tokens of the run's first start", least=1
    )

    def refusal(self, setup: Setup) -> str | None:
        if self.warmup + getattr(self, "decay", 0.0) > 1:
            return "the shares of the schedule (warmup, decay) add up to more than its horizon: lower one of them"
        if getattr(self, "floor", 0.0) > 1:
            return f"schedule.floor={getattr(self, 'floor')} is above the peak: give a share between 0 and 1"  # noqa: B009
        return None


@part("schedule", "constant", "hvdllm.optim.schedule:constant")
@dataclass
class Constant(Schedule):
    """The peak rate after the warm-up."""


@part("schedule", "cosine", "hvdllm.optim.schedule:cosine")
@dataclass
class Cosine(Schedule):
    """Half a cosine from the peak to the floor at the horizon."""

    floor: float = setting(0.1, "share of the peak rate left at the horizon; 0: left one update behind it", least=0)


@part("schedule", "infinite", "hvdllm.optim.schedule:infinite")
@dataclass
class Infinite(Schedule):
    """A rate without an end, for a stream: a warm-up, a fall to `hold`, and the same again where it is re-warmed."""

    warmup: float = setting(0.0, "none here, because it is a share of a horizon: see warmup_tokens", least=0)
    horizon: int | None = setting(None, "none here, because this schedule has no end", least=1)
    warmup_tokens: int = setting(50_000, "tokens over which the rate rises to the peak", least=1)
    settle_tokens: int = setting(200_000, "tokens over which it then falls to hold, along half a cosine", least=1)
    hold: float = setting(0.3, "share of the peak rate that is held", least=0, most=1)
    rewarm: str = setting(
        "drift",
        "drift (re-warm where the prequential loss says that the stream has changed) or never; schedule.rewarm_at adds "
        "places by hand",
        choices=("drift", "never"),
    )
    rewarm_at: Numbers = setting(
        None, "tokens at which the rate is re-warmed, a list; may be added to a run that goes on"
    )

    def refusal(self, setup: Setup) -> str | None:
        if self.warmup:
            return (
                f"schedule.warmup={self.warmup} is a share of a horizon, and schedule=infinite has none: give "
                "schedule.warmup_tokens instead"
            )
        if self.horizon is not None:
            return f"schedule.horizon={self.horizon} with schedule=infinite, which has no end: leave it out"
        if self.rewarm_at is not None and not (
            isinstance(self.rewarm_at, list)
            and all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in self.rewarm_at)
        ):
            return f"schedule.rewarm_at={self.rewarm_at} is no list of tokens: give such as [1000000,5000000]"
        return super().refusal(setup)


@part("schedule", "wsd", "hvdllm.optim.schedule:wsd")
@dataclass
class WarmupStableDecay(Schedule):
    """The peak rate, then a linear fall over the last part of the horizon: a run can be extended before it."""

    decay: float = setting(0.2, "share of the horizon over which the rate falls", least=0)
    floor: float = setting(0.0, "share of the peak rate left at the horizon; 0: left one update behind it", least=0)
