"""Questions with known answers, rules that must be found, and a stand-in for a language model."""

import dataclasses
import http.server
import json
import re
import threading
from typing import ClassVar

import numpy as np
import planted
import pytest

from apd_jax.errors import InputError
from apd_jax.interpretation import harvest as harvest_lib
from apd_jax.interpretation import labels, prompts, questions, rules
from apd_jax.interpretation.endpoint import Endpoint
from apd_jax.interpretation.questions import CHANCE, Window
from apd_jax.interpretation.rules import Rule
from apd_jax.language.tokens import PAD

A = planted.A
KEY = "sk-not-to-be-seen"


def strings(tokens):
    return [" " + planted.WORDS[t] for t in tokens]


@pytest.fixture(scope="module")
def made():
    """(harvest, quiet windows) of the planted network: 0 is on at A, 1 at two tokens, 3 always."""
    found = planted.decomposition()
    sizes = dataclasses.replace(planted.SIZES, num_top=4, num_random=12)
    text = planted.text(12)
    harvest = harvest_lib.harvest(found, iter(text), sizes=sizes)
    quiet = questions.quiet_windows(found, planted.text(12, seed=2), count=20, width=5)
    return harvest, quiet


def test_quiet_windows_are_quiet(made):
    _, quiet = made
    on = planted.G > 0
    for c in range(planted.C):
        windows = quiet[c][quiet[c][:, 2] != PAD]
        assert not any(on[t, c] for t in windows.ravel() if t != PAD)
        assert len(windows) == (0 if c == 3 else 20)  # 3 is on everywhere
    assert (quiet[0] == PAD).any()  # where a row begins or ends


def test_questions_have_the_answers_that_they_say(made):
    harvest, quiet = made
    asked = questions.questions(harvest, quiet, 0)
    assert asked == asked and len(asked.detection) == 2 * len(
        [1 for _, on in asked.detection if on]
    )
    for window, on in asked.detection:
        assert (A in window.tokens) == on and not window.marked.any()
    right = [on for _, on in asked.fuzzing]
    assert sum(right) * 2 == len(right) >= 6
    for window, correct in asked.fuzzing:
        marks = window.tokens[window.marked] == A
        assert marks.all() if correct else not marks.any()
        assert correct or 0 < window.marked.sum() <= (window.tokens == A).sum()
    assert len(asked.intruder) == questions.TRIALS
    for group, at in asked.intruder:
        has = [A in window.tokens for window in group]
        assert has == [i != at for i in range(questions.GROUP)] and group[at].marked.any()
    # What is shown is asked nowhere; the windows that are for rules are not those that are asked.
    shown = {w.tokens.tobytes() for w in asked.shown}
    assert not shown & {w.tokens.tobytes() for w, _ in (*asked.detection, *asked.fuzzing)}
    never = questions.questions(harvest, quiet, 2)
    assert (never.shown, never.detection, never.intruder) == ([], [], [])


def test_who_knows_nothing_is_at_chance(made):
    class Always:
        def detection(self, windows):
            return [1.0] * len(windows)

        fuzzing = detection

        def intruder(self, groups):
            return [[0.2] * 5 for _ in groups]

    asked = questions.questions(*made, 0)
    assert questions.scores(asked, Always()) == pytest.approx(CHANCE)
    # A rule that never fires cannot tell either; that of another component does worse than its own.
    found = questions.scores(asked, Rule())
    assert (found["detection"], found["fuzzing"]) == (0.5, 0.5)
    assert found["intruder"] == pytest.approx(0.2)


def test_the_planted_token_is_the_rule(made):
    found = labels.by_rules(*made, strings)
    rows = {row["component"]: row for row in found["components"]}
    assert sorted(rows) == [0, 1, 3]  # 2 is never on
    assert rows[0]["label"] == f'" {planted.WORDS[A]}"'
    assert [rows[0][kind] for kind in CHANCE] == [1.0, 1.0, 1.0]
    assert rows[1]["label"] == f'" {planted.WORDS[5]}"'  # the stronger of its two
    assert 0.5 < rows[1]["detection"] < 1
    assert [rows[3][kind] for kind in CHANCE] == [None] * 3  # on everywhere: nothing can be asked
    assert found["mean"]["detection"] == pytest.approx((1 + rows[1]["detection"]) / 2)


W = 9


def windows_where(fires, seed=0, count=30):
    drawn = np.random.default_rng(seed).integers(0, 6, (count, W))
    drawn[::3, :3] = PAD  # where a row begins
    return [Window(t, np.asarray([fires(t, i) for i in range(W)])) for t in drawn]


def first(tokens, i):
    """The second token of a row or its first."""
    inside = (tokens[: i + 1] != PAD).sum()
    return tokens[0] == PAD and 0 < inside <= 2


@pytest.mark.parametrize(
    ("fires", "rule", "says"),
    [
        (lambda t, i: t[i] == 4, Rule((4,)), '"t4"'),
        (lambda t, i: i > 0 and t[i - 1] == 2, Rule((2,), behind=1), 'after "t2"'),
        (lambda t, i: i > 0 and (*t[i - 1 : i + 1],) == (1, 3), Rule((1, 3)), '"t1t3"'),
        (
            lambda t, i: i > 1 and (*t[i - 2 : i],) == (1, 3),
            Rule((1, 3), behind=1),
            'after "t1t3"',
        ),
        (first, Rule(first=2), "first 2 tokens"),
    ],
)
def test_rules_are_found(made, fires, rule, says):
    harvest, _ = made
    windows = [w for w in windows_where(fires, count=200) if w.marked.any()]
    quiet = [w for w in windows_where(fires, seed=1) if not w.marked.any()]
    asked = questions.Questions(windows, quiet, [], [], [])
    found = rules.best_rule(harvest, asked, 2)
    assert found == rule
    assert found.says(lambda tokens: [f"t{t}" for t in tokens]) == says
    for window in windows:
        expected = [fires(window.tokens, i) and window.tokens[i] != PAD for i in range(W)]
        np.testing.assert_array_equal(found.fires(window.tokens), expected)


def test_components_that_are_on_at_random_get_no_score(made):
    """The control: rules chosen on noise are at chance on other noise."""
    drawn, rows = np.random.default_rng(0), []
    for _ in range(25):
        tokens = drawn.integers(0, 6, (80, W))
        on = drawn.random((80, W)) < 0.15
        on[::2] = False
        on[1::2, W // 2] = True
        where = {"top": slice(1, 40, 2), "random": slice(41, None, 2)}
        fields = {f"{kind}_tokens": np.stack([tokens[at]] * 4) for kind, at in where.items()}
        fields |= {
            f"{kind}_activity": np.stack([on[at].astype(np.float32)] * 4)
            for kind, at in where.items()
        }
        harvest = dataclasses.replace(made[0], **fields)
        quiet = tokens[None, ::2].copy()
        quiet[..., -1] = PAD  # as quiet_windows leaves it
        asked = questions.questions(harvest, quiet, 0)
        rows.append(questions.scores(asked, rules.best_rule(harvest, asked, 0)))
    for kind, chance in CHANCE.items():
        values = np.array([row[kind] for row in rows])
        error = values.std() / np.sqrt(len(values))
        assert error < 0.05 and abs(values.mean() - chance) < 3.5 * error, kind


# A stand-in that has read the planted network's table, behind HTTP


class StandIn(http.server.BaseHTTPRequestHandler):
    """Answers a request by the next of `failures`, else as one who knows that 0 is on at A."""

    failures: ClassVar[list] = []
    asked: ClassVar[list] = []
    keys: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][1]["content"]
        type(self).keys.append(self.headers["Authorization"])
        if type(self).failures:
            status, content, headers = type(self).failures.pop(0)
        else:
            type(self).asked.append(text)
            said = {"choices": [{"message": {"content": f"Sure: {json.dumps(answer(text))}"}}]}
            status, content, headers = 200, json.dumps(said), {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        pass


def answer(text):
    word = f" {planted.WORDS[A]}"
    lines = [line for line in text.splitlines() if re.match(r"\d+\. |  \(\d\)", line)]
    if "What is the component active on?" in text:
        return {"label": f"the token {word} and nothing else that anybody could see"}
    if "anywhere" in text:
        return {"answers": [int(word in line) for line in lines]}
    if "right" in text:
        return {"answers": [int(f"<<{word}>>" in line.replace(word * 2, word)) for line in lines]}
    groups, found = [], []
    for line in lines:
        if not line.startswith("  "):
            groups.append([])
        else:
            groups[-1].append(line)
    for group in groups:
        found.append(1 + next(i for i, line in enumerate(group) if f"<<{word}" not in line))
    return {"answers": found}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    StandIn.failures, StandIn.asked, StandIn.keys = [], [], []
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


def endpoint(url, **options):
    return Endpoint(url, "stand-in/1", pause=0.01, timeout=5.0, **options)


def test_a_model_that_knows_scores_fully(made, server, tmp_path):
    asked = {"components": [0]}
    found = labels.by_model(*made, strings, endpoint(server), **asked)
    (row,) = found["components"]
    assert row["label"] == "the token d and nothing else that anybody"  # eight words
    assert [row[kind] for kind in CHANCE] == [1.0, 1.0, 1.0]
    said = labels.cost(*made, strings, **asked)
    assert said.num_requests == len(StandIn.asked) == 4
    size = sum(map(len, StandIn.asked)) + 4 * len(prompts.SYSTEM)
    assert said.prompt_tokens == pytest.approx(size / 4, rel=0.1)
    assert set(StandIn.keys) == {f"Bearer {KEY}"}
    path = labels.save(found, tmp_path)
    assert path.name == "labels_stand-in-1.json" and KEY not in path.read_text()
    assert labels.load(path, made[0]) == json.loads(json.dumps(found))
    other = dataclasses.replace(made[0], fingerprint="other")
    with pytest.raises(InputError, match="labels of another decomposition"):
        labels.load(path, other)


def test_it_goes_on_where_it_stopped(made, server, tmp_path, caplog):
    progress = tmp_path / "progress"
    StandIn.failures = [(429, "slow down", {"Retry-After": "0"}), (503, "", {}), (200, "no", {})]
    whole = labels.by_model(*made, strings, endpoint(server), num_workers=1)
    assert not StandIn.failures and len(StandIn.asked) == 9  # 3 is asked for a label alone
    StandIn.asked.clear()

    def stop(row):
        StandIn.failures.extend([(401, f"the key {KEY} is wrong", {})] * 9)

    run = {"progress": progress, "num_workers": 1}
    with pytest.raises(InputError, match=r"refuses: HTTP 401, the key \*\*\* is wrong") as told:
        labels.by_model(*made, strings, endpoint(server), on_row=stop, **run)
    StandIn.failures.clear()
    first = len(StandIn.asked)
    with progress.open("a") as file:
        file.write('{"component": 1, "lab')  # torn by a kill
    again = labels.by_model(*made, strings, endpoint(server), **run)
    assert again == whole and first >= 4
    assert sum("What is the component" in text for text in StandIn.asked[first:]) <= 2
    for text in (str(told.value), progress.read_text(), caplog.text):
        assert KEY not in text
    with pytest.raises(InputError, match="the beginning of other labels"):
        labels.by_model(*made, strings, endpoint(server), seed=1, **run)


def test_answers_that_are_none(made, server, monkeypatch):
    monkeypatch.setattr(f"{__name__}.answer", lambda text: {"answers": [1, 2, 3], "label": "x"})
    found = labels.by_model(*made, strings, endpoint(server), components=[0])
    assert [found["components"][0][kind] for kind in CHANCE] == [None] * 3
    assert found["mean"] == dict.fromkeys(CHANCE)
    assert len(StandIn.asked) == 1 + 2 * 3  # each question twice


def test_endpoints_that_cannot_be_used(server, monkeypatch):
    one = endpoint(server, tries=2)
    StandIn.failures = [(500, "broken", {})] * 2
    with pytest.raises(InputError, match=r"did not answer in 2 tries \(HTTP 500, broken\)"):
        one.ask("", "")
    StandIn.failures = [(307, "", {"Location": "http://example.org"})]
    with pytest.raises(InputError, match="refuses: HTTP 307"):  # the key goes to no other host
        one.ask("", "")
    with pytest.raises(InputError, match="did not answer in 1 tries"):
        endpoint("http://127.0.0.1:9", tries=1).ask("", "")
    with pytest.raises(InputError, match=r"would go to example\.org in clear text"):
        endpoint("http://example.org")
    with pytest.raises(InputError, match="without user and password"):
        endpoint("https://me:secret@example.org")
    with pytest.raises(InputError, match="--model is missing"):
        Endpoint(server, "")
    whole = endpoint(server + "/v1/").address
    assert whole == endpoint(server).address == endpoint(whole).address
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint("http://example.org")  # nothing to hide
