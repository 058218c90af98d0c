"""A page to type text into, for this computer alone: behind `python -m apd_jax.serve`.

GET / is the page, POST /activity {"text": ...} says which components are on at every word. Nothing
else is there: no path of a request is ever opened as a file. A request is refused unless its Host
is this server's own name, and what it sends unless it is JSON from this very page: pages of other
sites, which a browser may hold open, reach nothing.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console

from apd_jax.commands import harvest
from apd_jax.commands.runs import restore
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.interpretation.reading import read
from apd_jax.language import Tokenizer
from apd_jax.language.tokens import PAD
from apd_jax.paths import user_path
from apd_jax.report import text, words

LOOPBACK = "127.0.0.1"
MOST_BYTES = 100_000  # of a request
MOST_TOKENS = 4096  # of a text
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
log = logging.getLogger(__name__)


def serve(workdir: epath.PathLike, port: int, console: Console) -> None:
    """Serves a run's page until it is stopped (Ctrl-C).

    Raises:
      InputError: the folder is no run of a language model with a harvest, or the port is taken.
    """
    run, folder = restore(workdir), user_path(workdir)
    source = harvest.page(run, folder, live=True)
    target = harvest.language_target(run, "this page")
    context = target.rows.length
    answer = Answer(source.source.decomposition, target.tokens.tokenizer, context)
    with bound(text.page(source), answer, port) as server:
        console.print(f"Open http://{LOOPBACK}:{server.server_port}/   (Ctrl-C stops it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class Answer:
    """text -> the JSON of what is on at each of its tokens. One at a time.

    The text is cut into rows of `context` tokens, each read by itself, as in training.
    """

    def __init__(self, decomposition: Decomposition, tokenizer: Tokenizer, context: int):
        self.decomposition, self.tokenizer, self.context = decomposition, tokenizer, context
        self.lock = threading.Lock()

    def __call__(self, given: str) -> str:
        """Raises InputError for a text that has no tokens, or too many."""
        tokens, named = self.tokenizer.encode(given), words.of(self.tokenizer)
        if not len(tokens):
            raise InputError("the text is empty; type some.")
        if len(tokens) > MOST_TOKENS:
            raise InputError(f"the text has {len(tokens)} tokens; {MOST_TOKENS} can be read.")
        rows, places = _rows(tokens, self.context)
        with self.lock:
            found = read(self.decomposition, rows)
        assert named is not None
        return text.as_json(found, places, [named(int(t)) for t in tokens])


def _rows(tokens: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B, T] of a text, and the place b·T + t of each of its tokens.

    Only tokens that another follows count, so a row's last one is the next row's first, and at the
    end of the text one stands in. B is a power of two: few programs.
    """
    n, step = len(tokens), T - 1
    count = 1 << (-(-n // step) - 1).bit_length()
    text = np.full(count * step + 1, PAD, np.int32)
    text[: n + 1] = np.append(tokens, tokens[-1])
    rows = text[np.arange(count)[:, None] * step + np.arange(T)]
    return rows, np.arange(n) // step * T + np.arange(n) % step


def bound(page: str, answer: Callable[[str], str], port: int) -> http.server.ThreadingHTTPServer:
    """A server of the page on the loopback address.

    Raises:
      InputError: the port is taken.
    """
    try:
        server = http.server.ThreadingHTTPServer((LOOPBACK, port), _Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} cannot be used ({error}); give another --port.") from None
    server.page, server.answer = page.encode(), answer  # type: ignore[attr-defined]
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Any
    server_version, sys_version = "apd_jax", ""
    timeout = 30  # seconds that a request may take to arrive

    def do_GET(self) -> None:
        if self._is_ours():
            if self.path == "/":
                self._send(200, self.server.page, "text/html; charset=utf-8")
            else:
                self._refuse(404, "there is only the page itself.")

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        if self.path != "/activity":
            return self._refuse(404, "there is only /activity.")
        origin = self.headers.get("Origin", f"http://{self.headers['Host']}")
        is_json = self.headers.get_content_type() == "application/json"
        if origin.removeprefix("http://") not in self._names() or not is_json:
            return self._refuse(403, "only this page may ask, in JSON.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._refuse(411, "how long is the text? Content-Length is missing.")
        if int(length) > MOST_BYTES:
            return self._refuse(413, f"the text is too long; {MOST_BYTES:,} bytes can be read.")
        try:
            given = json.loads(self.rfile.read(int(length)))["text"]
            if not isinstance(given, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._refuse(400, 'send {"text": "..."}.')
        try:
            self._send(200, self.server.answer(given).encode(), "application/json")
        except InputError as error:
            self._refuse(400, str(error))

    def _names(self) -> tuple[str, ...]:
        return tuple(f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost"))

    def _is_ours(self) -> bool:
        """Another name that was made to point here (DNS rebinding) is not."""
        if self.headers.get("Host") in self._names():
            return True
        self._refuse(403, "this server answers to its own name only.")
        return False

    def _refuse(self, status: int, sentence: str) -> None:
        self.close_connection = True
        self._send(status, json.dumps({"error": sentence}).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *of: Any) -> None:
        """Requests are not told one by one."""
