"""A harvest as Parquet files: a row for every component, and one for every window of text."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from apd_jax.errors import InputError, first_line

ABOUT = "harvest.json"
_FILES = {"components": "components.parquet", "contexts": "contexts.parquet"}
_NUMBERS = (
    "num_components",
    "num_tokens",
    "vocab_size",
    "threshold",
    "fingerprint",
    "settings",
)
_WINDOWS = ("top", "random")


def write(path: epath.Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def save(fields: Mapping[str, Any], folder: epath.Path) -> None:
    """The fields of a harvest. Of windows, the rows that there are."""
    about = {name: fields[name] for name in _NUMBERS}
    about["windows"] = {kind: list(fields[f"{kind}_tokens"].shape[1:]) for kind in _WINDOWS}
    arrays = {n: v for n, v in fields.items() if n not in _NUMBERS and not n.startswith(_WINDOWS)}
    C = fields["num_components"]
    tables = {"components": {"component": np.arange(C, dtype=np.int32)} | arrays}
    parts = []
    for kind in _WINDOWS:
        tokens, activity = fields[f"{kind}_tokens"], fields[f"{kind}_activity"]
        component, rank = np.nonzero(tokens[..., tokens.shape[-1] // 2] >= 0)
        here = (component, rank)
        parts.append(
            {
                "component": component.astype(np.int32),
                "kind": np.full(len(component), kind),
                "rank": rank.astype(np.int32),
                "tokens": tokens[here],
                "activity": activity[here],
            }
        )
    tables["contexts"] = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
    for name, table in tables.items():
        write(folder / _FILES[name], encode(table, about))
    write(folder / ABOUT, json.dumps(about, indent=2).encode())


def load(folder: epath.Path) -> dict[str, Any]:
    """The fields that `save` was given.

    Raises:
      InputError: see `harvest.load`.
    """
    if not (folder / ABOUT).exists():
        raise InputError(
            f"{folder} holds no finished harvest; make one, e.g. by python -m apd_jax.main "
            "--mode=harvest --workdir=DIR."
        )
    try:
        about = json.loads((folder / ABOUT).read_text())
        windows, C = about["windows"], about["num_components"]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{folder / ABOUT} is torn ({first_line(error)}); harvest again."
        ) from None
    found = {name: about[name] for name in _NUMBERS}
    components = decode(folder / _FILES["components"], about)
    contexts = decode(folder / _FILES["contexts"], about)
    try:
        if len(components.pop("component")) != C:
            raise ValueError("another number of components")
        found |= components
        for kind in _WINDOWS:
            here = contexts["kind"] == kind
            place = contexts["component"][here], contexts["rank"][here]
            for name, empty in (("tokens", np.int32(-1)), ("activity", np.float32(0))):
                array = np.full((C, *windows[kind]), empty)
                array[place] = contexts[name][here]
                found[f"{kind}_{name}"] = array
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{folder} holds a torn harvest ({first_line(error)}).") from None
    return found


def encode(table: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """A table of columns [n] or [n, width] as Parquet; `about` is kept as its metadata."""
    pa, parquet = package()
    columns = {}
    for name, values in table.items():
        if values.ndim == 2:
            flat = pa.array(values.reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            columns[name] = pa.array(values)
    made = pa.table(columns).replace_schema_metadata({"apd_jax": json.dumps(about)})
    content = io.BytesIO()
    parquet.write_table(made, content, compression="zstd")
    return content.getvalue()


def decode(path: epath.Path, about: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of a Parquet file.

    Raises:
      InputError: it is missing, torn, or of another harvest than `about`.
    """
    pa, parquet = package()
    try:
        made = parquet.read_table(io.BytesIO(path.read_bytes()))
        there = json.loads((made.schema.metadata or {})[b"apd_jax"])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(
            f"{path} is torn or missing ({first_line(error)}); harvest again."
        ) from None
    if there != about:
        raise InputError(
            f"{path} belongs to another harvest than {ABOUT} beside it; harvest again."
        )
    found = {}
    for name, column in zip(made.column_names, made.columns, strict=True):
        whole = column.combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            values = whole.flatten().to_numpy(zero_copy_only=False)
            found[name] = values.reshape(len(column), column.type.list_size)
        else:
            found[name] = whole.to_numpy(zero_copy_only=False)
    return found


def package() -> tuple[Any, Any]:
    """pyarrow and its part for Parquet.

    Raises:
      InputError: it is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            "a harvest is kept as Parquet files, for which pyarrow is needed: "
            "pip install 'apd_jax[language]'."
        ) from None
    return pyarrow, parquet
