"""The planner's page in headless Chromium: its numbers are Python's, its sliders work, anyone can use it."""

import itertools
import math
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parscale.cost import formulas
from parscale.cost.hardware import HARDWARE
from parscale.cost.model import Workload
from parscale.errors import InputError
from parscale.law.fit import fit
from parscale.law.page import to_javascript, write_page
from parscale.law.planner import Budgets, Search, plan
from parscale.law.runs import paper

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
STATE = {"params": 1.6e9, "streams": 8, "batch": 1, "input": 64, "output": 64, "memory_gib": 6.0, "latency_s": 0.04}
STATE |= {"dtype": "bf16", "hardware": "a100-80g", "law": "stack", "accounting": "released", "kv": "own"}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "plan.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, html: Path) -> Iterator[Any]:
    """The page at desktop width; a script error or a request that leaves the file fails the test."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    trouble: list[str] = []
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    opened.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else trouble.append(request.url)
    )
    opened.goto(html.as_uri())
    yield opened
    opened.close()
    assert trouble == []


def test_the_page_is_one_file_that_asks_for_nothing(html: Path) -> None:
    text = html.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "/*FORMULAS*/" not in text
    assert "/*CONSTANTS*/" not in text
    assert [p.name for p in html.parent.iterdir()] == ["plan.html"]
    with pytest.raises(InputError, match=r"name it \.html"):
        write_page(html.with_suffix(".txt"))


def test_formulas_that_are_not_arithmetic_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f(x):\n    for y in x:\n        pass\n    return 1\n")
    module = types.ModuleType("bad")
    module.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    with pytest.raises(ValueError, match="no assignment and no return"):
        to_javascript(module)
    assert "function latency(s, w, m)" in to_javascript(formulas)


@pytest.mark.slow
def test_the_numbers_are_pythons_on_a_grid(page: Any) -> None:
    states = [
        STATE
        | {"params": n, "streams": p, "batch": b, "input": i, "dtype": dtype, "hardware": h, "accounting": a, "kv": kv}
        for (n, i), p, b, (dtype, h), (a, kv) in itertools.product(
            ((3e7, 64), (1.6e9, 512), (1.2e10, 8192)),
            (1, 2, 8, 16),
            (1, 32),
            (("bf16", "a100-80g"), ("int4", "l4"), ("fp32", "rtx4090")),
            tuple(itertools.product(("released", "counted"), ("own", "shared"))),
        )
    ]
    there = page.evaluate("states => states.map(parscale.evaluate)", states)
    law = fit(paper("stack"))
    for state, seen in zip(states, there):
        work = Workload(batch=state["batch"], input=state["input"], accounting=state["accounting"], kv=state["kv"])
        search = Search(law, work, HARDWARE[state["hardware"]], Budgets(1, 1, None), 42e9)
        here = search.row(state["params"], state["streams"], state["dtype"])
        for name in (
            "params",
            "loss",
            "memory_gib",
            "token_latency_s",
            "prefill_s",
            "latency_s",
            "train_flops",
            "two_stage_flops",
        ):
            assert seen[name] == pytest.approx(here[name], rel=1e-12), (name, state)
        assert seen["extrapolated"] == here["extrapolated"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"memory_gib": 20.0, "hardware": "l4", "batch": 64, "input": 1024},
        {"law": "pile", "dtype": "int8", "accounting": "counted"},
    ],
)
def test_the_best_model_is_the_planners(page: Any, change: dict) -> None:
    state = STATE | change
    seen = page.evaluate("state => parscale.recommend(state)", state)
    work = Workload(batch=state["batch"], input=state["input"], accounting=state["accounting"])
    here = plan(
        state["memory_gib"] * 2**30, state["latency_s"], state["hardware"], state["law"],
        dtypes=(state["dtype"],), workload=work, samples=20,
    ).frontier  # fmt: skip
    assert [row["streams"] for row in seen] == [row["streams"] for row in here]
    for there, row in zip(seen, here):
        assert there["loss"] == pytest.approx(row["loss"], rel=1e-9)
        assert there["params"] == pytest.approx(row["params"], rel=1e-9)


@pytest.mark.slow
def test_moving_a_slider_by_key_moves_the_numbers(page: Any) -> None:
    law = fit(paper("stack"))
    page.focus("#streams")
    assert page.text_content("#streams-out") == "8"
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#streams-out") == "7"
    params = page.evaluate("parscale.read().params")
    search = Search(law, Workload(), HARDWARE["a100-80g"], Budgets(1, 1, None), 42e9)
    row = search.row(params, 7, "bf16")
    assert page.text_content("#loss") == f"{row['loss']:.4f}"
    assert page.text_content("#memory-used") == f"{row['memory_gib']:.3f} GiB"
    assert page.text_content("#token-time") == f"{1e3 * row['token_latency_s']:.2f} ms"
    before = page.text_content("#advice")
    page.focus("#memory")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.text_content("#advice") != before
    assert page.get_attribute("#memory", "aria-valuetext").endswith("GiB")


@pytest.mark.slow
def test_taking_the_best_puts_the_sliders_within_the_budget(page: Any) -> None:
    page.select_option("#hardware", "l4")
    page.click("#take")
    state = page.evaluate("parscale.read()")
    best = page.evaluate("parscale.recommend(parscale.read())[0]")
    assert state["streams"] == best["streams"]
    assert (
        math.log10(best["backbone_params"]) - 0.011 < math.log10(state["params"]) <= math.log10(best["backbone_params"])
    )
    assert page.text_content("#caution").startswith("Within the budget")


@pytest.mark.slow
def test_nothing_fits_says_what_would(page: Any) -> None:
    page.evaluate("document.getElementById('memory').value = -1; document.getElementById('latency').value = -0.5")
    page.select_option("#hardware", "cpu")
    assert "Nothing fits. The smallest model" in page.text_content("#advice")
    assert page.is_disabled("#take")


@pytest.mark.slow
def test_every_control_has_a_name_and_every_picture_words(page: Any) -> None:
    controls = page.locator("input, select, button")
    for i in range(controls.count()):
        name = controls.nth(i).evaluate(
            "e => (e.labels && e.labels.length ? e.labels[0].textContent : e.textContent).trim()"
        )
        assert name
    for picture in ("#memory-bars", "#latency-bars", "#contours"):
        assert page.get_attribute(picture, "role") == "img"
        assert len(page.get_attribute(picture, "aria-label")) > 20
    assert page.get_attribute("#advice", "aria-live") == "polite"
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"params", "streams", "dtype", "batch", "input", "hardware", "memory", "latency", "take"} <= set(reached)


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_no_width_scrolls_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
