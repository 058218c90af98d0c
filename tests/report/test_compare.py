"""Two runs: what differs is told, and a permuted decomposition is recognised as the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from conftest import close, load_golden
from etils import epath
from rich.console import Console

from apd_jax.report import compare

ORDER = np.array([2, 0, 1, 4, 3])


def runs(folder):
    """A run, and the same components in another order, the first of them at half its length."""
    golden = load_golden("tms_5_2")
    length = jnp.ones(5).at[0].set(np.sqrt(0.5))
    permuted = jax.tree.map(lambda a: (a * length[:, None, None])[ORDER], golden.components)
    history = [{"step": 10, "total": 1.0}, {"step": 20, "total": 0.5}]
    made = []
    for name, seed, components in (("a", 0, golden.components), ("b", 1, permuted)):
        (folder / name).mkdir(exist_ok=True)
        settings = {"apd": {"seed": seed, "topk": 1.0}}
        metrics = {"mmcs": 0.9 + seed / 100, "groups_found": 3, "step": 20}
        made.append(
            compare.Run(
                epath.Path(folder / name),
                settings,
                metrics,
                history,
                golden.params,
                components,
                np.full(5, 0.1, np.float32),
            )
        )
    return made


def test_a_permutation_is_the_same_decomposition(tmp_path):
    first, second = runs(tmp_path)
    found = compare.compare(first, second)
    assert {(c, d) for c, d, *_ in found.pairs} == {(int(ORDER[d]), d) for d in range(5)}
    close(np.array([cosine for *_, cosine, _ in found.pairs]), np.ones(5))
    ratios = {c: ratio for c, _, _, ratio in found.pairs}
    close(np.array([ratios[c] for c in range(5)]), np.array([0.5, 1, 1, 1, 1]))
    assert found.settings == [("apd.seed", "0", "1")]
    assert ("MMCS, best cosine per feature", "0.9", "0.91") in found.metrics and (
        "groups found",
        "3",
        "3",
    ) in found.metrics
    assert found.verdict.startswith("Of 5 components, matched one to one, 5 point the same way")


def test_on_the_terminal_and_on_a_page(tmp_path):
    found = compare.compare(*runs(tmp_path))
    console = Console(width=120)
    with console.capture() as capture:
        for part in compare.terminal(found):
            console.print(part)
    for words in ("apd.seed", "MMCS", "norm ratio", "0.500", found.verdict[:40]):
        assert words in capture.get()
    text = compare.write(tmp_path / "a" / "compare.html", found).read_text()
    assert (
        "apd.seed" in text and found.verdict in text and "b has none" in text
    )  # b has no report yet
    (tmp_path / "b" / "report.html").write_text("")
    assert (
        'href="../b/report.html"'
        in compare.write(tmp_path / "a" / "compare.html", found).read_text()
    )


def test_other_weights_are_not_matched(tmp_path):
    first, second = runs(tmp_path)
    second = dataclasses.replace(second, params={**second.params, "b": second.params["b"] + 1})
    found = compare.compare(first, second)
    assert found.pairs == [] and found.cosine is None and "target.seed" in found.verdict
    assert found.verdict in compare.write(tmp_path / "compare.html", found).read_text()
