"""VPD ("Interpreting Language Model Parameters", Bushnaq et al. 2026).

P_{l,j} = U_j V_j of rank one, and Δ_l = θ*_l - Σ_j P_{l,j} as one more component of every site
g(x)    from a transformer over the inputs of all sites
m_j     = g_j + (1 - g_j) r_j, m_Δ = r_Δ; the r of
          stochastic passes ~ U(0, 1), at a random subset of the sites of every position
          adversarial passes: sources that persist, and ascend the loss
loss    = ½ KL(adversarial) + ½ KL(stochastic subset)
          + λ Σ_j [s_j + β s_j log₂(1 + s_j)] / rows, s_j = Σ (g_j + 1e-12)^p + 1e7 MSE(Δ)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from apd_jax.ablations import Ablation, Adversary, PersistentAdversary, Pool, Uniform
from apd_jax.ablations.adversary import SHARED
from apd_jax.errors import one_of
from apd_jax.losses import Distance
from apd_jax.methods import terms
from apd_jax.methods.base import Number, Pass, Term
from apd_jax.methods.gated import Gated

ADVERSARIES = ("persistent", "pooled", "fresh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPD(Gated):
    """The settings of VPD; num_components is C of every site."""

    name: ClassVar[str] = "vpd"
    about: ClassVar[str] = "transformer gate, persistent adversary (Bushnaq et al. 2026)"

    num_components: int = 40
    minimality_loss: Distance = "kl"
    optimizer: str = "adamw"
    schedule: str = "half_cosine"
    learning_rate: Number = 5e-5
    gradient_clip: float | None = 0.01
    gate_kind: str = "transformer"

    faithfulness_coeff: Number = 1e7
    faithfulness_warmup_steps: int = 400
    adversarial_coeff: Number = 0.5  # of the distance under the worst ablations found
    stochastic_coeff: Number = 0.5  # of the distance under random ablations
    importance_coeff: Number = 2e-4
    importance_p: Number = 2.0
    importance_p_final: Number | None = 0.4
    frequency_coeff: Number = 1e-4  # β = ½ of importance_coeff

    adversary: str = "persistent"  # persistent | pooled | fresh: see `apd_jax.ablations.adversary`
    adversary_ascents: int = 2  # before the training pass, which of what is kept is one more
    adversary_rate: Number = 0.01  # the step of an ascent
    adversary_shared: str = "position"  # batch | example | position: what has sources of its own

    def passes(self) -> dict[str, Pass]:
        return {
            "adversarial": Pass(self.make_adversary(), delta="masked"),
            "stochastic": Pass(Uniform(), sites="subset", delta="masked"),
        }

    def make_adversary(self) -> Ablation:
        n, rate, shared = self.adversary_ascents, self.adversary_rate, self.adversary_shared
        if self.adversary == "fresh":
            return Adversary(steps=n, step_size=rate, shared=shared)
        kept = Pool if self.adversary == "pooled" else PersistentAdversary
        return kept(ascents=n, learning_rate=rate, shared=shared)

    def terms(self) -> dict[str, Term]:
        kind = self.minimality_loss
        return {
            "faithfulness": Term(self.faithfulness_coeff, terms.faithfulness),
            "adversarial": Term(
                self.adversarial_coeff, terms.reconstruction("adversarial", kind), ("adversarial",)
            ),
            "stochastic": Term(
                self.stochastic_coeff, terms.reconstruction("stochastic", kind), ("stochastic",)
            ),
            "hidden_reconstruction": Term(
                self.hidden_reconstruction_coeff,
                terms.hidden_reconstruction("stochastic"),
                ("stochastic",),
            ),
            "importance": Term(self.importance_coeff, self.importance()),
            "frequency": Term(self.frequency_coeff, terms.frequency(self.p, self.num_steps)),
        }

    def check(self) -> None:
        super().check()
        one_of("adversary", self.adversary, ADVERSARIES)
        one_of("adversary_shared", self.adversary_shared, SHARED)
        self.not_negative(
            *("adversarial_coeff", "stochastic_coeff", "frequency_coeff", "adversary_ascents")
        )
        self.above_zero("adversary_rate")
