"""The page to type into: what it answers, and what it refuses."""

import http.client
import json
import threading

import numpy as np
import pytest
from planted import WORDS, A, G, Letters, V, decomposition

from apd_jax.commands import live
from apd_jax.errors import InputError
from apd_jax.interpretation.reading import quantised


@pytest.fixture(scope="module")
def server():
    answer = live.Answer(decomposition(), Letters(), context=4)
    with live.bound("<p>the page</p>", answer, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """(status, content, headers) of a request as a browser would send it, but for some headers."""
    name = f"127.0.0.1:{server.server_port}"
    given = {"Host": name, "Content-Type": "application/json"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {k: v for k, v in given.items() if v is not None})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content, answer.headers


def typed(text):
    return json.dumps({"text": text}).encode()


def test_the_page_is_served(server):
    status, content, headers = ask(server, "GET", "/")
    assert (status, content) == (200, "<p>the page</p>")
    assert headers["X-Frame-Options"] == "DENY" and "Python" not in headers["Server"]


@pytest.mark.parametrize("text", ["d", "ddaf", "dafgkdafgkd"])
def test_what_is_on_at_every_word(server, text):
    status, content, _ = ask(server, "POST", "/activity", typed(text))
    found, tokens = json.loads(content), Letters().encode(text)
    assert status == 200 and found["words"] == list(text)
    for t, token in enumerate(tokens):
        here = slice(found["starts"][t], found["starts"][t + 1])
        on = np.flatnonzero(G[token])
        assert found["component"][here] == on.tolist()
        assert found["activity"][here] == quantised(G[token, on]).tolist()
    # Rows of 4 tokens hold 3 that another follows.
    assert found["seams"] == list(range(3, len(text), 3))


def test_others_are_refused(server):
    port, good = server.server_port, typed("abc")
    assert ask(server, "POST", "/activity", good, Origin=f"http://localhost:{port}")[0] == 200
    for host in (f"evil.example:{port}", "127.0.0.1", "", f"127.0.0.1:{port}.evil.example"):
        for method in ("GET", "POST"):
            path = "/" if method == "GET" else "/activity"
            status, content, _ = ask(server, method, path, good, Host=host)
            assert status == 403 and "its own name only" in content
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ):
        assert ask(server, "POST", "/activity", good, **headers)[0] == 403


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/../../etc/passwd", "/%2e%2e/config.json", "/?a", "file:///etc"]
)
def test_no_path_is_a_file(server, path):
    assert ask(server, "GET", path)[0] == 404
    assert ask(server, "POST", path, typed("a"))[0] == 404


def test_sizes_and_nonsense(server):
    assert ask(server, "POST", "/activity", b"x", Content_Length="1000000000")[0] == 413
    assert ask(server, "POST", "/activity", b"x", Content_Length="-5")[0] == 411
    for body in (b"", b"[]", b"{}", b'{"text": 5}', b"\xff\xfe", b"[" * 50_000):
        status, content, _ = ask(server, "POST", "/activity", body)
        assert status == 400 and json.loads(content)["error"] == 'send {"text": "..."}.'
    status, content, _ = ask(server, "POST", "/activity", typed(""))
    assert status == 400 and json.loads(content)["error"] == "the text is empty; type some."
    status, content, _ = ask(server, "POST", "/activity", typed("a" * 5000))
    assert status == 400 and "has 5000 tokens; 4096 can be read" in content
    assert ask(server, "PUT", "/")[0] == 501
    assert ask(server, "POST", "/activity", typed("ab"))[0] == 200  # still there


def test_a_taken_port_is_said(server):
    with pytest.raises(InputError, match=rf"port {server.server_port} cannot be used"):
        live.bound("", str, server.server_port)
    assert WORDS[A] == "d" and len(WORDS) == V
