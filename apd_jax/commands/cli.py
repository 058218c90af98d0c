"""What the commands share: refusing a user's mistake in one sentence, and the console."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import flags
from absl import logging as absl_logging
from rich.console import Console

from apd_jax.commands import configs
from apd_jax.errors import InputError, Interrupted
from apd_jax.paths import user_path
from apd_jax.train import parallel


def parse(argv: Sequence[str], config: flags.FlagHolder | None = None) -> list[str]:
    """absl's parser. What config files and overrides raise is the user's to mend: one sentence.

    `configs/NAME.py` is found from any folder: see `commands.configs.found`. A field that may be
    None takes `--config.field=None`, which absl's parser of numbers does not know.
    """
    nothing = [match[1] for arg in argv if (match := re.fullmatch(r"--config\.(.+)=None", arg))]
    given = [
        "--config=" + configs.found(arg[9:]) if arg.startswith("--config=") else arg
        for arg in argv
        if not re.fullmatch(r"--config\.(.+)=None", arg)
    ]
    sys.argv[:] = given  # where ml_collections looks for overrides
    try:
        rest = flags.FLAGS(given)
        if config is not None and config.value is not None:
            _ = config.value.apd  # a file that could not be loaded only says so now
            config.value.update_from_flattened_dict(dict.fromkeys(nothing))
        return rest
    except Exception as error:
        refuse(sentence(error))
        raise


@contextlib.contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Ends the program with status 2 on the user's mistakes.

    After an interruption with the signal's.
    """
    try:
        yield
    except InputError as error:
        refuse(str(error))
    except Interrupted as stop:
        if parallel.is_primary():
            print(
                f"Stopped at step {stop.step}; the checkpoint is saved, and the same command goes "
                "on from there.",
                file=sys.stderr,
            )
        sys.exit(128 + stop.signum)
    except OSError as error:  # a full disk, a folder that may not be written
        what = f"{error.filename} cannot be used" if error.filename else "a file cannot be used"
        refuse(f"{what} ({error.strerror or error}); what was written before is kept.")
    except AttributeError as error:
        if not _of_config(error):
            raise
        refuse(sentence(error))
    except KeyboardInterrupt:  # outside the decomposition itself
        print("Stopped; the same command goes on from what the workdir holds.", file=sys.stderr)
        sys.exit(130)


def _of_config(error: BaseException) -> bool:
    """Whether a config lacks a field that was asked for."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return tb is not None and "ml_collections" in tb.tb_frame.f_code.co_filename


def only_our_messages() -> None:
    """Notes and warnings of this library on stderr, by the first process; of others only errors.

    orbax tells every file that it writes, and prints the tracebacks of what it raises again.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.get_absl_handler().addFilter(_without_traceback)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("apd_jax").setLevel(logging.INFO if parallel.is_primary() else logging.ERROR)


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def keep_programs(workdir: str) -> None:
    """Compiled programs are kept beside the workdir, in .jax_cache.

    The next run of the same shapes then begins at once.
    JAX_COMPILATION_CACHE_DIR names another place, or none if it is empty.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = user_path(workdir).parent / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def make_console() -> Console:
    """Where tables go: as wide as the terminal, or 140 columns in a file.

    Quiet on all processes but the first.
    """
    return Console(width=None if sys.stdout.isatty() else 140, quiet=not parallel.is_primary())


def sentence(error: Exception) -> str:
    """The last line of an error, which is its cause.

    ml_collections puts a traceback before it, and quotes unknown fields its own way.
    """
    text = str(error.args[0] if error.args else error)
    if isinstance(error, KeyError | AttributeError):
        field, near = re.search(r"\w+", text), re.search(r"Did you mean \\?[\"'](\w+)", text)
        meant = f" Did you mean {near[1]!r}?" if near else ""
        return f"the config has no field {field[0] if field else text!r}.{meant}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
    return re.sub(r"^.*?\bapd_jax\.errors\.\w+: ", "", lines[-1])


def refuse(sentence: str) -> None:
    """Ends the program with exit status 2."""
    if parallel.is_primary():  # the others have the same to say
        print(f"apd_jax: {sentence}", file=sys.stderr)
    sys.exit(2)
