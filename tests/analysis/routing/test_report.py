"""The file of a report: whole, small enough, and safe with any text."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.analysis.routing.report_support import (
    Scale,
    cell_of,
    examples_of,
    patches_of,
    silent,
    summary_of,
)
from vlmoe_core.analysis.routing.embed import embedded, plain
from vlmoe_core.analysis.routing.gallery import Gallery, hang
from vlmoe_core.analysis.routing.pictures import LikedPatch
from vlmoe_core.analysis.routing.report import LIMIT, SCRIPTS, TEMPLATE, Row, key_figures, write_report

HOSTILE = "</script><script>window.hacked = 1</script><!--<script><img src=x onerror='window.hacked = 1'>\u2028&amp;"


class Page(HTMLParser):
    """Tags, attributes and the contents of scripts, as a browser's parser finds them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def found(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("report"), hostile=True)


def written(folder: Path, hostile: bool = False) -> Page:
    summary = summary_of()
    name = HOSTILE if hostile else "scenes/{}.png"
    if hostile:
        summary = replace(summary, model=HOSTILE, data=HOSTILE, capacity={HOSTILE: HOSTILE}, group={HOSTILE: 32})
    write_report(summary, folder / "a.html", patches_of(summary, names=[name]), examples_of(Scale(), [name], [HOSTILE]))
    return Page(folder / "a.html")


def test_text_stays_text_whatever_it_holds(page: Page) -> None:
    assert len(page.scripts) == 4 and not page.found("img")
    assert page.text.count(HOSTILE) >= 4  # title, heading, data, capacity
    assert page.data["summary"]["model"] == HOSTILE
    assert page.data["examples"][0]["words"] == [HOSTILE] and page.data["patches"][0]["example"] == HOSTILE


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_values_come_back_and_hold_no_markup(value: Any) -> None:
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text) and text.isascii()


def test_numbers_that_json_can_not_say_are_null() -> None:
    assert plain({"a": [math.nan, math.inf, 1 / 3], "b": (1, None)}) == {"a": [None, None, 0.333333], "b": [1, None]}


def test_nothing_is_asked_of_a_network(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in TEMPLATE.joinpath("report.css").read_text("utf-8")
    assert "url(" not in TEMPLATE.joinpath("report.css").read_text("utf-8")


def test_the_policy_admits_these_scripts_and_no_request(page: Page) -> None:
    (policy,) = [
        one["content"] or "" for one in page.found("meta") if one.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and set(rules) <= {
        "default-src", "script-src", "style-src", "img-src", "base-uri", "form-action",
    }  # fmt: skip
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert set(rules["script-src"].split()) == {f"'sha256-{found}'" for found in hashes}


def test_the_data_are_those_of_the_summary(tmp_path: Path) -> None:
    summary = summary_of()
    expected = plain(summary.as_json())
    found = written(tmp_path).data["summary"]
    for cell, given_cell in zip(found["cells"], summary.cells, strict=True):
        places_PE = np.array(given_cell.places)
        shares_PE = places_PE / places_PE.sum(1, keepdims=True)
        np.testing.assert_allclose(np.array(cell["places"]) / 1000, shares_PE, atol=5.1e-4)
    for cell in (*found["cells"], *expected["cells"]):
        del cell["places"]
    assert found == expected


def test_the_summary_table_says_the_same_as_the_cells(tmp_path: Path) -> None:
    cell = replace(
        summary_of().cells[0], wanted=[60, 30, 10, 0], got=[50, 30, 10, 0], num_experts=4, dead=[3], gini=0.475
    )
    cell = replace(
        cell, information={"place": replace(cell.information["place"], bits=1.5, control=0.25, low=1.2, high=1.3)}
    )
    row = Row.of(cell)
    assert (row.busiest, row.busiest_share, row.told) == (0, 0.6, "place") and cell.dropped == pytest.approx(0.1)
    write_report(replace(summary_of(), cells=[cell]), tmp_path / "a.html")
    text = " ".join(Page(tmp_path / "a.html").text.split())
    assert "10.0 %" in text and "0 60.0 %" in text and "place 1.25 1.20 to 1.30" in text and "0.47" in text
    assert "image: 32 examples" in text and "recipe's micro-batch" in text


def test_the_strongest_information_is_that_over_the_control() -> None:
    found = {name: replace(one, bits=2.0, control=1.9) for name, one in summary_of().cells[0].information.items()}
    found["kind"] = replace(found["kind"], bits=1.0, control=0.2)
    row = Row.of(replace(summary_of().cells[0], information=found))
    assert row.told == "kind"


def test_key_figures_name_the_worst(tmp_path: Path) -> None:
    first, second, *_ = summary_of().cells
    worst = replace(second, wanted=[100, *[0] * 7], got=[40, *[0] * 7], dead=list(range(1, 8)))
    best = replace(first, wanted=[100] * 8, got=[100] * 8, dead=[])
    figures = {figure.name: figure for figure in key_figures([best, worst])}
    assert figures["Choices dropped"].value == "6.7 %"  # 60 of 900
    assert "60.0 %" in figures["Choices dropped"].note and "layer 3" in figures["Choices dropped"].note
    assert figures["Experts without a token"].value == "7"


def test_a_dense_model_gets_one_sentence(tmp_path: Path) -> None:
    write_report(replace(summary_of(), cells=[], comparison=()), tmp_path / "a.html")
    page = Page(tmp_path / "a.html")
    assert "This model is dense" in page.text and "needs JavaScript" not in page.text
    assert len(page.scripts) == 1 and (tmp_path / "a.html").stat().st_size < 50_000
    assert not page.found("table") and [one["id"] for one in page.found("section")] == ["summary"]


def sections(tmp_path: Path, **more: Any) -> list[str | None]:
    write_report(path=tmp_path / "a.html", **more)
    return [one["id"] for one in Page(tmp_path / "a.html").found("section")]


def test_only_sections_with_something_in_them_appear(tmp_path: Path) -> None:
    always = {"summary", "loads", "drops", "depth", "told", "atlas"}
    one_layer = summary_of(Scale(layers=(1,)), compared=False)
    assert set(sections(tmp_path, summary=one_layer)) == always
    everything = summary_of(Scale(top_k=2))
    assert set(sections(tmp_path, summary=everything, examples=examples_of(Scale()))) == always | {
        "pathways", "together", "overlays", "comparison",
    }  # fmt: skip


def test_cells_without_a_token_and_one_expert_are_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lone = cell_of("vlm", "vision", 1, Scale(experts=1), rng)
    write_report(replace(summary_of(), cells=[lone, silent(summary_of().cells[0])]), tmp_path / "a.html")
    page = Page(tmp_path / "a.html")
    assert "no token" in page.text and "NaN" not in page.scripts[0]
    assert page.data["summary"]["cells"][1]["entropy"] is None


def test_names_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    summary = replace(summary_of(), model=name)
    write_report(summary, tmp_path / "a.html", patches_of(summary, 1, [name]))
    assert Page(tmp_path / "a.html").data["patches"][0]["example"] == name


def test_a_report_at_the_limit_is_small_enough_and_says_what_it_left_out(tmp_path: Path) -> None:
    scale = Scale(experts=32, top_k=2, layers=(1, 3, 5, 7, 9, 11), side=24, length=196, tokens=400_000, words=20)
    summary = summary_of(scale, dict.fromkeys(("mlm", "mim", "vlm"), ("vision", "text")))
    assert len(summary.cells) == 36
    patches = patches_of(summary, 1)[:200]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8))
    examples = [replace(one, image=noise.rotate(90 * n)) for n, one in enumerate(examples_of(scale, ["a"] * 4))]
    long = [replace(one, image=None, name="long" * 20_000) for one in examples_of(scale, ["a"] * 100)]
    write_report(summary, tmp_path / "a.html", patches, [*examples, *long])
    text = (tmp_path / "a.html").read_text("utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    assert 0.98 * LIMIT < len(text.encode()) <= LIMIT
    assert [example["picture"] for example in data["examples"][:4]] == [0, 1, 2, 3]
    left_out = 304 - len(data["examples"]) - len(data["patches"])
    assert data["left_out"] == left_out > 0 and f"{left_out} examples and patches are left out" in text


def patch(expert: int, gate: float, shade: int) -> LikedPatch:
    rng = np.random.default_rng(shade)
    crop = Image.fromarray(rng.integers(0, 256, (64, 32, 3), np.uint8))
    return LikedPatch("vlm", 1, expert, gate, "a", 0, crop, (8, 16, 16, 48))


def test_the_surest_patch_of_every_expert_comes_before_any_second_one() -> None:
    patches = [patch(0, 0.9, 0), patch(0, 0.8, 1), patch(0, 0.7, 2), patch(1, 0.2, 3), patch(1, 0.3, 4)]
    order = [(one["expert"], one["gate"]) for one in hang(patches, [], LIMIT).patches]
    assert order == [(0, 0.9), (1, 0.3), (0, 0.8), (1, 0.2), (0, 0.7)]
    whole = len(embedded(vars(hang(patches, [], LIMIT))))
    for room in (0, whole // 3, whole // 2, whole - 1, 2 * whole):
        gallery = hang(patches, [], room)
        kept = [(one["expert"], one["gate"]) for one in gallery.patches]
        assert len(kept) + gallery.left_out == 5
        assert len(embedded(vars(gallery))) <= room + len(embedded(vars(Gallery())))
        assert kept[:2] == order[: min(2, len(kept))]


def test_a_picture_is_stored_once_and_its_box_fits_any_size() -> None:
    gallery = hang([patch(0, 0.9, 7), patch(1, 0.8, 7)], [], LIMIT)
    assert len(gallery.pictures) == 1 and [one["picture"] for one in gallery.patches] == [0, 0]
    assert gallery.patches[0]["box"] == [0.25, 0.25, 0.5, 0.75]
    assert gallery.pictures[0].startswith("data:image/webp;base64,")


def test_every_script_of_the_folder_is_in_the_page() -> None:
    assert {file.stem for file in (TEMPLATE / "js").glob("*.js")} == {*SCRIPTS, "theme"}


def test_landmarks_labels_and_captions(page: Page) -> None:
    assert page.found("html")[0]["lang"] == "en" and page.found("title")
    assert [len(page.found(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.found("a")[0]["href"] == "#main" and page.found("main")[0]["id"] == "main"
    names = {one.get("id") for _, one in page.tags}
    assert all(section["aria-labelledby"] in names for section in page.found("section"))
    assert all((link["href"] or "")[1:] in names for link in page.found("a"))
    assert len(page.found("caption")) == len(page.found("table")) == 1
    assert all("scope" in cell for cell in page.found("th"))
