"""The report in a real browser: Chromium without a window, driven by Selenium."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.analysis.routing.report_support import Scale, cell_of, examples_of, patches_of, silent, summary_of
from tests.analysis.routing.support import SPECIAL, batch_of, make_samples, plain_patches, planted
from tests.model.support import VOCAB
from vlmoe_core.analysis.routing.api import trace
from vlmoe_core.analysis.routing.pictures import PatchCollector
from vlmoe_core.analysis.routing.report import write_report
from vlmoe_core.analysis.routing.summary import RoutingSummary
from vlmoe_core.analysis.routing.trace import listening

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("needs a browser", allow_module_level=True)
pytest.importorskip("selenium", reason="needs a browser")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

HOSTILE = "</script><img src=x onerror='window.hacked=1'><b>bold</b><!--<script>window.hacked=1</script>"
SCALE = Scale(top_k=2, layers=(1, 3))


class Browser:
    """A page, what it asked for and what it complained of."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads
        self.run = driver.execute_script

    def size(self, width: int, height: int) -> None:
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)

    def prefer(self, scheme: str) -> None:
        """The system's choice of `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        self.size(width, height)
        self.prefer("light")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())

    def until(self, expression: str) -> None:
        """Wait until it is true."""
        WebDriverWait(self.driver, 20, 0.05).until(lambda _: self.run(f"return Boolean({expression})"), expression)

    def see_everything(self) -> None:
        """Scroll to every plot, wait until it is drawn, and to the atlas and the overlays."""
        for number in range(self.run("return document.querySelectorAll('figure > .plot').length")):
            plot = f"document.querySelectorAll('figure > .plot')[{number}]"
            self.run(f"{plot}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
            self.until(f"{plot}.getAttribute('aria-label')")
        for section in ("atlas", "overlays"):
            if self.run("return document.getElementById(arguments[0]) !== null", section):
                self.see(section)

    def see(self, section: str) -> None:
        """Scroll to a section, and wait until something is in it."""
        self.run("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", section)
        self.until(f"document.querySelector('#{section} :is(.js-plotly-plot, .expert, .readout, .said)')")

    def filter(self, section: str, name: str) -> Select:
        return Select(self.find(f"#{section} select[data-filter={name}]"))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector
        )
        return found

    def label(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).getAttribute('aria-label')", selector))

    def requested(self) -> set[str]:
        """Beginnings of all addresses that the page asked for since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return {one["request"]["url"].split(":", 1)[0] for one in asked}

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield Browser(driver, downloads)
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    summary = summary_of(SCALE)
    path = tmp_path_factory.mktemp("report") / "a.html"
    write_report(summary, path, patches_of(summary, 2), examples_of(SCALE))
    return path


LABELS = "return [...document.querySelectorAll('.plot, canvas')].map((one) => one.getAttribute('aria-label'))"


def test_the_whole_page_is_drawn_without_a_request_or_an_error(browser: Browser, report: Path) -> None:
    browser.open(report)
    drawn = "document.querySelectorAll('.js-plotly-plot').length"
    plots = browser.run("return document.querySelectorAll('figure > .plot').length")
    assert plots > 15 and browser.run(f"return {drawn}") < plots / 2  # not before they are seen
    browser.see_everything()
    assert browser.run(f"return {drawn}") > plots - 4  # nothing was dropped in some layers
    assert browser.requested() <= {"file", "data", "blob"}
    assert browser.complaints() == []
    labels = browser.run(LABELS)
    assert len(labels) > plots and all(label.endswith(".") and len(label) > 20 for label in labels)
    assert browser.run("return [...document.querySelectorAll('select, input')].every((one) => one.labels.length)")
    assert browser.run("return [...document.querySelectorAll('img')].every((one) => one.alt)")


def test_a_plot_is_saved_as_a_picture(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.see("loads")
    browser.find("#loads .save").click()
    saved = browser.downloads / "Wanted, by layer.png"
    WebDriverWait(browser.driver, 20, 0.05).until(lambda _: saved.is_file())
    assert Image.open(saved).width > 500 and browser.complaints() == []


def test_markup_in_data_is_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    name = HOSTILE
    summary = summary_of(SCALE, {name: ("vision", "text")})
    cells = [replace(cell, information={name: next(iter(cell.information.values()))}) for cell in summary.cells]
    cells = [
        replace(
            cell, kinds={name: cell.first}, words=[[replace(one, word=name) for one in words] for words in cell.words]
        )
        for cell in cells
    ]
    summary = replace(summary, model=name, data=name, other=name, capacity={name: name}, cells=cells)
    examples = [replace(one, task=name) for one in examples_of(SCALE, [name], [name, name])]
    write_report(summary, tmp_path / "a.html", patches_of(summary, 1, [name]), examples)
    browser.open(tmp_path / "a.html")
    browser.see_everything()
    browser.filter("atlas", "modality").select_by_visible_text("text")
    assert browser.texts("#atlas .words li")[0].startswith(name)
    assert browser.texts("h1") == [name] and browser.texts("#overlays .word") == [name] * 4
    assert name in browser.texts("#drops .legendtext")[0]
    assert name in browser.run("return document.querySelector('#told .plot').getAttribute('aria-label')")
    assert browser.run("return window.hacked ?? null") is None
    assert browser.run("return document.querySelectorAll('img[src=x], main b, svg a').length") == 0
    assert browser.requested() <= {"file", "data", "blob"} and browser.complaints() == []


def test_the_atlas_shows_what_is_chosen(browser: Browser, report: Path) -> None:
    summary = summary_of(SCALE)
    browser.open(report)
    browser.see("atlas")
    assert len(browser.texts("#atlas .expert")) == 8
    browser.filter("atlas", "expert").select_by_visible_text("expert 3")
    assert [text[:8] for text in browser.texts("#atlas .expert h3")] == ["Expert 3"]
    assert browser.run("return document.querySelectorAll('#atlas .crop img').length") == 2
    browser.filter("atlas", "task").select_by_visible_text("mlm")  # has text alone
    assert [option.text for option in browser.filter("atlas", "modality").options] == ["text"]
    browser.filter("atlas", "layer").select_by_visible_text("layer 3")
    (cell,) = [one for one in summary.cells if (one.task, one.layer) == ("mlm", 3)]
    shown = [text.split(" ")[0] for text in browser.texts("#atlas .words li")]
    assert shown == [word.word for word in cell.words[3]]
    share = f"{100 * cell.first[3] / sum(cell.first):.1f} % of first choices"
    assert browser.texts("#atlas .expert header .of") == [share]


def test_the_loads_follow_the_selects_by_keyboard(browser: Browser, report: Path) -> None:
    summary = summary_of(SCALE)
    browser.open(report)
    browser.see("loads")
    browser.find("#loads select[data-filter=task]").send_keys("vlm")
    browser.find("#loads select[data-filter=modality]").send_keys("text")
    browser.find("#loads select[data-filter=layer]").send_keys(Keys.DOWN)
    (cell,) = [one for one in summary.cells if (one.task, one.modality, one.layer) == ("vlm", "text", 3)]
    busiest = max(range(8), key=lambda expert: cell.wanted[expert])
    bars = "#loads figure.whole"
    browser.run("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", bars)
    browser.until(f"(document.querySelector('{bars} .plot').ariaLabel ?? '').includes('layer 3')")
    assert f"vlm, text, layer 3: expert {busiest} is wanted most" in browser.label(f"{bars} .plot")
    heights = browser.run(f"return document.querySelector('{bars} .plot').data.map((trace) => [...trace.y])")
    assert heights == [list(cell.got), [w - g for w, g in zip(cell.wanted, cell.got, strict=True)]]
    browser.find(f"{bars} summary").send_keys(Keys.ENTER)
    browser.until(f"document.querySelector('{bars} table')")
    assert [int(text.replace(",", "")) for text in browser.texts(f"{bars} td:nth-child(2)")] == list(cell.wanted)


def test_an_overlay_is_read_with_the_arrow_keys(browser: Browser, report: Path) -> None:
    example = examples_of(SCALE)[1]
    browser.open(report)
    browser.see("overlays")
    browser.filter("overlays", "example").select_by_index(1)
    canvas = browser.find("#overlays canvas")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    (readout,) = browser.texts("#overlays .readout")
    place = SCALE.side + 1
    told = [
        f"layer {layer.layer} expert {layer.patch_experts[place]}{'' if layer.patch_kept[place] else ' (dropped)'}"
        for layer in example.layers
    ]
    assert readout == f"Row 2, column 2: {', '.join(told)}"
    experts = [int(text) for text in browser.texts("#overlays .sentence:first-of-type small")]
    assert experts[:9] == list(example.layers[0].word_experts)
    assert len(browser.texts("#overlays [data-dropped]")) == 2  # the fifth word, in every layer


PIXELS = """
    const canvas = document.querySelector("#overlays canvas");
    return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
"""


def test_one_expert_is_seen_alone(browser: Browser, report: Path) -> None:
    example = examples_of(SCALE)[0]
    browser.open(report)
    browser.see("overlays")
    before = browser.run(PIXELS)
    browser.find("#overlays .legend button").click()
    assert (
        browser.run("return document.querySelector('#overlays .legend button').getAttribute('aria-pressed')") == "true"
    )
    after = browser.run(PIXELS)
    width, alone = SCALE.side * 36, sorted(set().union(*(layer.patch_experts for layer in example.layers)))[0]
    for place, expert in enumerate(example.layers[0].patch_experts):
        row, column = divmod(place, SCALE.side)
        middle = 4 * ((row * 36 + 4) * width + column * 36 + 18)
        assert (before[middle : middle + 4] == after[middle : middle + 4]) == (expert == alone)


RIGHT_EDGES = """
    const found = document.querySelectorAll(".plot, .expert, .layers, .legend, .filters label");
    return [...found].map((one) => one.getBoundingClientRect().right);
"""


def test_a_phone_does_not_scroll_sideways(browser: Browser, report: Path) -> None:
    browser.open(report, 360, 740)
    browser.see_everything()
    assert browser.run("return document.documentElement.scrollWidth") == 360
    assert max(browser.run(RIGHT_EDGES)) <= 360
    assert browser.complaints() == []


def brightness(browser: Browser, read: str) -> float:
    red, green, blue = browser.run(f"return {read}.match(/\\d+/g).slice(0, 3).map(Number)")
    return float(red + green + blue) / 765


PAGE = "getComputedStyle(document.body).backgroundColor"
PAPER = "document.querySelector('.js-plotly-plot').layout.paper_bgcolor"


def test_dark_follows_the_system_and_the_button_overrules_it(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.see("loads")
    assert brightness(browser, PAGE) > 0.9 and brightness(browser, PAPER) > 0.9
    browser.prefer("dark")
    browser.until("document.getElementById('theme').ariaPressed === 'true'")
    assert brightness(browser, PAGE) < 0.2 and brightness(browser, PAPER) < 0.2
    browser.find("#theme").send_keys(Keys.ENTER)
    assert brightness(browser, PAGE) > 0.9 and brightness(browser, PAPER) > 0.9


def test_the_first_stop_of_the_keyboard_skips_to_the_content(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.find("body").send_keys(Keys.TAB)
    assert browser.run("return document.activeElement.className") == "skip"
    assert browser.find(".skip").rect["x"] >= 0
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.find(".skip").send_keys(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "main"


def unlikely() -> RoutingSummary:
    """One layer that no token came to, a task without a token, a layer of one expert."""
    first, *others = summary_of(SCALE).cells
    silence = [silent(cell) if cell.task == "mlm" else cell for cell in others]
    lone = cell_of("one", "vision", 1, Scale(experts=1), np.random.default_rng(0))
    return replace(summary_of(SCALE), cells=[silent(first), *silence, lone])


def test_unlikely_models_are_drawn_without_an_error(browser: Browser, tmp_path: Path) -> None:
    write_report(unlikely(), tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    browser.see_everything()
    for section in ("loads", "drops", "depth", "told", "atlas"):
        for task in ("mlm", "one"):
            browser.filter(section, "task").select_by_visible_text(task)
            (shown,) = browser.texts(f"#{section}")
            assert "NaN" not in shown and "undefined" not in shown
    browser.filter("loads", "task").select_by_visible_text("mlm")
    assert "No token came to mlm, text, layer 1." in browser.texts("#loads")[0]
    assert browser.complaints() == []


def test_a_dense_report_opens_and_changes_its_theme(browser: Browser, tmp_path: Path) -> None:
    write_report(replace(summary_of(), cells=[], comparison=()), tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    browser.find("#theme").click()
    assert brightness(browser, PAGE) < 0.2
    assert browser.complaints() == [] and "This model is dense" in browser.texts("main")[0]
    assert browser.find("#summary").rect["width"] > 1000


def test_a_large_report_opens_fast(browser: Browser, tmp_path: Path) -> None:
    scale = Scale(experts=32, layers=(1, 3, 5, 7, 9, 11), side=14, length=64)
    write_report(summary_of(scale), tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    browser.until("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
    assert browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 3000


def planted_report(what: str, folder: Path) -> Path:
    """The report on a router that chooses by word, place or colour."""
    encoder = planted(what)
    colour_XP = np.random.default_rng(0).integers(0, 3, (12, encoder.config.num_patches))
    pictures = plain_patches(colour_XP, encoder.config)
    with torch.no_grad(), trace(encoder, special=SPECIAL) as found:
        patches = PatchCollector(found)
        encoder(batch_of("text", make_samples("text", [24] * 40, encoder.config), encoder.config))
        with listening(encoder, patches.receive):
            encoder(batch_of("image", pictures, encoder.config))
    words = [f"word{number}" for number in range(VOCAB)]
    summary = replace(summary_of(SCALE), cells=found.summary(words), other=None, comparison=())
    path = folder / f"{what}.html"
    write_report(summary, path, patches.liked())
    return path


def test_a_planted_word_is_seen(browser: Browser, tmp_path: Path) -> None:
    browser.open(planted_report("word", tmp_path))
    browser.see("atlas")
    browser.filter("atlas", "task").select_by_visible_text("mlm")
    for expert in range(3):
        browser.filter("atlas", "expert").select_by_visible_text(f"expert {expert}")
        words = [re.match(r"word(\d+)", text) for text in browser.texts("#atlas .words li")]
        assert len(words) > 5 and all(word and int(word[1]) % 3 == expert for word in words)


def test_a_planted_place_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The expert of a place has all of its tokens, and the summary calls place what is told most."""
    browser.open(planted_report("place", tmp_path))
    browser.see("atlas")
    assert "for 100" in browser.label("#atlas .expert canvas, #atlas .expert [aria-label^=Where]")
    assert any("place" in row and "mim" in row for row in browser.texts("#summary tbody tr"))


COLOURS = """return [...document.querySelectorAll('#atlas .crop')].map((crop) => {
  const [picture, box] = ['img', '.box'].map((one) => crop.querySelector(one));
  const canvas = document.createElement('canvas');
  const size = [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  canvas.getContext('2d').drawImage(picture, 0, 0);
  const [x, y] = [['Left', 'Width'], ['Top', 'Height']].map(([start, length], axis) => Math.floor(
    (box[`offset${start}`] + box[`offset${length}`] / 2) / picture[`client${length}`] * size[axis]));
  const colour = [...canvas.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)];
  return colour.indexOf(Math.max(...colour));
})"""
"""Which of red, green and blue is strongest in the middle of each patch that is shown."""


def test_a_planted_colour_is_seen(browser: Browser, tmp_path: Path) -> None:
    browser.open(planted_report("colour", tmp_path))
    browser.see("atlas")
    browser.filter("atlas", "task").select_by_visible_text("mim")
    for expert in range(3):
        browser.filter("atlas", "expert").select_by_visible_text(f"expert {expert}")
        browser.until("[...document.querySelectorAll('#atlas .crop img')].every((one) => one.naturalWidth)")
        assert browser.run(COLOURS) == [expert] * 8
