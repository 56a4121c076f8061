"""Local SGD: some steps alone, then the mean of the weights (Stich, 2018, arXiv 1805.09767).

    each group:  H steps of the update, own moments;  x_i = mean of all x

Post-local (Lin et al., 2018, arXiv 1808.07217): H = 1 until warmup_tokens are committed.

Invariant: with H = 1 and plain descent it is synchronous descent. With Adam it is not, because the mean of normalised
steps is not the normalised step of the mean. Where all groups have the same curvature, a round is H steps on the mean
data. Where the curvature differs, so does the fixed point (client drift); fewer steps make the difference smaller.
Evaluation and samples use the mean of the ranks' weights.

Bytes a rank and round: 2 (N-1)/N P b, and a meta for each pulse. Memory: the anchor, P.

More in hvdllm/exchange/README.md, `local_sgd`.
"""

from __future__ import annotations

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.local import LocalSteps, Meetings, Replica
from hvdllm.exchange.local_rounds import Steps, Together
from hvdllm.exchange.outer import Mean
from hvdllm.settings import warmed_up


class LocalSGD(LocalSteps[exchanges.LocalSGD]):
    def __init__(self, settings: exchanges.LocalSGD, nominal: int) -> None:
        super().__init__(settings, nominal, Mean())

    def arrange(self, replica: Replica) -> Meetings:
        warmup = warmed_up(self.settings.warmup_tokens, self.nominal)
        return Together(replica, Steps(self.settings, replica.group, warmup))

    def agree(self) -> int | None:
        for bucket in self.flat.buckets:
            x = self.flat.x[bucket.span.start : bucket.span.stop]
            x.copy_(self.world.sum(x.clone(), f"act.mean.{bucket.index}").land() / self.world.size)
        return None
