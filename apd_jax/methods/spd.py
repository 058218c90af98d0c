"""SPD, Stochastic Parameter Decomposition (Bushnaq et al. 2025, arXiv 2506.20790).

P_{l,j} = U_j V_j of rank one, every site l with components of its own
g_j(x)  = σ_H(γ_j(h_j)),  h_j = a_l(x)·U_j          the gate: a small MLP per component
m_j(x)  = g_j + (1 - g_j) r_j,  r_j ~ U(0, 1)       what is not needed is ablated at random
loss    = β₁ ‖θ* - Σ P‖²/N + β₂ D(f(θ*), f(κ at all sites))
          + β₃ mean_l D(f(θ*), f(κ at site l alone)) + β₄ Σ_j mean g_j^p
          + β₅ D(f(θ*), f(Σ_j g_j P_j))

The last term is not in the paper (β₅ = 0). Of thousands of components half is left on average by
masks drawn independently, and what each draw takes away averages out: then the loss is small even
where what gates call needed is far from enough.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from apd_jax.ablations import Drop, Uniform
from apd_jax.methods import terms
from apd_jax.methods.base import Number, Pass, Term
from apd_jax.methods.gated import Gated


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPD(Gated):
    """The settings of SPD; num_components is C of every site."""

    name: ClassVar[str] = "spd"
    about: ClassVar[str] = "stochastic masks, an MLP per component (Bushnaq et al. 2025)"

    num_components: int = 20
    stochastic_coeff: Number = 1.0  # β₂: all sites masked
    layerwise_coeff: Number = 1.0  # β₃: one site masked at a time
    dropped_coeff: Number = 0.0  # β₅: what is not needed dropped, m = g
    importance_coeff: Number = 3e-3

    def passes(self) -> dict[str, Pass]:
        return {
            "stochastic": Pass(Uniform()),
            "layerwise": Pass(Uniform(), sites="each"),
            "dropped": Pass(Drop()),
        }

    def terms(self) -> dict[str, Term]:
        kind = self.minimality_loss
        return {
            "faithfulness": Term(self.faithfulness_coeff, terms.faithfulness),
            "stochastic": Term(
                self.stochastic_coeff, terms.reconstruction("stochastic", kind), ("stochastic",)
            ),
            "layerwise": Term(
                self.layerwise_coeff, terms.reconstruction("layerwise", kind), ("layerwise",)
            ),
            "dropped": Term(
                self.dropped_coeff, terms.reconstruction("dropped", kind), ("dropped",)
            ),
            "hidden_reconstruction": Term(
                self.hidden_reconstruction_coeff,
                terms.hidden_reconstruction("stochastic"),
                ("stochastic",),
            ),
            "importance": Term(self.importance_coeff, self.importance()),
        }

    def check(self) -> None:
        super().check()
        self.not_negative("stochastic_coeff", "layerwise_coeff", "dropped_coeff")
