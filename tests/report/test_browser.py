"""The pages in a real browser: they open from disk, alone, and compute what Python computes."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_NAMES, get_config, load_golden, make_method
from test_html import EVIDENCE, HOSTILE

from apd_jax import components as components_lib
from apd_jax import targets
from apd_jax.decomposition import Decomposition
from apd_jax.forward import sparse
from apd_jax.network.outputs import outputs
from apd_jax.report import html

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.common import exceptions  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --window-size=1200,1000"
)
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (Debian: chromium chromium-driver)",
)
EQUAL = 1e-5


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@functools.cache
def network(name):
    """(target, params, components, inputs) of a golden file, or of a smoke variant.

    The weights of a smoke variant are shared out at random.
    """
    if name in GOLDEN_NAMES:
        golden = load_golden(name)
        return golden.target, golden.params, golden.components, golden.x
    target = targets.build(get_config(name, "smoke").target, 64)
    params = target.init_fn(jax.random.key(0))
    chosen = components_lib.selected_paths(params, target.select)
    share = {
        name: np.random.default_rng(0).dirichlet(np.ones(4), size=leaf.shape)
        for name, leaf in params.items()
    }  # of every entry
    shared = {
        name: jnp.asarray(np.moveaxis(np.float32(share[name]), -1, 0) * leaf[None], jnp.float32)
        for name, leaf in jax.device_get(params).items()
    }
    components = components_lib.from_materialized(
        {name: shared[name] if name in chosen else None for name in params}
    )
    return target, params, components, target.sample_fn(jax.random.key(2), jnp.zeros((), jnp.int32))


def page(folder, name="tms_5_2", called="run", gate=(), **fields):
    """(path of a report, its decomposition, its inputs)."""
    target, params, components, x = network(name)
    sizes = {"num_components": components.num_components, "batch_size": len(x)}
    method = make_method(**{**sizes, "topk": 1.0, **fields})
    history = [{"step": s, "total": 1.0 / s, "faithfulness": 0.1 / s**2} for s in (10, 20, 30)]
    d = Decomposition(target.problem(params), components, method, history, gate=gate)
    evidence = {**EVIDENCE, "verdict": called}
    source = html.Source(
        called, d, x, target, {"target": {"weights_path": called}}, {"step": 30}, evidence=evidence
    )
    return html.write(folder / "report.html", source), d, x


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The path of a report."""
    path, *_ = page(tmp_path_factory.mktemp("page"))
    return path


def open_page(browser, path, hash=""):
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(f"file://{path}{hash}")


def text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def shows(browser, selector, expected):
    """Waits until it does: the page may still be replacing what was there before the click."""
    passing = [exceptions.StaleElementReferenceException, exceptions.NoSuchElementException]
    wait = WebDriverWait(browser, 10, ignored_exceptions=passing)
    wait.until(
        lambda b: text(b, selector) == expected, message=f"{selector} does not become {expected!r}"
    )


def test_opens_from_disk_alone_and_without_errors(browser, opened, tmp_path):
    open_page(browser, opened)
    assert text(browser, "h1") == "run" and "✓ 1 passed" in text(browser, "#evidence")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")) == 5
    for chart in ("#map-chart", "#sum-charts", "#loss-chart", "#panel"):
        assert browser.find_elements(By.CSS_SELECTOR, f"{chart} svg"), chart
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith(("data:", "about:"))] == [
        f"file://{opened}"
    ]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    browser.save_screenshot(str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_the_table_sorts_by_a_click(browser, opened):
    open_page(browser, opened)

    def column(name):
        index = [
            th.get_attribute("data-column")
            for th in browser.find_elements(By.CSS_SELECTOR, "#table th")
        ].index(name)
        cells = browser.find_elements(By.CSS_SELECTOR, f"#table tbody td:nth-child({index + 1})")
        return [float(cell.get_attribute("data-value")) for cell in cells]

    assert column("damage") == sorted(column("damage"), reverse=True)
    for name, descending in (
        ("component", False),
        ("component", True),
        ("firing", True),
        ("firing", False),
        ("norm-0", True),
    ):
        browser.find_element(By.CSS_SELECTOR, f'#table th[data-column="{name}"] button').click()
        assert column(name) == sorted(column(name), reverse=descending), name
        direction = browser.find_element(
            By.CSS_SELECTOR, f'#table th[data-column="{name}"]'
        ).get_attribute("aria-sort")
        assert direction == ("descending" if descending else "ascending")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#table [aria-sort]")) == 1


def test_a_component_has_its_page(browser, opened):
    open_page(browser, opened, "#component-3")
    assert text(browser, "#component-page h1") == "Component 3"
    assert not browser.find_element(By.ID, "overview-page").is_displayed()
    assert len(browser.find_elements(By.CSS_SELECTOR, "#component-page .inputs li")) == 6
    assert (
        len(browser.find_elements(By.CSS_SELECTOR, "#component-page svg")) >= 4
    )  # changes; weights, reads, writes
    browser.find_element(By.LINK_TEXT, "next").click()
    shows(browser, "#component-page h1", "Component 4")
    browser.find_element(By.LINK_TEXT, "← All components").click()
    assert browser.find_element(By.ID, "overview-page").is_displayed()
    browser.find_element(By.LINK_TEXT, "component 1").click()
    shows(browser, "#component-page h1", "Component 1")
    browser.find_element(By.CSS_SELECTOR, "button.go").click()
    assert browser.execute_script("return apd.panel.state.scales") == [1, 0, 1, 1, 1]
    assert browser.find_element(By.ID, "panel").is_displayed() and browser.get_log("browser") == []


# The live panel


def shown(browser):
    """{series: outputs} as they stand in the panel's table of numbers."""
    return browser.execute_script(
        "const all = (selector) => Array.from(document.querySelectorAll(selector));"
        "const [, ...names] = all('#panel .numbers th').map((th) => th.textContent);"
        "const rows = all('#panel .numbers tbody tr');"
        "const of = (k) => rows.map((row) => Number(row.cells[k + 1].dataset.value));"
        "return Object.fromEntries(names.map((name, k) => [name, of(k)]));"
    )


def equal(given, expected, size=1.0):
    """Up to EQUAL, in units of `size`.

    The page holds its weights in single precision, which is felt where large ones cancel.
    """
    np.testing.assert_allclose(given, np.asarray(expected), rtol=0, atol=EQUAL * size)


def doubled(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64), jnp.float64), tree)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("tms_5_2", "components"),
        ("tms_id", "target"),
        ("resid1_bias_gelu", "target"),
        ("resid2_small", "components"),
        ("gated", "target"),
    ],
)
def test_the_panel_computes_what_python_computes(name, at, browser, tmp_path):
    path, d, x = page(tmp_path, name, attributions_at=at, topk=0.4 if name == "gated" else 1.0)
    open_page(browser, path)
    problem, components = d.problem, d.components
    C, cuts = components.num_components, browser.execute_script("return apd.data.panel.rule.cuts")
    attributions, mask = np.asarray(d.attributions(x)), np.asarray(d.mask(x))
    kept = attributions[mask]
    np.testing.assert_allclose(cuts, np.full(C, kept[kept > 0].min()), rtol=2e-5)
    busy = np.argsort(-attributions.sum(axis=1))[:4]  # four inputs, on which something happens
    x = np.asarray(x)[busy]
    scales = np.random.default_rng(0).uniform(size=(4, C)).astype(np.float32)
    scales[1], scales[2] = 1.0, np.arange(C) % 2

    # The page computes in doubles. In single precision Python itself is off by 2e-5 where biases of
    # 6 cancel.
    with jax.enable_x64(True):
        weights, parts, inputs = doubled(problem.params), doubled(components), doubled(x)

        @jax.jit
        def masked(mask):
            return outputs(sparse.apply(problem.apply_fn, weights, parts, mask, inputs))

        attribute = jax.jit(d.method.attribute(problem))
        attributions = np.sqrt(attribute(parts, weights, inputs, jax.random.key(0)))
        masks = attributions > np.array(cuts)
        target = np.asarray(jax.jit(lambda w: outputs(problem.apply_fn(w, inputs)))(weights))
        sparse_out, edited = (np.asarray(masked(doubled(mask))) for mask in (masks, scales))
    # 1, or the 6 of biases that shut a gate.
    largest = [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(problem.params)]
    size = max(1.0, *largest)
    for b in range(4):
        browser.execute_script(
            "apd.panel.set(arguments[0], arguments[1])", x[b].tolist(), scales[b].tolist()
        )
        out = shown(browser)
        for name, expected in (("target", target), ("sparse", sparse_out), ("edited", edited)):
            equal(out[name], expected[b], size)
        equal(browser.execute_script("return apd.panel.attributions"), attributions[b], size)
        assert browser.execute_script("return apd.panel.mask") == masks[b].astype(int).tolist()
    for one, other in ((target, sparse_out), (target, edited), (sparse_out, edited)):
        assert np.abs(one - other).max() > 100 * EQUAL  # they are not the same numbers thrice


def test_sliders_and_buttons_drive_the_panel(browser, tmp_path):
    path, d, _ = page(tmp_path)
    open_page(browser, path)
    move = (
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('input', {bubbles: true}));"
    )
    x = np.zeros((1, 5), np.float32)
    browser.find_element(By.XPATH, "//*[@id='panel']//button[text()='clear']").click()
    for feature, value in ((2, 0.75), (4, 0.5)):
        browser.execute_script(move, f"#panel [data-input='{feature}']", value)
        x[0, feature] = value
    browser.execute_script(move, "#panel [data-component='1']", 0.25)
    scales = jnp.ones(5).at[1].set(0.25)
    edited = components_lib.weighted_sum(d.components, d.problem.params, scales)
    equal(shown(browser)["edited"], outputs(d.problem.apply_fn(edited, jnp.asarray(x)))[0])
    browser.find_element(By.XPATH, "//*[@id='panel']//button[text()='all off']").click()
    equal(shown(browser)["edited"], jax.nn.relu(d.problem.params["b"]))
    browser.find_element(
        By.XPATH, "//*[@id='panel']//button[starts-with(text(), 'as sparse')]"
    ).click()
    assert shown(browser)["edited"] == shown(browser)["sparse"]


# A threshold of its own for every component: the first two are often passed, the last one never.
LEARNED = {"log_thresholds": jnp.log(jnp.array([0.01, 0.05, 0.2, 0.4, 100.0]))}


@pytest.mark.parametrize(
    "fields",
    [
        {"mask": "topk", "num_always_on": 1},
        {"mask": "threshold", "threshold": 0.2},
        {"mask": "threshold", "threshold": 0.0},
        {"mask": "learned", "threshold": 0.2, "gate": LEARNED},
        {"mask": "learned", "threshold": 0.2, "gate": LEARNED, "num_always_on": 1},
        {"mask": "none"},
    ],
)
def test_masks_of_other_kinds(fields, browser, tmp_path):
    path, d, inputs = page(tmp_path, **fields)
    open_page(browser, path)
    for x in np.asarray(inputs)[:6]:
        browser.execute_script("apd.panel.set(arguments[0], [1, 1, 1, 1, 1])", x.tolist())
        mask = np.asarray(d.mask(jnp.asarray(x[None])))[0]
        assert browser.execute_script("return apd.panel.mask") == mask.astype(int).tolist()
    assert browser.get_log("browser") == []


def test_attributions_that_the_page_does_not_take(browser, tmp_path):
    path, *_ = page(tmp_path, attribution="ablation")
    open_page(browser, path)
    assert set(shown(browser)) == {"target", "edited"} and browser.get_log("browser") == []


# Whoever reads it, on whatever


def test_hostile_names_are_text(browser, tmp_path):
    path, *_ = page(tmp_path, called=HOSTILE)
    for hash in ("", "#component-0"):
        open_page(browser, path, hash)
        assert (
            browser.execute_script("return window.hacked") is None
            and browser.get_log("browser") == []
        )
    open_page(browser, path)
    assert text(browser, "h1") == HOSTILE and HOSTILE in text(browser, ".verdict")


@pytest.mark.parametrize("hash", ["", "#component-0", "#try"])
def test_a_phone_shows_all_without_scrolling_sideways(hash, browser, opened):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        open_page(browser, opened, hash)
        wide = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
        )
        assert wide == [360, 360, 360]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_of_two_runs(browser, tmp_path):
    from test_compare import runs

    from apd_jax.report import compare

    path = compare.write(tmp_path / "compare.html", compare.compare(*runs(tmp_path)))
    open_page(browser, path)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")) == 5
    assert browser.find_elements(By.CSS_SELECTOR, "#cosines svg") and browser.find_elements(
        By.CSS_SELECTOR, "#losses svg"
    )
    assert browser.get_log("browser") == []
