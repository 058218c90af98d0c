"""The card of a saved decomposition."""

import re
import subprocess
import sys

import jax.numpy as jnp
from untrained import decomposition, nested


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path):
    params, apply_fn = nested("dict")
    check = {
        "number": 1,
        "title": "Faith | fulness",
        "passed": False,
        "bar": "≤ 1e-3",
        "text": "Not <so>.",
        "why": "",
    }
    evidence = {"verdict": "Needed up to this budget.", "checks": [check]}
    decomposition(params, apply_fn).save(
        tmp_path / "mine", metrics={"mmcs": 0.9981, "device": "cpu"}, evidence=evidence
    )
    text = (tmp_path / "mine" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert front.splitlines() == [
        "library_name: apd_jax",
        "tags:",
        "- parameter-decomposition",
        "- interpretability",
        "- jax",
    ]
    assert "# mine\n" in body and "5 components" in body and "and k = 2." in body
    assert "| `in.w` | 4×6 | 2 | 5 |" in body
    assert "| mmcs | 0.9981 |" in body and "cpu" not in body  # not a number
    assert "| 1 | Faith \\| fulness | **failed** | ≤ 1e-3 | Not &lt;so>. |" in body
    assert "Needed up to this budget." in body


def test_without_metrics_the_card_has_the_last_losses(tmp_path):
    decomposition(*nested("dict")).save(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| total | 0.1 |" in text and "Evidence" not in text


def test_the_cards_code_needs_no_training_code(tmp_path):
    params, apply_fn = nested("dict")
    given = decomposition(params, apply_fn)
    given.save(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    network = "jnp.tanh(x @ p['in']['w']) @ p['out']['v'] + p['out']['b'][None] "
    code = code.replace("apply_fn = ...", f"apply_fn = lambda p, x: {network}")
    code = code.replace("path/of/this/folder", str(tmp_path))
    code = code.replace("decomposition.mask(x)", "mask = decomposition.mask(x)")
    last = """import sys
print(mask.sum())
assert not any(name.startswith(('apd_jax.targets', 'apd_jax.commands')) for name in sys.modules)"""
    code = f"import jax.numpy as jnp\nx = jnp.ones((16, 4))\n{code}\n{last}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(given.mask(jnp.ones((16, 4))).sum())
