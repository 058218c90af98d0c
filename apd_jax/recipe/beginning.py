"""Where the recipe begins: at directions that mechanisms read, where these stand the test.

Kinds of directions (`kinds`) are tried in the order of what they cost, each among more and more
examples. Modes that are accepted, independent in some leaf and cover what is read are where the
recipe begins; else separated codes that do, or the kind of those accepted that has the fewest parts
on. Leaves that modes share are always on, or split by what modes write where nothing is lost by
that (`writes`). Directions that are mostly on together are joined to parts of more dimensions where
what is on is then shorter to say. Where no kind is accepted, it begins at random. Components are
accepted by what they do under the mask that they find (`judge`), not by what they span: any n ≥ d
directions span everything.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import constant, held, positions, restructure, writes
from apd_jax.recipe import modes as modes_lib
from apd_jax.recipe.judge import Judge, Worth
from apd_jax.recipe.kinds import KINDS, SUREST, Examples
from apd_jax.recipe.modes import Modes
from apd_jax.recipe.numbers import DRAWS, GIVE_K, STAGES, Recipe, stage_method, with_any_k
from apd_jax.recipe.scales import Scales
from apd_jax.train import parallel
from apd_jax.train.progress import say

log = logging.getLogger("apd_jax.recipe")

_LOOKS = (1, 2, 4)  # times the usual number of examples that are searched, until some are accepted
# ... and leave no part between these of what is read, as when a few modes are missing
_FEW_MISSING = (1e-3, 0.1)
_K_OFF = 2.5  # a topk that differs by this factor from what is found is worth a warning
_MOST_ACTIVE = 0.5  # of the parts, that may be on on average
_BETTER = 0.5  # the loss of accepted parts, of that of as many parts in other directions
_TIE = 0.01  # totals of loss and simplicity that differ by less are the same
_LEFT = 0.2  # of the loss, that modes must have to explain beside what is read whatever the mode
_INDEPENDENT = 0.99  # a gain above which modes are independent in a leaf


class NoneFound(InputError):
    """No kind of beginning is accepted, where k is left to it."""

    why = ""

    @classmethod
    def because(cls, why: str) -> NoneFound:
        error = cls(
            f"topk = 0 leaves k to the beginning, but there is none to begin at: {why} Mend that, "
            f"or {GIVE_K}"
        )
        error.why = why
        return error


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Components to begin with, and what their directions say of the network."""

    components: Components  # of all instances
    num_always_on: int
    active: float  # modes that an example has, the mean: an estimate of k

    @property
    def said(self) -> dict[str, Any]:
        """What `recipe.json` holds."""
        return {"num_always_on": self.num_always_on, "modes_per_example": self.active}


def accepted(
    problem: Problem,
    method: APD,
    recipe: Recipe,
    scales: Scales,
    judge: Judge | None = None,
    most_lost: float | None = None,
) -> Beginning | None:
    """Components at the first kind of beginning that stands the test, of every instance.

    None where one instance has none.

    Args:
      most_lost: the loss up to which leaves that modes share are split by what modes write; None:
        the recipe's `nearly_exact`.

    Raises:
      InputError: there is none, and topk = 0 left k to it.
    Cost: see `modes.densest`, `separation.find` and `Judge`, for every instance on data of its own.
    """
    if recipe.least_explained > 1:
        return None
    settings = stage_method(with_any_k(method), recipe, STAGES[-1], scales)
    lost = recipe.nearly_exact if most_lost is None else most_lost
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(method.seed), DRAWS + 1), (method.num_instances, 2)
    )

    def fresh(key: PRNGKeyArray) -> Components:
        return settings.make_components(key, problem)

    def begin() -> tuple[list[Components], np.ndarray]:
        found, active, all_found = [], [], True
        find = recipe.find_always_on and not method.num_always_on
        on = None if find else method.num_always_on
        judged_by = judge or Judge(problem, method, recipe, scales)
        for draw, init in keys:
            one = fresh(init)
            look = None
            if all_found:
                look = _Search(problem, method, recipe, judged_by, draw, one, on, lost).best()
                all_found = look is not None
            if look is not None:
                one, on = look.components, look.num_always_on
                active.append(look.modes.active)
            found.append(jax.device_get(one))
        says = (all_found, on or 0, np.mean(active or [0.0]))
        return found, np.array(says, np.float32)

    like = ([jax.eval_shape(fresh, keys[0, 0])] * len(keys), np.zeros(3, np.float32))
    found, (all_found, always_on, active) = parallel.from_primary(begin, like=like)
    if not all_found:
        return None
    if len(found) == 1:
        stacked = jax.tree.map(jnp.asarray, found[0])
    else:
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *found)
    return Beginning(stacked, int(always_on), float(active))


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a search among some examples found.

    unheld: (modes, leaves that they share, always-on components that would hold these, components
    needed for both), where these could not be held.
    """

    kind: str
    modes: Modes
    components: Components
    num_always_on: int
    worth: Worth
    refused: str  # why; "" where they are accepted
    unheld: tuple[Any, ...] = ()

    @property
    def complete(self) -> bool:
        few_missing = _FEW_MISSING[0] < self.modes.unexplained < _FEW_MISSING[1]
        return self.independent and not few_missing

    @property
    def covers(self) -> bool:
        """Whether nothing that is read is left out."""
        return self.independent and self.modes.unexplained <= _FEW_MISSING[0]

    @property
    def independent(self) -> bool:
        """In some leaf. Where they are in none, some may be mixtures of others."""
        return max(self.modes.gains.values()) > _INDEPENDENT


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for a beginning of one instance.

    given: components always on; None: found. most_lost: see `accepted`.
    """

    problem: Problem
    method: APD
    recipe: Recipe
    judge: Judge
    draw: Any
    fresh: Components
    given: int | None
    most_lost: float

    def best(self) -> _Look | None:
        """The best of the looks that are accepted.

        Raises:
          InputError: there is none, which is to say what k is.
        """
        best, refused, kinds = None, {}, list(KINDS)
        for times in _LOOKS:
            for look in self._looks(times, kinds):
                if look.refused:
                    refused[look.kind] = look.refused
                elif best is None or self._better(look, best):
                    best = look
            if best is not None and best.complete:
                break
            if best is not None and best.independent:
                kinds = [best.kind]
        if best is not None:
            self._warn(best)
        elif self.method.topk == 0:
            why = " ".join(refused.values()) or "neither modes, separation nor units find parts."
            raise NoneFound.because(why)
        elif refused:
            log.warning("components begin at random: %s", " ".join(refused.values()))
        return best

    def _looks(self, times: int, kinds: Sequence[str]) -> Iterator[_Look]:
        """These kinds among so many examples; no others where the surest finds its own."""
        batches = modes_lib.looked_at(self.problem, self.method.batch_size, self.draw, times)
        read, what = None, "examples"
        if self.method.per_position:
            read = positions.read(self.problem, self.method.batch_size, self.draw, times)
            what = "examples" if read is None else "positions"
        read = read or constant.read(self.problem, batches)
        read = read or modes_lib.examples(self.problem, batches)
        examples = Examples(self.problem, batches, self.draw, times, *read)
        for kind in kinds:
            say(f"recipe: looking for {kind} among {len(examples.effect):,} {what}.")
            found = KINDS[kind](examples)
            looks = []
            for modes in [found] if found is None or isinstance(found, Modes) else found:
                if not modes:
                    log.info("%s: none among %d %s", kind, len(examples.effect), what)
                    continue
                looks.append(self._judged(kind, modes, examples))
                yield looks[-1]
            if kind in SUREST and any(not look.refused and look.covers for look in looks):
                break

    def _judged(self, kind: str, modes: Modes, examples: Examples) -> _Look:
        n, C = len(modes), self.method.num_components
        shared = held.shared(modes)
        needed = max(self._needed(shared), held.num_for_rest(self.problem, modes, self.fresh))
        on = self.given
        if on is None:
            on = needed if needed + n <= C else 0
        one = held.components(self.problem, modes, self.fresh, num_always_on=on)
        worth = self.judge.by_threshold(one, on, modes.active)
        explained = self._explained(modes, one, on, worth)
        refused = self._refusal(kind, modes, on, explained, worth)
        if not refused:
            refused = self._control(kind, modes, examples, one, on, worth)
        found_on = on and self.given is None and examples.whole is None
        if not refused and shared and found_on:
            one, worth, modes, on = self._written(kind, modes, examples, one, worth, on)
            explained = self._explained(modes, one, on, worth)
        if not refused and modes.groups:
            one, worth, modes = self._joined(modes, one, on, worth)
        gains = ", ".join(f"{name} {gain:.2f}" for name, gain in modes.gains.items())
        log.info(
            "%s: %d, %.3g per example, explain %.3f of what the weights do with %.3g on; gain of "
            "%s; beside %d always on%s",
            *(kind, n, modes.active, explained, worth.active, gains, on),
            f"; refused: {refused}" if refused else "",
        )
        unheld, shared = (), held.shared(modes)
        if shared and not on:
            unheld = (n, " and ".join(shared), needed, needed + n)
        return _Look(kind, modes, one, on, worth, refused, unheld)

    def _explained(self, modes: Modes, one: Components, on: int, worth: Worth) -> float:
        """The share of what the weights do that parts do.

        What is always on could hold anything, and does not count; but some of it is known to be
        what is read whatever the mode.
        """
        left = min(1.0, self.judge.without(one, on).loss)
        explained = left - worth.loss
        return explained / left if modes.leaks and left > _LEFT else explained

    def _needed(self, shared: Sequence[str]) -> int:
        """Components that are always on, to hold these leaves whole."""
        return max((held.num_to_hold(self.problem, n, self.fresh) for n in shared), default=0)

    def _refusal(self, kind: str, modes: Modes, on: int, explained: float, worth: Worth) -> str:
        """Why components are not accepted, as far as they alone tell."""
        n, C = len(modes), self.method.num_components
        if n + on > C:
            return (
                f"{kind} finds {n} parts, for which num_components = {C} has no room beside {on} "
                "always on."
            )
        if explained < self.recipe.least_explained:
            return (
                f"{kind} explains {explained:.2f} of what the weights do with {worth.active:.2g} "
                f"of {n} parts on."
            )
        if worth.active > _MOST_ACTIVE * n:
            return f"{kind} needs {worth.active:.2g} of {n} parts on an example."
        return ""

    def _written(
        self, kind: str, modes: Modes, examples: Examples, one: Components, worth: Worth, on: int
    ) -> tuple[Components, Worth, Modes, int]:
        """With shared leaves split by what modes write, where that is accepted and loses little."""
        e = examples
        split = writes.split(e.problem, e.batches, e.ins, e.effect, modes, held.shared(modes))
        if not split.writes:
            return one, worth, modes, on
        needed = self._needed(held.shared(split))
        parts = held.components(self.problem, split, self.fresh, num_always_on=needed)
        found = self.judge.by_threshold(parts, needed, modes.active)
        better = found.loss < max(worth.loss, self.most_lost)
        better &= found.total < worth.total
        explained = self._explained(split, parts, needed, found)
        better &= not self._refusal(kind, split, needed, explained, found)
        log.info(
            "%s split by what is written: loss %.2g and simplicity %.2g, whole %.2g and %.2g%s",
            *(" and ".join(split.writes), found.loss, found.simplicity),
            *(worth.loss, worth.simplicity, "" if better else "; not kept"),
        )
        return (parts, found, split, needed) if better else (one, worth, modes, on)

    def _joined(
        self, modes: Modes, one: Components, on: int, worth: Worth
    ) -> tuple[Components, Worth, Modes]:
        """With groups of modes as one part each, where what is on is then shorter to say.

        In bits, active · (log₂ parts + rank): a name for each, and a bit for each dimension.
        """
        n = len(modes)
        parts = n - sum(len(group) - 1 for group in modes.groups)
        most = max(len(group) for group in modes.groups)
        if min(f.rank for f in one.factors.values()) < most:
            return one, worth, modes
        groups = [tuple(on + i for i in group) for group in modes.groups]
        joined = restructure.join(one, groups)
        found = self.judge.by_threshold(joined, on, modes.active_groups)
        apart, bits = worth.active * (np.log2(n) + 1), found.active * (np.log2(parts) + n / parts)
        better = bits < apart and found.loss < max(worth.loss, self.recipe.nearly_exact)
        log.info(
            "%d groups of modes joined, %d parts: loss %.2g and %.3g bits, apart %.2g and %.3g%s",
            *(len(groups), parts, found.loss, bits, worth.loss, apart),
            "" if better else "; not kept",
        )
        if not better:
            return one, worth, modes
        return joined, found, dataclasses.replace(modes, active=modes.active_groups)

    def _control(
        self, kind: str, modes: Modes, examples: Examples, one: Components, on: int, worth: Worth
    ) -> str:
        """The same with as many parts in other directions, each a mixture of all: with k on."""
        if len(modes) == 1:  # of one there are no mixtures
            return ""
        k = min(max(worth.active, 1 / self.method.batch_size), float(len(modes)))
        ins, writes = (modes_lib.mixed(a, self.method.seed) for a in (modes.ins, modes.writes))
        if writes:
            other = dataclasses.replace(modes, ins=ins, reads=ins, writes=writes)
        else:
            kept = modes_lib.with_effect(examples.effect)
            about = (kept, ins, modes.density, examples.whole)
            other = modes_lib.described(examples.ins, examples.effect, *about)
        control = held.components(
            self.problem, other, self.fresh, num_always_on=on, whole=held.shared(modes)
        )
        loss, chance = (self.judge.by_topk(c, on, k).loss for c in (one, control))
        if loss > _BETTER * chance:
            return (
                f"{kind} is no better than other directions: with {k:.2g} parts on, the loss is "
                f"{loss:.2g}, and {chance:.2g} with as many mixtures of them."
            )
        return ""

    def _better(self, look: _Look, best: _Look) -> bool:
        """Of two kinds, that with fewer parts on, whatever is always on.

        Of two that split by what is read, that which covers it, if one alone does. Of one kind,
        that with less loss and simplicity together; in a tie, that of which fewer modes miss.
        """
        if look.kind != best.kind:
            alike = not look.modes.writes and not best.modes.writes
            if alike and look.covers != best.covers:
                return look.covers
            return look.worth.active < best.worth.active
        if abs(look.worth.total - best.worth.total) < _TIE:
            return look.modes.unexplained < best.modes.unexplained
        return look.worth.total < best.worth.total

    def _warn(self, best: _Look) -> None:
        if best.unheld:
            log.warning(
                "%d modes share %s: each part does less than the whole on its own mode; "
                "num_always_on = %d of at least %d components could hold it whole.",
                *best.unheld,
            )
        k, active = float(self.method.topk), best.modes.active
        if k > 0 and not 1 / _K_OFF < k / active < _K_OFF:
            log.warning(
                "topk = %g, but examples have %.2g modes on average; topk should be about that.",
                *(k, active),
            )
