"""Sphinx's settings: `make docs` writes docs/_build/html; a warning is an error."""

import re
from typing import Any

import apd_jax

project = "apd_jax"
copyright = "the apd_jax contributors; Apache 2.0"
version = release = apd_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"apd_jax {version}"

# Headings can be linked to as on GitHub, `results.md#the-recipe`.
myst_heading_anchors = 3

# A {py:obj}`link` on a page must be found; types in signatures need not be.
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc|func|meth|attr|data)", ".*")]

# Names in `single quotes of this kind` are code; types read as they are written.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_include_init_with_doc = False


def _escaped(line: str) -> str:
    """Text in which a star, a bar and a last underscore mean themselves, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*|\\]|_\b)", r"\\\1", parts[i])
    return "".join(parts)


SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Cost|Yields|Shapes|Example):")


def _is_formula(paragraph: list[str]) -> bool:
    """Whether its lines are set out: aligned by several spaces, or deeper than their neighbours."""
    aligned = any(re.search(r"\S {2,}\S", line) for line in paragraph)
    equation = any(re.match(r"\s*\S+(\(.*?\))? +[=≈≤~] ", line) for line in paragraph)
    return aligned or equation


def _listed(paragraph: list[str]) -> list[str]:
    """`name: what it is`, with its further lines set in, as a list."""
    if not any(line.startswith(" ") for line in paragraph) or paragraph[0].startswith(" "):
        return [_escaped(line) for line in paragraph]
    return [
        "  " + _escaped(ln.strip()) if ln[0] == " " else "* " + _escaped(ln) for ln in paragraph
    ]


def lay_out(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings hold equations in unicode as the source shows them: these keep their lines.

    Everything else is text: Google's sections, lists of `name: what it is`, and `code`.
    """
    out, section = [], False
    for paragraph in "\n".join(lines).split("\n\n"):
        block = [line for line in paragraph.split("\n") if line.strip()]
        if not block:
            continue
        section = (section and block[0].startswith(" ")) or bool(SECTION.match(block[0]))
        if section:
            out += map(_escaped, block)
        elif _is_formula(block):
            out += ["::", "", *("   " + line for line in block)]
        else:
            out += _listed(block)
        out.append("")
    lines[:] = out


def shortened(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Float[Array, "B C"], as the source has it."""
    short = [s and re.sub(r"\b(jaxlib\._jax|numpy)\.", "", s) for s in (signature, returns)]
    return short[0], short[1]


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", shortened)
    app.connect("autodoc-process-docstring", lay_out, priority=100)  # before napoleon
