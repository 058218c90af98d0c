"""Decompositions on the Hugging Face hub, by the extra `hub`. A folder on disk needs no network."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from jaxtyping import PyTree

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, first_line
from apd_jax.paths import user_path
from apd_jax.storage import folder
from apd_jax.train import parallel

_FILES = ["*.safetensors", "decomposition.json", "README.md"]


def from_pretrained(
    path_or_id: epath.PathLike,
    apply_fn: Callable | None,
    params: PyTree = None,
    sample_fn: Any = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    **functions: Any,
) -> Decomposition:
    """A decomposition from a folder, or, where there is no such folder, from the hub.

    Args:
      path_or_id: a folder that `save` wrote, a workdir of `decompose`, or "owner/name" on the hub.
      apply_fn, params, sample_fn, functions: as of `apd_jax.load`.
      revision: branch, tag or commit on the hub. token: None takes the one of `hf auth login`.
    Raises:
      InputError: neither is there, the extra is missing, or as `apd_jax.load`.
    """
    place = user_path(path_or_id)
    if not place.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        hub = _hub()
        try:
            place = hub.snapshot_download(
                str(path_or_id), revision=revision, token=token, allow_patterns=_FILES
            )
        except Exception as error:  # of the hub, its cache and the network
            raise InputError(
                f"there is no folder {path_or_id}, and the hub gives no such repository "
                f"({first_line(error)}); give a folder of a saved decomposition, or another name."
            ) from error
    return folder.load(place, apply_fn, params, sample_fn, **functions)


def push_to_hub(
    decomposition: Decomposition,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    evidence: Any = None,
    message: str = "A parameter decomposition",
) -> str:
    """Uploads what `save` writes, with its card, into a repository that is made if it is not there.

    Of several processes, every one must call it; 0 uploads.

    Args:
      repo_id: "owner/name". private: of a new repository.
      metrics, evidence: for the card, as of `save`.
    Returns: the address of the repository.
    Raises:
      InputError: the extra is missing, or the hub refuses.
    """
    hub = _hub()
    with tempfile.TemporaryDirectory() as place:
        folder.save(decomposition, place, metrics=metrics, evidence=evidence, repo_id=repo_id)

        def upload() -> None:
            try:
                api = hub.HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=place, commit_message=message)
            except Exception as error:
                raise InputError(
                    f"{repo_id} cannot be written on the hub ({first_line(error)}); log in by hf "
                    "auth login, or give a token that may write there."
                ) from error

        parallel.from_primary(upload)
    return f"https://huggingface.co/{repo_id}"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            "the hub is reached by the package huggingface_hub; install it: pip install "
            "'apd_jax[hub]'."
        ) from None
    return huggingface_hub
