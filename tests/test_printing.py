"""What a person sees who prints what a public call returned: no page of numbers."""

import dataclasses
import importlib
import pkgutil
import re

import numpy as np
import pytest

from apd_jax import language
from apd_jax.evidence.card import Evidence
from apd_jax.evidence.check import Check
from apd_jax.language.decoder import DecoderConfig

ROOMS = ("evaluation", "evidence", "interpretation", "language")


def holders():
    """The public dataclasses of these rooms that have a field of arrays, by their name."""
    for room in ROOMS:
        package = importlib.import_module(f"apd_jax.{room}")
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__"):
                continue
            module = importlib.import_module(found.name)
            for name, kind in vars(module).items():
                own = dataclasses.is_dataclass(kind) and kind.__module__ == found.name
                if not own or name.startswith("_"):
                    continue
                kinds = [str(field.type) for field in dataclasses.fields(kind)]
                if any(re.search(r"ndarray|Array\b", kind) for kind in kinds):
                    yield pytest.param(kind, id=f"{room}.{name}")


@pytest.mark.parametrize("kind", list(holders()))
def test_arrays_are_printed_by_type_and_shape(kind):
    whole = object.__new__(kind)
    for field in dataclasses.fields(kind):
        mapping = str(field.type).startswith(("dict", "Mapping"))
        array = np.zeros((70, 70))
        object.__setattr__(whole, field.name, {"w": array} if mapping else array)
    if kind is language.LanguageModel:
        sizes = (30, 8, 2, 2, 2, 4, 16, 12)
        object.__setattr__(whole, "config", DecoderConfig(*sizes, names={}))
        assert repr(whole) == (
            "<LanguageModel: 4,900 parameters, 2 layers of width 8, 30 tokens, context 12>"
        )
    elif kind is not Evidence:
        assert "f64[70,70]" in repr(whole)
    assert len(repr(whole)) < 1500


def test_evidence_is_printed_as_its_verdict_and_shown_as_its_table():
    check = Check(1, "faithfulness", "Faithfulness", False, "a bar", text="0.5 is missing")
    found = Evidence({}, [dataclasses.replace(check, arrays={"all": np.zeros(5000)})])
    said = "It is not shown that these components are needed"
    assert repr(found).startswith(f"<Evidence: {said}") and len(repr(found)) < 400
    shown = found._repr_mimebundle_()
    assert "NOT MET" in shown["text/plain"] and "<pre" in shown["text/html"]
