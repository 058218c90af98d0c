"""Paths as users write them."""

from __future__ import annotations

import shlex

from etils import epath

from apd_jax.errors import InputError


def user_path(path: epath.PathLike) -> epath.Path:
    """A path, local or of cloud storage; `~` is the home folder.

    Raises:
      InputError: it is no path.
    """
    try:
        return epath.Path(path).expanduser()
    except TypeError:
        raise InputError(f"a path must be a string or a path; got {path!r}.") from None


def quoted(path: epath.PathLike) -> str:
    """A path as a shell takes it, in quotes where it holds spaces."""
    return shlex.quote(str(path))


def run_folder(path: epath.PathLike) -> epath.Path:
    """The folder of a run that is to be trained.

    Raises:
      InputError: its name holds a character that orbax takes for a pattern: it would write
        checkpoints there, and not find them again.
    """
    folder = user_path(path)
    if bad := [c for c in "[]*?" if c in str(folder.absolute())]:
        raise InputError(
            f"workdir {str(folder)!r} holds {bad[0]!r}, which checkpoints cannot have in their "
            "path; use another name."
        )
    return folder
