"""Targeted decomposition of a few behaviours (arXiv 2607.13047).

Two streams of data: `here`, where the behaviour is, and `elsewhere`. Components need not sum to
the network: Δ = θ* - ΣP always takes part, so there is no faithfulness loss.

  here        m stochastic and adversarial, and Δ masked too: only components may do the behaviour
  elsewhere   Δ on, m stochastic: components that are not needed there must not matter there

The price of causal importances is doubled elsewhere. Not in the paper (`dropped_coeff` = 0): a pass
of each stream in which what is not needed is dropped, m = g. Elsewhere that is the network from
which the behaviour's components are erased, θ* - Σ_c (1 - g_c) P_c; of many random masks half is
left on average, and says little of it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from apd_jax.ablations import Drop, Keep, Uniform
from apd_jax.methods import terms
from apd_jax.methods.base import ELSEWHERE, HERE, Number, Pass, Term
from apd_jax.methods.vpd import VPD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted(VPD):
    """The settings of targeted decomposition; num_components is C of every site."""

    name: ClassVar[str] = "targeted"
    about: ClassVar[str] = "a few behaviours, on two streams of data"

    learning_rate: Number = 1e-4
    gradient_clip: float | None = None
    gate_kind: str = "pieces"
    faithfulness_coeff: Number = 0.0
    faithfulness_warmup_steps: int = 0
    stochastic_coeff: Number = 1.0
    elsewhere_coeff: Number = 1.0  # of the distance on the second stream of data
    dropped_coeff: Number = 0.0  # here without Δ, and elsewhere, with what is not needed dropped
    importance_coeff: Number = 1e-3
    importance_p_final: Number | None = 1.0
    frequency_coeff: Number = 0.0
    unmasked_coeff: Number = 0.0  # here, with all components whole and without Δ

    @property
    def streams(self) -> tuple[str, ...]:
        return (HERE, ELSEWHERE)

    def passes(self) -> dict[str, Pass]:
        return {
            "adversarial": Pass(self.make_adversary(), delta="masked"),
            "stochastic": Pass(Uniform(), delta="masked"),
            "elsewhere": Pass(Uniform(), delta="on", stream=ELSEWHERE),
            "unmasked": Pass(Keep()),
            "dropped": Pass(Drop(), delta="masked"),
            "dropped_elsewhere": Pass(Drop(), delta="on", stream=ELSEWHERE),
        }

    def terms(self) -> dict[str, Term]:
        kind = self.minimality_loss
        return super().terms() | {
            "elsewhere": Term(
                self.elsewhere_coeff, terms.reconstruction("elsewhere", kind), ("elsewhere",)
            ),
            "unmasked": Term(
                self.unmasked_coeff, terms.reconstruction("unmasked", kind), ("unmasked",)
            ),
            "dropped": Term(
                self.dropped_coeff, terms.reconstruction("dropped", kind), ("dropped",)
            ),
            "dropped_elsewhere": Term(
                self.dropped_coeff,
                terms.reconstruction("dropped_elsewhere", kind),
                ("dropped_elsewhere",),
            ),
            "importance_elsewhere": Term(2 * self.importance_coeff, self.importance(ELSEWHERE)),
        }

    def check(self) -> None:
        super().check()
        self.not_negative("elsewhere_coeff", "unmasked_coeff", "dropped_coeff")
