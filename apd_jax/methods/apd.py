"""APD, Attribution-based Parameter Decomposition (Braun et al. 2025, arXiv 2501.14926).

  A_c(x) = sqrt(mean_o (∂f_o(x, θ*)/∂θ · P_c)²)      how much component c matters for x
  s(x)   = the k·B largest of the batch               the gate: batch top-k
  κ(x)   = Σ_c s_c(x) P_c                             the others are dropped
  loss   = ‖θ* - Σ P‖²/N + α D(f(θ*, x), f(κ(x), x)) + β Σ_c s_c(x) ‖P_c‖_p^p

Also here: a threshold or a learned one in the place of top-k, ablation by parts, the L_p variant.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax.ablations import Drop, Uniform
from apd_jax.components import Components
from apd_jax.errors import InputError, one_of
from apd_jax.gates.base import AlwaysOn, Gate
from apd_jax.gates.ranked import All, BatchTopK, Exact, LearnedThreshold, Threshold, TopK
from apd_jax.methods import optimizers, terms
from apd_jax.methods.base import Annealed, Method, Number, Pass, Term
from apd_jax.network import data
from apd_jax.network.outputs import split_result
from apd_jax.network.problem import Problem

MASKS = ("batch_topk", "topk", "threshold", "learned", "exact", "none")
INACTIVE = ("drop", "uniform")
ATTRIBUTIONS_AT = ("target", "components")
PROBE_FROM = 100  # passes of exact attributions to one of a probe, from which auto takes probes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class APD(Method):
    """The settings of APD. Every coefficient of 0 switches its term off."""

    name: ClassVar[str] = "apd"
    about: ClassVar[str] = "attributions and top-k (Braun et al. 2025)"
    measured_in: ClassVar[Mapping[str, str]] = {
        "faithfulness_coeff": "faithfulness",
        "minimality_coeff": "minimality",
        "hidden_reconstruction_coeff": "hidden",
        "simplicity_coeff": "simplicity",
        "simplicity_coeff_final": "simplicity",
    }

    unit_norm_U: bool = False  # keep the columns of U at unit length
    num_always_on: int = 0  # the first components are on for every input, and not counted in topk

    # Attributions and gate.
    topk: Number = 1.0  # k, mean active components per example; 0, with a recipe: found
    # batch_topk | topk (per example) | threshold | learned | exact (as many as truly active) | none
    mask: str = "batch_topk"
    threshold: Number = 0.0  # of mask = "threshold", in units of the output; "learned": its start
    inactive: str = "drop"  # the others, in the sparse pass: drop | uniform (each times U(0, 1))
    attributions_at: str = "target"  # target | components: the weights the gradient is taken at
    attribution: str = "gradient"  # gradient | integrated_gradient | ablation | activation
    attribution_mode: str = "auto"  # auto | forward | reverse | probe (estimated, wide outputs)
    attribution_metric: str = "mse"  # mse | kl (logits): how a change of the outputs is measured
    num_probes: int = 8  # random output directions of attribution_mode = "probe"

    # Losses.
    loss_units: str = "target"
    faithfulness_coeff: Number = 1.0  # of how far the sum is from the target's weights
    minimality_coeff: Number = 1.0  # of the distance of outputs with the active components alone
    hidden_reconstruction_coeff: Number = 0.0  # of the same distance of hidden activations
    simplicity_coeff: Number = 1.0  # of the active components' Schatten norms
    simplicity_coeff_final: Number | None = None  # where it ends, in equal factors per step
    schatten_p: Number = 0.9  # p of these norms: near 0 counts ranks
    attribution_lp_coeff: Number = 0.0  # the alternative without top-k; use with mask = "none"
    attribution_lp_p: Number = 0.9  # its power
    importance_coeff: Number = 0.0  # mask = "learned" only: the price of an active component
    threshold_learning_rate: Number | None = None  # of log thresholds; None: learning_rate

    def make_gate(self, rng: PRNGKeyArray, problem: Problem, components: Components) -> PyTree:
        if self.mask != "learned":
            return ()
        start = jnp.log(jnp.asarray(self.threshold, jnp.float32))
        return {"log_thresholds": jnp.full(components.num_components, start)}

    def gate(self, arrays: PyTree, problem: Problem) -> Gate:
        gate = self._choice(arrays, problem)
        return AlwaysOn(gate, self.num_always_on) if self.num_always_on else gate

    def _choice(self, arrays: PyTree, problem: Problem) -> Gate:
        if self.mask == "topk":
            return TopK(self.topk)
        if self.mask == "threshold":
            return Threshold(self.threshold)
        if self.mask == "learned":
            if not arrays:
                raise InputError(
                    "mask = 'learned' needs a gate with thresholds, as training with it gives "
                    "them; this one has none."
                )
            return LearnedThreshold(arrays["log_thresholds"])
        if self.mask == "exact":
            if problem.num_active_fn is None:
                raise InputError(
                    "mask = 'exact' keeps as many components as features are active, which this "
                    "target does not tell; use mask = 'batch_topk'."
                )
            return Exact(problem.num_active_fn)
        return All() if self.mask == "none" else BatchTopK(self.topk)

    def attribute(self, problem: Problem) -> Callable[..., Float[Array, "B *T C"]]:
        """(components, params, x, rng) -> A_c(x)² of the kind, metric and mode that are set."""
        gradients = self.attribution in ("gradient", "integrated_gradient")
        exact = gradients and self.attribution_mode != "probe" and not self.per_position
        other = problem.attribution_fn if exact else None
        fn = problem.apply_fn if other is None else other

        def attribute(components: Components, params: PyTree, x: PyTree, rng: Any = None) -> Array:
            at = params
            if self.attributions_at == "components":
                at = components_lib.total(lax.stop_gradient(components), params)
            return attributions_lib.squared(
                self.attribution,
                fn,
                at,
                components,
                x,
                mode=self.attribution_mode,
                metric=self.attribution_metric,
                valid=problem.valid(x),
                per_position=self.per_position,
                num_probes=self.num_probes,
                rng=rng,
            )

        return attribute

    def fitted(self, problem: Problem) -> APD:
        """Mode auto as the cheapest: probes where exact attributions cost a hundred times as much.

        In passes of the network: forward C; reverse (per position, and of a single output) one per
        output; probes `num_probes`.
        """
        if self.attribution != "gradient" or self.attribution_mode != "auto":
            return self
        shapes = data.shapes(problem.sample_fn)
        out = split_result(jax.eval_shape(problem.apply_fn, problem.params, shapes))[0]
        num_outputs = math.prod(out.shape[1:])
        reverse = self.per_position or num_outputs == 1
        exact = num_outputs if reverse else self.num_components
        if exact <= PROBE_FROM * self.num_probes:
            return self
        log.info(
            "attribution_mode = 'auto': exact attributions cost %d passes of the network per step, "
            "so they are estimated by %d probes.",
            exact,
            self.num_probes,
        )
        return self.replace(attribution_mode="probe")

    def passes(self) -> dict[str, Pass]:
        return {"sparse": Pass(Uniform() if self.inactive == "uniform" else Drop())}

    def terms(self) -> dict[str, Term]:
        simple = self.simplicity_coeff
        if self.simplicity_coeff_final is not None:
            simple = Annealed(simple, self.simplicity_coeff_final, shape="geometric")
        powers = self.attribution_lp_p if self.mask == "none" else None
        return {
            "faithfulness": Term(self.faithfulness_coeff, terms.faithfulness),
            "minimality": Term(
                self.minimality_coeff,
                terms.reconstruction("sparse", self.minimality_loss),
                ("sparse",),
            ),
            "hidden_reconstruction": Term(
                self.hidden_reconstruction_coeff,
                terms.hidden_reconstruction("sparse"),
                ("sparse",),
            ),
            "importance": Term(self.importance_coeff, terms.importance(1.0, self.num_steps)),
            "attribution_lp": Term(
                self.attribution_lp_coeff, terms.attribution_lp(self.attribution_lp_p)
            ),
            "simplicity": Term(simple, terms.simplicity(self.schatten_p, powers)),
        }

    def transformation(self) -> optax.GradientTransformation:
        return optimizers.make(self, self.threshold_learning_rate)

    def constrain(self, components: Components) -> Components:
        return components_lib.normalize_U(components) if self.unit_norm_U else components

    def project(self, gradient: Components, components: Components) -> Components:
        if not self.unit_norm_U:
            return gradient
        return components_lib.project_U_gradient(gradient, components)

    @property
    def k(self) -> Any:
        return self.topk

    @property
    def num_kept(self) -> Any:
        dense = self.mask in ("none", "learned") or self.inactive != "drop" or self.num_always_on
        return None if dense else self.topk

    @property
    def always_on(self) -> int:
        return self.num_always_on

    @property
    def norm_p(self) -> Any:
        return self.schatten_p

    @property
    def metric(self) -> str:
        return self.attribution_metric

    @property
    def gradients_at(self) -> str | None:
        plain = self.attribution == "gradient" and self.attribution_metric == "mse"
        return self.attributions_at if plain and not self.per_position else None

    @property
    def estimates(self) -> bool:
        return self.attribution_mode == "probe"

    def read_with(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        return super().read_with() | {
            "threshold": ("mask", ("threshold",)),
            "topk": ("mask", ("batch_topk", "topk")),
        }

    def check(self) -> None:
        super().check()
        one_of("mask", self.mask, MASKS)
        one_of("inactive", self.inactive, INACTIVE)
        one_of("attributions_at", self.attributions_at, ATTRIBUTIONS_AT)
        one_of("attribution", self.attribution, attributions_lib.KINDS)
        one_of("attribution_mode", self.attribution_mode, attributions_lib.MODES)
        one_of("attribution_metric", self.attribution_metric, attributions_lib.METRICS)
        self.at_least_one("num_probes")
        self.not_negative(
            *("faithfulness_coeff", "minimality_coeff", "hidden_reconstruction_coeff"),
            *("simplicity_coeff", "attribution_lp_coeff", "importance_coeff", "threshold"),
        )
        self.above_zero("schatten_p", "attribution_lp_p")
        self._check_gate()
        self._check_attributions()
        self.some_term()

    def _check_gate(self) -> None:
        choosable = self.num_components - self.num_always_on
        if self.num_always_on < 0 or choosable < 1:
            raise InputError(
                f"num_always_on must lie in [0, num_components = {self.num_components}); got "
                f"{self.num_always_on}."
            )
        if not 0 < self.topk <= choosable:
            raise InputError(
                f"topk must be above 0 and at most {choosable}, the number of components to choose "
                f"from; got {self.topk}."
            )
        if self.mask == "batch_topk" and self.topk * self.batch_size < 1 and not self.per_position:
            raise InputError(
                f"topk = {self.topk} keeps {self.topk * self.batch_size:.2g} pairs of a batch of "
                f"{self.batch_size}, so none; raise topk or batch_size."
            )
        if self.mask == "topk" and self.topk != int(self.topk):
            raise InputError(
                f"topk must be a whole number when mask = 'topk' (per example); got {self.topk}."
            )
        if self.mask == "learned" and self.threshold == 0:
            raise InputError("mask = 'learned' begins at threshold, which must be above 0.")
        if self.mask != "learned" and self.importance_coeff > 0:
            raise InputError(
                f"importance_coeff = {self.importance_coeff} is read by mask = 'learned' only; got "
                f"mask = {self.mask!r}."
            )
        rate = self.threshold_learning_rate
        if rate is not None and not (self.mask == "learned" and 0 < rate < float("inf")):
            raise InputError(
                "threshold_learning_rate must be a finite number above 0, and is read by mask = "
                f"'learned' only; got {rate} and mask = {self.mask!r}."
            )
        last = self.simplicity_coeff_final
        if last is not None and not (self.simplicity_coeff > 0 and 0 < last < float("inf")):
            raise InputError(
                "simplicity_coeff and simplicity_coeff_final must both be above 0 for one to "
                f"become the other; got {self.simplicity_coeff} and {last}."
            )

    def _check_attributions(self) -> None:
        if self.per_position and self.attribution in ("integrated_gradient", "ablation"):
            raise InputError(
                f"attribution = {self.attribution!r} has no form per position; use gradient or "
                "activation, or mask_per = 'example'."
            )
        if self.per_position and self.attribution_mode == "forward":
            raise InputError(
                "attribution_mode = 'forward' has no form per position; use auto, reverse or probe."
            )
        if self.attribution_lp_coeff > 0 and self.attribution != "gradient":
            raise InputError(
                "attribution_lp_coeff needs attribution = 'gradient', through which it is trained; "
                f"got {self.attribution!r}."
            )
