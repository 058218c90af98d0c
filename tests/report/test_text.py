"""The page of a language model: planted components in a real browser, and what is refused."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from planted import SIZES, TEXT, WORDS, A, B, C, G, Letters, V, decomposition
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from test_browser import browser, open_page, pytestmark, shows  # noqa: F401
from test_html import embedded

from apd_jax.errors import InputError
from apd_jax.interpretation import qk
from apd_jax.interpretation.effects import effects
from apd_jax.interpretation.harvest import harvest
from apd_jax.interpretation.reading import quantised
from apd_jax.language import DecoderConfig
from apd_jax.language.tokens import Tokens
from apd_jax.report import text, words
from apd_jax.report.source import Source

# Of an attention with one head, whose queries, keys and values were the planted matrix.
DECODER = DecoderConfig(V, V, 1, 1, 1, V // 3, V, 6, {"qkv": "W"}, qkv="packed", rotary=4)


@pytest.fixture(scope="module")
def planted():
    return decomposition()


@pytest.fixture(scope="module")
def found(planted):
    return harvest(planted, TEXT, sizes=SIZES)


@pytest.fixture(scope="module")
def made(planted, found):
    return effects(planted, found)


@pytest.fixture(scope="module")
def page(planted, found, made, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "planted.html"
    return planted.report(path, TEXT[0], WORDS, found, made, DECODER)


def ink(g):
    """From the faintest orange that is seen to the house's own, (230, 159, 0), at 1."""
    return tuple(math.floor(255 + (to - 255) * (0.15 + 0.85 * g) + 0.5) for to in (230, 159, 0))


def colour(element):
    value = element.value_of_css_property("background-color")
    return tuple(float(part) for part in value.strip("rgba()").split(","))[:3]


def at(browser, hash):  # noqa: F811
    browser.execute_script(f"location.hash = '{hash}'")


def loaded(browser, page, hash=""):  # noqa: F811
    open_page(browser, page, hash)
    ready = (By.CSS_SELECTOR, "body[data-ready]")
    WebDriverWait(browser, 10).until(lambda b: b.find_elements(*ready))


def test_opens_from_disk_alone_and_without_errors(browser, page):  # noqa: F811
    loaded(browser, page)
    assert browser.find_element(By.ID, "count").text == "4 of 4 components, 3 ever on"
    rows = browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    assert len(rows) == C and "4 parameter components" in browser.page_source
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if "WillBeSent" in e["method"]]
    asked = [url for url in asked if not url.startswith(("data:", "about:", "blob:"))]
    assert asked == [f"file://{page}"]
    # Strongest first; what is never on comes last.
    first = [row.text.split()[0] for row in rows]
    assert first[0] == "0" and first[-1] == "2"


def test_the_search_finds_words_and_numbers(browser, page):  # noqa: F811
    loaded(browser, page)
    box = browser.find_element(By.ID, "search")
    for asked, count in (("nothing such", "0 of 4 components, 0 ever on"), ("2", "1 of 4")):
        box.clear()
        box.send_keys(asked)
        assert browser.find_element(By.ID, "count").text.startswith(count), asked
    box.clear()
    box.send_keys(WORDS[11])  # the hostile one is text, never markup
    assert browser.find_element(By.ID, "count").text.startswith("3 of 4")
    browser.find_element(By.CSS_SELECTOR, "th[data-column=rate] button").click()
    rates = browser.find_elements(By.CSS_SELECTOR, "#table tbody td:nth-child(3)")
    assert rates[0].text == "100 %"


def test_the_planted_component_is_shown(browser, page, found):  # noqa: F811
    loaded(browser, page, "#component-0")
    lead = browser.find_element(By.CSS_SELECTOR, "#component-page .lead").text
    assert "".join(lead.split()).startswith(f"Fireson{WORDS[A]}andpushesup{WORDS[B]}")
    pushes = browser.find_elements(By.CSS_SELECTOR, "#component-page .list tbody tr")[0].text
    assert pushes.split() == [WORDS[B], "5.5"]  # 6 less the mean, 6 / 12
    for c in (0, 1):
        at(browser, f"#component-{c}")
        shows(browser, "#component-page h1", f"Component {c}")
        for kind, tokens, activity in (
            ("top", found.top_tokens, found.top_activity),
            ("random", found.random_tokens, found.random_activity),
        ):
            lines = browser.find_elements(By.CSS_SELECTOR, f"#component-page .{kind} li")
            assert len(lines) == tokens.shape[1]
            line, there = lines[0], tokens[c, 0] >= 0
            spans = line.find_elements(By.CSS_SELECTOR, ".tok")
            assert [s.text for s in spans] == [WORDS[v] for v in tokens[c, 0][there]]
            for span, g in zip(spans, quantised(activity[c, 0])[there] / 255, strict=True):
                assert colour(span) == (ink(g) if g else (0, 0, 0))  # (0, 0, 0, 0): none
    assert browser.get_log("browser") == []


def test_text_is_read_with_a_chosen_component(browser, page):  # noqa: F811
    loaded(browser, page, "#component-1")
    browser.find_element(By.CSS_SELECTOR, "#component-page button").click()
    shows(browser, ".controls span", "passage 1 of 4")
    spans = browser.find_elements(By.CSS_SELECTOR, "#passage .tok")
    assert [span.text for span in spans] == [WORDS[v] for v in TEXT[0, 0]]
    # The last word of a row predicts nothing: no component is on there.
    levels = quantised(np.append(G[TEXT[0, 0][:-1], 1], 0)) / 255
    assert [colour(s) for s in spans] == [ink(g) if g else (0, 0, 0) for g in levels]
    assert (levels > 0).any()
    browser.find_element(By.ID, "later").click()
    shows(browser, ".controls span", "passage 2 of 4")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#passage .tok")) == 5  # then padding
    first = browser.find_elements(By.CSS_SELECTOR, "#passage .tok")[0]
    first.click()
    on = np.flatnonzero(G[TEXT[0, 1, 0]])
    listed = browser.find_elements(By.CSS_SELECTOR, "#here button")
    assert sorted(int(b.text) for b in listed) == on.tolist()


def test_labels_are_shown_and_found(browser, planted, found, made, tmp_path):  # noqa: F811
    source = Source("labelled", planted, words=words.of(WORDS))
    labels = {0: "a planted bigram", 3: "everywhere <i>"}
    given = text.TextSource(source, found, made, labels, "rules")
    loaded(browser, text.write(tmp_path / "labelled.html", given))
    assert "Labels are by rules." in browser.find_element(By.ID, "components").text
    browser.find_element(By.ID, "search").send_keys("planted bi")
    shows(browser, "#count", "1 of 4 components, 1 ever on")
    shows(browser, "#table tbody td:nth-child(5)", "a planted bigram")
    at(browser, "#component-3")
    shows(browser, "#component-page .lead strong", "everywhere <i>")
    assert browser.get_log("browser") == []


def test_groups_are_shown_and_found(browser, planted, found, made, tmp_path):  # noqa: F811
    path = tmp_path / "grouped.html"
    planted.report(path, None, WORDS, found, made, groups=[4, 1, 4, 1])
    loaded(browser, path)
    browser.find_element(By.CSS_SELECTOR, "th[data-column=group] button").click()
    cells = browser.find_elements(By.CSS_SELECTOR, "#table tbody td:nth-child(5)")
    # 0 is alone, since 2 never fires.
    assert [cell.text for cell in cells] == ["1 of 2", "1 of 2", "", ""]
    browser.find_element(By.LINK_TEXT, "1").click()
    shows(browser, "#component-page h1", "Component 1")
    others = browser.find_elements(By.CSS_SELECTOR, "#component-page .group a")
    assert [link.text for link in others] == ["3"]
    browser.find_element(By.LINK_TEXT, "All 2 of group 1").click()
    shows(browser, "#count", "2 of 4 components, 2 ever on")
    links = browser.find_elements(By.CSS_SELECTOR, "#table tbody td:first-child a")
    assert sorted(link.text for link in links) == ["1", "3"]
    at(browser, "#component-0")
    shows(browser, "#component-page h1", "Component 0")
    assert not browser.find_elements(By.CSS_SELECTOR, "#component-page .group")
    assert browser.get_log("browser") == []


def mixed(element):
    """What the browser made of a mixture of colours, in [0, 255]: color(srgb r g b)."""
    value = element.value_of_css_property("background-color")
    return [255 * float(part) for part in re.findall(r"[\d.]+", value)[:3]]


def tint(level):
    """From white to the house's blue (0, 114, 178) at 1 and its vermilion (213, 94, 0) at -1."""
    part, to = round(100 * abs(level)) / 100, (213, 94, 0) if level < 0 else (0, 114, 178)
    return tuple(255 + (c - 255) * part for c in to)


def test_partners_in_attention_are_shown(browser, page, planted, found):  # noqa: F811
    params, on = planted.problem.params, found.firing_rate > 0
    sides = qk.partners(planted.components, params, DECODER, on)
    for c, count in ((0, 1), (3, 2)):  # 0 writes no query
        loaded(browser, page, f"#component-{c}")
        tables = browser.find_elements(By.CSS_SELECTOR, "#component-page .attention")
        assert len(tables) == count
        for table, side in zip(tables, sides[-count:], strict=True):
            rows = table.find_elements(By.TAG_NAME, "tr")
            there = side.component[c] >= 0
            links = [row.find_element(By.TAG_NAME, "a") for row in rows]
            assert [int(link.text) for link in links] == side.component[c, there].tolist()
            assert "layer 0, head 0" in rows[0].text
            curves = side.values[c, there]
            for row, curve in zip(rows, curves, strict=True):
                cells = row.find_elements(By.CSS_SELECTOR, ".strip i")
                assert len(cells) == DECODER.context == len(curve)
                for cell, value in zip(cells, curve / np.abs(curve).max(), strict=True):
                    assert np.allclose(mixed(cell), tint(round(127 * value) / 127), atol=1)
            assert (curves > 0).any() and (curves < 0).any()  # both colours
        other = links[-1].text
        links[-1].click()
        shows(browser, "#component-page h1", f"Component {other}")
    assert browser.get_log("browser") == []


def test_a_page_says_what_it_left_out(planted, found, made, tmp_path, monkeypatch):
    whole = embedded(planted.report(tmp_path / "a.html", TEXT[0], WORDS, found, made))
    assert whole["top"]["tokens"]["shape"] == [C, 5, 5]
    monkeypatch.setattr(text, "SHOWN", ((16, 8), (2, 1)))
    monkeypatch.setattr(text, "LARGEST_PAGE", 0)
    path = tmp_path / "b.html"
    path.write_text(text.page(text.TextSource(Source("b", planted, TEXT[0]), found, made)))
    assert embedded(path)["top"]["tokens"]["shape"] == [C, 2, 5]
    assert "each has 2 of its 5 strongest contexts" in path.read_text()
    assert "the files of the harvest hold all" in path.read_text()


@pytest.fixture
def sharded(planted, found, made, tmp_path, monkeypatch):
    """A page whose contexts lie beside it, two components in a file."""
    monkeypatch.setattr(text, "LARGEST_PAGE", 0)
    monkeypatch.setattr(text, "SHARD", 2 * (found.top_tokens[0].size + found.random_tokens[0].size))
    return planted.report(tmp_path / "large.html", TEXT[0], WORDS, found, made)


def contexts(browser):  # noqa: F811
    lines = browser.find_elements(By.CSS_SELECTOR, "#component-page .contexts li")
    return [
        (line.text, [colour(s) for s in line.find_elements(By.CLASS_NAME, "tok")]) for line in lines
    ]


def test_contexts_beside_the_page_are_those_within(browser, page, sharded):  # noqa: F811
    files = sorted(sharded.with_name("large.contexts").glob("*.js"))
    assert len(files) == 2 and embedded(sharded)["top"]["tokens"]["shape"] == [C, 2, 5]
    shown = {}
    for path in (page, sharded):
        for c in (0, 3):
            loaded(browser, path, f"#component-{c}")
            wait = WebDriverWait(browser, 10)
            wait.until(lambda b: b.find_element(By.ID, "beside").text == "")
            shown[path, c] = contexts(browser)
        assert browser.get_log("browser") == []
    for c in (0, 3):
        assert shown[page, c] == shown[sharded, c] and len(shown[page, c]) > 3
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if "WillBeSent" in e["method"]]
    assert f"file://{files[1]}" in asked and f"file://{files[0]}" not in asked  # of 3 alone
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "about", "blob"}


def test_the_search_reads_all_contexts(browser, page, sharded):  # noqa: F811
    counts = {page: [], sharded: []}
    for path, found in counts.items():
        loaded(browser, path)
        box = browser.find_element(By.ID, "search")
        for asked in ["".join(WORDS[t] for t in TEXT[0, 0, :3]), *WORDS]:
            box.clear()
            box.send_keys(asked)
            wait = WebDriverWait(browser, 10)
            wait.until(lambda b: "reading" not in b.find_element(By.ID, "count").text)
            found.append(browser.find_element(By.ID, "count").text)
    assert counts[page] == counts[sharded] and len(set(counts[page])) > 1
    assert browser.get_log("browser") == []


def test_missing_files_of_contexts_are_said(browser, sharded):  # noqa: F811
    for file in sharded.with_name("large.contexts").glob("*-0.js"):
        file.unlink()
    loaded(browser, sharded, "#component-0")
    WebDriverWait(browser, 10).until(
        lambda b: "which is missing beside this page" in b.find_element(By.ID, "beside").text
    )
    assert len(browser.find_elements(By.CSS_SELECTOR, "#component-page .top li")) == 2
    at(browser, "#components")
    browser.find_element(By.ID, "search").send_keys(WORDS[A])
    WebDriverWait(browser, 10).until(
        lambda b: b.find_element(By.ID, "count").text.endswith(
            "; 1 of 2 files of contexts are missing beside this page"
        )
    )


def test_files_of_an_earlier_page_go(sharded, planted, found, made, monkeypatch):
    folder = sharded.with_name("large.contexts")
    before = sorted(folder.glob("*.js"))
    planted.report(sharded, TEXT[0], WORDS, found, made)
    assert sorted(folder.glob("*.js")) == before  # the same bytes, the same names
    monkeypatch.undo()
    planted.report(sharded, TEXT[0], WORDS, found, made)
    assert not list(folder.glob("*.js")) and embedded(sharded)["shards"] is None


def test_what_does_not_belong_is_refused(planted, found, made, tmp_path):
    with pytest.raises(InputError, match="of another decomposition"):
        decomposition(scale=2.0).report(tmp_path / "report.html", TEXT[0], WORDS, harvest=found)
    with pytest.raises(InputError, match="passages are tokens"):
        planted.report(tmp_path / "report.html", np.ones((2, 3)), WORDS, found, made)
    for groups in ([0, 1], [0, 1, -1, 0], [0.0, 1.0, 1.0, 0.0]):
        with pytest.raises(InputError, match="a whole number from 0 for each of 4 components"):
            planted.report(tmp_path / "report.html", None, WORDS, found, made, groups=groups)


def test_without_names_and_passages_words_are_numbers(planted, found, tmp_path):
    data = embedded(planted.report(tmp_path / "report.html", harvest=found))
    assert data["passages"] is data["attention"] is None and data["words"] == [
        "",
        *map(str, range(V)),
    ]


def test_the_example_of_the_docs_runs(planted, found, tmp_path, monkeypatch):
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "language.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "harvest.harvest(" in block]
    documents = [row[row >= 0] for row in TEXT.reshape(-1, TEXT.shape[-1])]
    starts = np.cumsum([0, *map(len, documents)])
    held_out = np.arange(len(documents)) < 4
    tokens = Tokens(np.concatenate(documents), starts, held_out, Letters())
    monkeypatch.chdir(tmp_path)
    space = {
        "found": planted,
        "tokens": tokens,
        "model": SimpleNamespace(tokenizer=Letters(), config=DECODER),
    }
    exec(example, space)
    batches = [tokens.rows(8).batch(4, seed=0, step=step) for step in range(5)]
    assert space["seen"].num_tokens == sum((batch[:, 1:] >= 0).sum() for batch in batches)
    data = embedded(tmp_path / "text.html")
    assert data["num_components"] == C and len(data["attention"]) == 2
