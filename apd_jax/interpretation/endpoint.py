"""A chat model behind any OpenAI-compatible endpoint, by the standard library alone.

The key is read from the environment, sent in one header, and goes nowhere else: not to the disk,
not into messages, not to another host by a redirection.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from apd_jax.errors import InputError, first_line

log = logging.getLogger(__name__)
_PATH = "/chat/completions"
_HERE = ("localhost", "127.0.0.1", "::1")
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # answers that may be better next time


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **options: Any) -> None:
        """Another host would be given the key."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    url: up to and with /v1, or whole, e.g. "http://localhost:8000/v1". model: its name there.
    key_variable: the environment's variable that holds the key; it may be unset.
    timeout: seconds of one request. tries: of a request in all; between them `pause` seconds, twice
    as many each time, at most a minute, or what the server asks for.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 6
    pause: float = 1.0
    max_tokens: int = 400  # of an answer

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise InputError(
                "the endpoint must be a URL without user and password, e.g. "
                "http://localhost:8000/v1 (the key comes from the environment)."
            )
        if not self.model:
            raise InputError("--model is missing; give the name of the endpoint's model.")
        if parts.scheme == "http" and parts.hostname not in _HERE and self._key():
            raise InputError(
                f"the key in {self.key_variable} would go to {parts.hostname} in clear text; use "
                "https, or unset it."
            )

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        if base.endswith(_PATH):
            return base
        return base + (_PATH if base.endswith("/v1") else "/v1" + _PATH)

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def ask(self, system: str, text: str) -> str:
        """The model's answer, at temperature 0.

        Raises:
          InputError: it refuses, or does not answer within `tries`.
        """
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": text},
            ],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        why = ""
        for turn in range(self.tries):
            answer, why, wait = self._once(json.dumps(body).encode())
            if answer is not None:
                return answer
            if turn + 1 < self.tries:
                wait = min(self.pause * 2**turn, 60.0) if wait is None else wait
                log.info("%s: %s; again in %.3g s", self.address, why, wait)
                time.sleep(wait)
        raise InputError(
            f"{self.address} did not answer in {self.tries} tries ({why}); the same call goes on "
            "from what is there."
        )

    def _once(self, body: bytes) -> tuple[str | None, str, float | None]:
        """(answer, or None; why there is none; how long the server asks to wait)."""
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.address, body, headers)
        opener = urllib.request.build_opener(_NoRedirection)
        try:
            with opener.open(request, timeout=self.timeout) as reply:
                content = json.loads(reply.read())
            return str(content["choices"][0]["message"]["content"] or ""), "", None
        except urllib.error.HTTPError as error:
            with error:
                why = f"HTTP {error.code}, {self._said(error.read(2000))}"
            if error.code not in _AGAIN:
                raise InputError(f"{self.address} refuses: {why}.") from None
            return None, why, _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:  # no connection, or none in time
            return None, self._said(first_line(error).encode()), None
        except (ValueError, KeyError, IndexError, TypeError):
            return None, "an answer that is no chat completion", None

    def _said(self, content: bytes) -> str:
        """What the server said, in a line and without the key."""
        text = " ".join(content.decode(errors="replace").split())[:300]
        key = self._key()
        return text.replace(key, "***") if key else text


def _seconds(header: str | None) -> float | None:
    try:
        return min(max(float(header or ""), 0.0), 600.0)
    except ValueError:  # a date, or nothing
        return None
