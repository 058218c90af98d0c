"""One behaviour taken out of a trained language model, by directions that tell its positions apart.

    python benchmarks/erase.py --model MODEL --text 'summaries/*.txt' \\
        --sites 'blk.0.ffn_down.weight' 'blk.0.ffn_gate.weight,blk.0.ffn_up.weight' ...

The behaviour: after a digit, another digit. `apd_jax.contrast` finds one component of each of these
sites (or --num) in what they read at digits and not elsewhere, on rows of text; then the network
without it is judged on rows that were held out, where

  at digits        P: the probability of all digits together, where a digit does follow a digit
  before digits    KL(target ‖ without), in nats, at positions before any digit of their row
  after digits     the same at later positions that are no digits: these still read the digits,
                   of which less is left

Beside each, where --control asks for it, the same with components found at as many positions that
were drawn at random.

Only tokens that are one digit are taken for digits, so the model must read numbers by their digits
(SmolLM2 and Qwen do). Half of the rows have a digit that is followed by one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import apd_jax
from apd_jax import components as components_lib
from apd_jax import language
from apd_jax.errors import InputError
from apd_jax.language.tokens import PAD, Tokens, documents

BATCH = 20  # rows
KINDS = ("before digits", "after digits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a path, as `language.load` takes it")
    parser.add_argument("--text", required=True, help="a glob pattern over text files")
    parser.add_argument("--sites", required=True, nargs="+", help="each: names with commas between")
    parser.add_argument("--num", type=int, default=1, help="components of every site")
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=320, help="to find them on")
    parser.add_argument("--judged", type=int, default=160, help="rows that were held out")
    parser.add_argument("--length", type=int, default=24, help="tokens in a row")
    parser.add_argument("--control", action="store_true", help="also at random positions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        Console().print(_table(options))
    except InputError as error:
        sys.exit(f"erase.py: {error}")


def _table(options: argparse.Namespace) -> Table:
    model = language.load(options.model)
    if model.tokenizer is None:
        raise InputError(f"{options.model} came without a tokenizer, so its digits are not known.")
    digits = _digits(model)
    tokens = Tokens.of(documents(options.text, 5000), model.tokenizer, seed=options.seed)
    found, judged = (
        _rows(tokens, digits, held_out, count, options)
        for held_out, count in ((False, options.rows), (True, options.judged))
    )
    measure = _Measure(model, judged, digits)
    table = Table(title=f"{options.num} component(s) of each site, ridge {options.ridge:g}")
    heads = ("sites", "seconds", "P at digits", "times less", *(f"KL {kind}" for kind in KINDS))
    for head in (*heads, "positions"):
        table.add_column(head, overflow="fold")
    share, chance = np.isin(found, digits).mean(), np.random.default_rng(options.seed)
    kinds: dict[str, Callable[[Any], Any]] = {"": lambda x: np.isin(x, digits)}
    if options.control:
        kinds[" (at random positions)"] = lambda x: chance.random(np.shape(x)) < share
    for sites, (kind, where) in itertools.product(options.sites, kinds.items()):
        began = time.monotonic()
        parts = apd_jax.contrast(
            model.apply_fn,
            model.params,
            list(_batches(found)),
            where,
            select=sites.split(","),
            num_components=options.num,
            ridge=options.ridge,
            valid_fn=lambda x: np.asarray(x) != PAD,
        )
        taken = time.monotonic() - began
        row = measure(components_lib.without(parts, model.params))
        table.add_row(sites + kind, f"{taken:.0f}", *_cells(row))
    return table


def _digits(model: Any) -> np.ndarray:
    """The token of every digit."""
    found = [np.asarray(model.encode(digit)) for digit in "0123456789"]
    if any(len(one) != 1 for one in found):
        raise InputError("this tokenizer has no token of its own for every digit.")
    return np.array([int(one[0]) for one in found])


def _rows(
    tokens: Tokens, digits: np.ndarray, held_out: bool, count: int, options: argparse.Namespace
) -> np.ndarray:
    """Rows [count, T], drawn at random: half with a digit after a digit, half of all others."""
    rows = tokens.rows(options.length, held_out=held_out)
    every = rows.take(np.arange(len(rows)))
    every = every[(every != PAD).all(1)]
    has = _followed(every, digits).any(1)
    rng, half = np.random.default_rng(options.seed), count // 2
    if min(has.sum(), (~has).sum()) < half:
        raise InputError(
            f"the text has {has.sum()} rows with a number and {(~has).sum()} without, of those "
            f"{'held out' if held_out else 'to find components on'}; {half} of each are asked for."
        )
    kinds = [rng.choice(every[kind], half, replace=False) for kind in (has, ~has)]
    return np.concatenate(kinds)


def _followed(rows: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Where a digit is followed by a digit."""
    is_digit = np.isin(rows, digits)
    return is_digit & np.pad(is_digit[:, 1:], ((0, 0), (0, 1)))


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))


class _Measure:
    """What other weights do on these rows, beside the target's."""

    def __init__(self, model: Any, rows: np.ndarray, digits: np.ndarray):
        self._rows, self._digits = rows, digits
        self._logits = jax.jit(lambda p, x: jax.nn.log_softmax(model.apply_fn(p, x)))
        self._before = [self._run(model.params, x) for x in _batches(rows)]
        is_digit = np.isin(rows, digits)
        seen = np.cumsum(is_digit, 1) > 0
        self._places = dict(zip(KINDS, (~seen, seen & ~is_digit), strict=True))

    def _run(self, params: Any, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(params, jnp.asarray(x)))

    def __call__(self, params: Any) -> dict[str, float]:
        digit, kl = {"before": [], "after": []}, []
        for x, before in zip(_batches(self._rows), self._before, strict=True):
            after, at = self._run(params, x), _followed(x, self._digits)
            for name, logits in (("before", before), ("after", after)):
                digit[name].append(np.exp(logits[at][:, self._digits]).sum(-1))
            kl.append(np.sum(np.exp(before) * (before - after), -1))
        found = {f"P {name}": np.mean(np.concatenate(p)) for name, p in digit.items()}
        found["digits"] = sum(map(len, digit["before"]))
        every = np.concatenate(kl)
        for kind, places in self._places.items():
            own = every[places]
            found[kind], found[f"{kind}, 99 %"] = np.mean(own), np.quantile(own, 0.99)
            found[f"{kind}, positions"] = len(own)
        return {name: float(value) for name, value in found.items()}


def _cells(found: dict[str, float]) -> list[str]:
    before, after = found["P before"], found["P after"]
    kinds = [f"{found[kind]:.4f} (99 %: {found[f'{kind}, 99 %']:.3f})" for kind in KINDS]
    counts = ("digits", *(f"{kind}, positions" for kind in KINDS))
    return [
        *(f"{before:.3f} → {after:.4f}", f"{before / after:.1f}", *kinds),
        ", ".join(f"{found[name]:.0f}" for name in counts),
    ]


if __name__ == "__main__":
    main()
