"""What every setting of a method means: the comments beside its fields, read from the source."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize

from ml_collections import config_dict

from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.base import Method


class Explained(config_dict.ConfigDict):
    """A config of a method's settings that is printed with what each of them means."""

    def __str__(self) -> str:
        try:
            return explain(registry.of(self))
        except InputError:  # other fields or values than a method has
            return super().__str__()


def default_config(method: str = "apd") -> config_dict.ConfigDict:
    """The settings that `apd_jax.decompose` reads, at their defaults; locked.

    `print` shows what each means.
    """
    return registry.settings(method, Explained)


def explain(method: str | Method | type[Method] = "apd") -> str:
    """All settings of a method, one a line: name, value, meaning.

    Args:
      method: its name ("apd", "spd", ...), or a settings object, whose values are then shown.
    Raises:
      InputError: there is no such method.
    """
    if isinstance(method, type):
        method = method()
    chosen = registry.by_name(method)() if isinstance(method, str) else method
    found = meanings(type(chosen))
    shown = {field: f"{field} = {getattr(chosen, field)!r}" for field in chosen.fields()}
    width = min(44, max(map(len, shown.values()))) + 2
    lines = [f"{chosen.name}: {chosen.about}", ""]
    for field, text in shown.items():
        lines += textwrap.wrap(
            f"{text:<{width}}{found.get(field, '')}",
            width=100,
            subsequent_indent=" " * width,
            drop_whitespace=True,
            break_long_words=False,
        )
    return "\n".join(line.rstrip() for line in lines)


def meanings(cls: type[Method]) -> dict[str, str]:
    """{field: the comment at its line, or at those above}; a field without one is left out.

    A comment after an empty line is the heading of what follows, and no meaning.
    """
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if issubclass(one, Method):
            found |= _of_class(textwrap.dedent(inspect.getsource(one)))
    return {field: found[field] for field in cls.fields() if field in found}


def _of_class(source: str) -> dict[str, str]:
    lines = ["", *source.splitlines()]
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        own = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        beside = [comments[i] for i in own if i in comments]
        i = node.lineno - 1
        while not beside and i in comments and lines[i].strip().startswith("#"):
            i -= 1
        above = [comments[j] for j in range(i + 1, node.lineno)] if not beside else []
        if above and not lines[i].strip():
            above = above[1:]
        if text := " ".join(beside or above):
            found[node.target.id] = text
    return found
