"""What methods with learned causal importances share: how components begin, and their gate.

Shapes: C components, L sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import optax
from jaxtyping import PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components, matches
from apd_jax.components.layout import Layout, matrix_shape
from apd_jax.errors import InputError, one_of
from apd_jax.gates import learned
from apd_jax.gates.base import AnyOf, Gate
from apd_jax.methods import optimizers, terms
from apd_jax.methods.base import HERE, Annealed, Method, Number
from apd_jax.network.problem import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Settings of components with learned causal importances.

    num_components counts those of every site where sites have numbers of their own, else all. 0,
    of the former: as many as the site's matrix has rows or columns, whichever are more, and at
    least twice its full rank.
    """

    measured_in: ClassVar[Mapping[str, str]] = {
        "faithfulness_coeff": "faithfulness",
        "stochastic_coeff": "minimality",
        "layerwise_coeff": "minimality",
        "dropped_coeff": "minimality",
        "adversarial_coeff": "minimality",
        "hidden_reconstruction_coeff": "hidden",
        "elsewhere_coeff": "minimality",
        "unmasked_coeff": "minimality",
        "importance_coeff": "components",
        "frequency_coeff": "components",
    }

    rank: int | None = 1
    # where pieces begin: random | svd (singular directions of the leaf) | found (as the recipe)
    initial: str = "random"
    warmup_fraction: float = 0.0

    # Gate.
    gate_kind: str = (
        "pieces"  # pieces (an MLP per component) | inputs (an MLP per site) | transformer
    )
    gate_width: int = 16  # of the MLPs
    gate_d_model: int = 64  # width of the transformer
    gate_blocks: int = 2  # layers of the transformer
    gate_heads: int = 4  # attention heads of the transformer
    gate_causal: bool = False  # whether the transformer sees earlier positions alone
    # the component that each of the gate's own belongs to, on where any is; (): they are the same
    clusters: tuple[int, ...] = ()
    gate_learning_rate: Number | None = None  # None: learning_rate

    # Losses.
    faithfulness_coeff: Number = 1.0  # of how far the sum is from the target's weights
    faithfulness_warmup_steps: int = 0  # of Adam on faithfulness alone, before the first step
    faithfulness_warmup_rate: float = 1e-3  # learning rate of that
    importance_coeff: Number = 1e-3  # the price of causal importance: what makes few active
    importance_p: Number = 1.0  # the power of causal importances ...
    importance_p_final: Number | None = None  # ... and where it ends, linearly; None: constant
    importance_gamma: Number | None = None  # smooth-L0 in place of the power: γ at first ...
    importance_gamma_final: Number = 0.01  # ... and where it ends, linearly
    hidden_reconstruction_coeff: Number = 0.0  # of the distance of hidden activations

    @property
    def own_numbers(self) -> bool:
        """Whether every site has components of its own."""
        return True

    def make_components(self, rng: PRNGKeyArray, problem: Problem) -> Components:
        """As large together as the target's weights, then warmed up on faithfulness alone.

        At singular directions their sum is the target's, and nothing is warmed up, where there are
        enough of them.
        """
        names = components_lib.selected_paths(problem.params, problem.chosen, problem.layouts)
        select, count, ids = problem.chosen, self.num_components, None
        if self.own_numbers:
            counts = {name: self._count(problem, name) for name in names}
            select, ids, count = _own_numbers(problem.chosen, names, counts)
        components = components_lib.init(
            rng,
            problem.params,
            num_components=count,
            rank=self.rank,
            init_scale=self.init_scale,
            select=select,
            uses=problem.uses,
            layouts=problem.layouts,
            ids=ids,
            like_target=True,
        )
        if self.initial == "svd":
            components = components_lib.at_singular(components, problem.params)
        if self.clusters:
            components = components_lib.relabel(components, self.clusters)
        if self.initial == "svd" and all(
            map(components_lib.holds_all, components.factors.values())
        ):
            return components
        if self.finds_beginning:
            return components
        return self._warmed_up(components, problem.params)

    @property
    def finds_beginning(self) -> bool:
        return self.initial == "found"

    def _count(self, problem: Problem, site: str) -> int:
        """How many components a site has where `select` does not say."""
        if self.num_components:
            return self.num_components
        shape = problem.sites[site].shape
        sides = matrix_shape(shape, problem.layouts.get(site, Layout.default(len(shape))))
        return max(*sides, 2 * min(sides))

    def _warmed_up(self, components: Components, params: PyTree) -> Components:
        if not self.faithfulness_warmup_steps:
            return components
        optimizer = optax.adam(self.faithfulness_warmup_rate)

        def once(_: Any, carry: tuple[Components, Any]) -> tuple[Components, Any]:
            components, state = carry
            gradient = jax.grad(losses.relative_faithfulness)(components, params)
            updates, state = optimizer.update(gradient, state, components)
            moved: Any = optax.apply_updates(components, updates)
            return moved, state

        start = (components, optimizer.init(components))
        return jax.lax.fori_loop(0, self.faithfulness_warmup_steps, once, start)[0]

    def make_gate(self, rng: PRNGKeyArray, problem: Problem, components: Components) -> PyTree:
        return learned.init(rng, self._spec(), self._clustered(None).parts(components))

    def gate(self, arrays: PyTree, problem: Problem) -> Gate:
        gate = learned.LearnedGate(self._spec(), arrays)
        return self._clustered(gate) if self.clusters else gate

    def _clustered(self, gate: Gate | None) -> AnyOf:
        return AnyOf(gate, self.clusters, self.own_numbers)

    def _spec(self) -> learned.Spec:
        return learned.Spec(
            kind=self.gate_kind,
            width=self.gate_width,
            d_model=self.gate_d_model,
            blocks=self.gate_blocks,
            heads=self.gate_heads,
            causal=self.gate_causal,
            per_position=self.per_position,
        )

    @property
    def p(self) -> Any:
        """The power of causal importances, a number or a schedule."""
        if self.importance_p_final is None:
            return self.importance_p
        return Annealed(self.importance_p, self.importance_p_final)

    def importance(self, stream: str = HERE) -> terms.Score:
        """What causal importances cost: Σ_c mean g_c^p, or smooth-L0 if `importance_gamma` is set.

        Smooth-L0, ψ(g) = (1 + γ²) g² / (g² + γ²), counts what is above 0 without the unbounded
        gradient of a small power; γ is usually taken from 1 to 0.01.
        """
        if self.importance_gamma is None:
            return terms.importance(self.p, self.num_steps, stream)
        gamma = Annealed(self.importance_gamma, self.importance_gamma_final)
        return terms.smooth_l0(gamma, self.num_steps, stream)

    def transformation(self) -> optax.GradientTransformation:
        return optimizers.make(self, self.gate_learning_rate)

    def check(self) -> None:
        super().check()
        one_of("gate_kind", self.gate_kind, learned.KINDS)
        one_of("initial", self.initial, ("random", "svd", "found"))
        if self.finds_beginning and self.clusters:
            raise InputError(
                "initial = 'found' does not know clusters; begin at 'svd' or 'random'."
            )
        self.at_least_one("gate_width", "gate_d_model", "gate_blocks", "gate_heads")
        if self.gate_d_model % (2 * self.gate_heads):
            raise InputError(
                f"gate_d_model = {self.gate_d_model} must be a multiple of twice gate_heads = "
                f"{self.gate_heads}."
            )
        self.not_negative(
            *("faithfulness_coeff", "importance_coeff", "hidden_reconstruction_coeff"),
            "faithfulness_warmup_steps",
        )
        self.above_zero("importance_p", "importance_gamma_final", "faithfulness_warmup_rate")
        for field in ("importance_p_final", "importance_gamma", "gate_learning_rate"):
            if getattr(self, field) is not None:
                self.above_zero(field)
        if self.num_component_shards > 1:
            raise InputError(
                f"num_component_shards = {self.num_component_shards}: the gates of method "
                f"{self.name!r} cannot be split over devices; use 1."
            )
        self.some_term()


def _own_numbers(
    select: Any, names: list[str], counts: dict[str, int]
) -> tuple[Any, dict[str, range], int]:
    """Every site's range of numbers, {pattern: {"components": n}} of `select` giving it n of them.

    Where `select` does not, counts does.

    Returns: `select` without that option, {site: its numbers}, how many there are in all.
    """
    counts = dict(counts)
    if isinstance(select, Mapping):
        rest = {}
        for pattern, options in select.items():
            options = dict(options)
            if "components" in options:
                n = options.pop("components")
                n = n if isinstance(n, int) else len(n)
                if n < 1:
                    raise InputError(f"select gives {pattern!r} {n} components; give at least 1.")
                own = [name for name in names if matches(name, pattern, names)]
                counts |= dict.fromkeys(own, n)
            rest[pattern] = options
        select = rest
    ids, first = {}, 0
    for name in names:
        ids[name] = range(first, first + counts[name])
        first += counts[name]
    return select, ids, first
