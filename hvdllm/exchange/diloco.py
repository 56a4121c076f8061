"""DiLoCo: many local steps, then one outer step of Nesterov's momentum on their mean (Douillard et al., 2023, arXiv
2311.08105).

    each group:  H steps of AdamW from the anchor, own moments, never reset
    d = mean of (anchor - x_i);  u = μ u + d;  anchor = anchor - γ (d + μ u);  x_i = anchor        # γ = .7, μ = .9

Invariant: with H = 1, plain descent inside, γ = 1 and μ = 0 it is synchronous descent; with γ = 1 and μ = 0 local SGD.
Replicas are equal only at the beginning of a round; evaluation and samples use the anchor.

Stability: on a quadratic where a round shrinks the distance to the optimum by q = 1 - (1 - ηλ)^H, the outer loop is
stable for γ q < 2 (1+μ) / (1+2μ). This is 1.357 at μ = .9, so γ = .7 is stable for all 0 < q <= 1.

overlap: the sums travel during the next round and are applied after it. The bound on γ is then .253 at μ = .9, .562 at
.5 and 1 at 0; settings above it are refused.

Bytes a rank and round: 2 (N-1)/N P b, and a meta for each pulse. Memory: anchor and momentum, 2 P (host_memory puts
them on the host of a GPU); with overlap two vectors more. Staleness: 0; with overlap one round.

More in hvdllm/exchange/README.md, `diloco`.
"""

from __future__ import annotations

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.local import LocalSteps, Meetings, Replica
from hvdllm.exchange.local_rounds import Steps, Together
from hvdllm.exchange.outer import Nesterov


class DiLoCo(LocalSteps[exchanges.DiLoCo]):
    def __init__(self, settings: exchanges.DiLoCo, nominal: int) -> None:
        super().__init__(settings, nominal, Nesterov(settings.outer_lr, settings.outer_momentum))

    def arrange(self, replica: Replica) -> Meetings:
        return Together(replica, Steps(self.settings, replica.group), late=self.settings.overlap)
