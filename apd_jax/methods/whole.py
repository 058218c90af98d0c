"""Components of the whole network with learned gates: one number, one gate, pieces at every site.

As VPD, but component c has a piece U_c V_c at every site and one causal importance g_c(x) for all
of them. Of rank 1, or with nested ranks: in the stochastic pass only the first R' of the R rank-one
parts of every component are used, R' ~ U{1, 2, 4, ..., R}, so that the first hold the most; a price
on ranks (trim) then shrinks what is not needed.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from apd_jax.ablations import Uniform
from apd_jax.methods import terms
from apd_jax.methods.base import Number, Pass, Term
from apd_jax.methods.vpd import VPD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(VPD):
    """The settings of whole-network components; num_components is C."""

    name: ClassVar[str] = "whole"
    about: ClassVar[str] = "whole-network components, learned gates, nested ranks"

    num_components: int = 100
    learning_rate: Number = 5e-4
    gradient_clip: float | None = None
    importance_coeff: Number = 1e-3
    frequency_coeff: Number = 5e-4
    nested: bool = False  # cut ranks at random in the stochastic pass
    trim_coeff: Number = 0.0  # the price of ranks
    trim_p: float = 0.5  # power of the norms in that price

    @property
    def own_numbers(self) -> bool:
        return False

    def passes(self) -> dict[str, Pass]:
        stochastic = Pass(Uniform(), sites="all", delta="masked", nested=self.nested)
        return super().passes() | {"stochastic": stochastic}

    def terms(self) -> dict[str, Term]:
        return super().terms() | {"trim": Term(self.trim_coeff, terms.trim(self.trim_p))}

    def check(self) -> None:
        super().check()
        self.not_negative("trim_coeff")
        self.above_zero("trim_p")
