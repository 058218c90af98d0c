"""Model files as they lie on disk: their arrays, what they say of the model, their tokenizer.

Nothing in them is executed: safetensors, GGUF and plain numpy arrays hold no code, and pickles
(`pytorch_model.bin`, numpy's object arrays) are not opened.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from etils import epath

from apd_jax.errors import InputError, first_line
from apd_jax.language import families
from apd_jax.language.decoder import DecoderConfig
from apd_jax.language.tokenizer import Tokenizer
from apd_jax.storage import arrays as arrays_lib

OWN = "apd_jax"  # the model_type of what `save` writes for models without a config.json of theirs


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """What a path holds. source: the content of config.json, or what stands for it."""

    arrays: dict[str, Any]
    config: DecoderConfig
    source: Mapping[str, Any]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()  # why there is no tokenizer


def read(path: epath.Path) -> ModelFiles:
    """A folder in Hugging Face's layout, a GGUF file or a glassllm archive.

    Raises:
      InputError: it is none of these, or damaged.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(f"model {path} does not exist; give a folder, a .gguf or an .npz file.")
    readers = {".gguf": _gguf, ".npz": _npz}
    if path.suffix not in readers:
        raise InputError(
            f"model {path} is neither a folder with config.json and model.safetensors nor a .gguf "
            "or .npz file."
        )
    return readers[path.suffix](path)


def _folder(folder: epath.Path) -> ModelFiles:
    source = read_json(folder / "config.json", "a model's folder needs one")
    arrays: dict[str, Any] = {}
    for file in _shards(folder):
        arrays |= _safetensors(file)
    shapes = {name: tuple(a.shape) for name, a in arrays.items()}
    where = str(folder / "config.json")
    if source.get("model_type") == OWN:
        config = families.of_own(source.get("decoder", {}), where)
    else:
        config = families.of_hugging_face(source, shapes, where)
    path = folder / "tokenizer.json"
    if not path.exists():
        return ModelFiles(arrays, config, source, None, (f"there is no {path}",))
    return ModelFiles(arrays, config, source, Tokenizer.load(path))


def _shards(folder: epath.Path) -> list[epath.Path]:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        places = read_json(index, "").get("weight_map", {})
        files = [folder / name for name in sorted(set(places.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise InputError(
                f"{folder} lacks {len(missing)} of {len(files)} files of weights that its index "
                f"names: {', '.join(missing)}."
            )
        if files:
            return files
    if whole.exists():
        return [whole]
    pickled = " (its pytorch_model.bin is a pickle, which may run code)"
    raise InputError(
        f"{folder} holds no model.safetensors{pickled if any(folder.glob('*.bin')) else ''}; give "
        "the weights as safetensors."
    )


def _safetensors(file: epath.Path) -> dict[str, Any]:
    try:
        return arrays_lib.decode_bytes(file.read_bytes())
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{file} is no whole safetensors file ({first_line(error)}); get it again."
        ) from error


def _npz(path: epath.Path) -> ModelFiles:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # zip, header, dtype, or a pickle
        raise InputError(f"{path} is no plain .npz archive ({first_line(error)}).") from error
    if "__config__" not in arrays:
        raise InputError(f"{path} lacks '__config__', the JSON that says the model's sizes.")
    source = _parsed(str(arrays.pop("__config__")), f"'__config__' in {path}")
    shapes = {name: tuple(a.shape) for name, a in arrays.items()}
    config = families.of_npz(source, shapes, str(path))
    beside = path.with_suffix(".tokenizer.json")
    if not beside.exists():
        return ModelFiles(arrays, config, source, None, (f"there is no {beside}",))
    return ModelFiles(arrays, config, source, Tokenizer.load(beside))


def _gguf(path: epath.Path) -> ModelFiles:
    need("gguf", "read GGUF files")
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except Exception as error:  # a torn file shows in many ways
        raise InputError(
            f"{path} is no whole GGUF file ({type(error).__name__}: {first_line(error)}); get it "
            "again."
        ) from error
    shapes = {name: tuple(a.shape) for name, a in arrays.items()}
    config = families.of_gguf(fields, shapes, str(path))
    source = {"general.architecture": fields.get("general.architecture")}
    try:
        return ModelFiles(arrays, config, source, Tokenizer.from_gguf(fields))
    except InputError as error:
        return ModelFiles(arrays, config, source, None, (str(error).rstrip("."),))


def need(package: str, what: str) -> None:
    """Raises InputError where an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"to {what}, the package {package} is needed: pip install 'apd_jax[language]'."
        )


def read_json(path: epath.Path, why: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: there is none, or it is damaged.
    """
    try:
        return _parsed(path.read_text(), str(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {why}.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}).") from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON ({error}); get it again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{where} must hold an object, but holds a {type(found).__name__}.")
    return found
