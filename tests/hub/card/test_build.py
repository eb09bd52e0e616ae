"""The model card: what it says is what was measured, and nothing in it can break it."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tests.hub.fake_hub import FakeHub
from tests.hub.runs_support import model_folder
from tests.train.support import RECIPE, tiny, train
from tests.train.tasks_support import finetuned
from tests.train.test_results import REPORT
from vlmoe_core.analysis.routing.files import report_on
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.card.build import build_card, write_card
from vlmoe_core.hub.card.receipts import Exported, Imported, Upcycled
from vlmoe_core.hub.export.run import Receipt as ExportReceipt
from vlmoe_core.hub.importers.receipt import Receipt as ImportReceipt
from vlmoe_core.hub.upcycling.receipt import Receipt as UpcycleReceipt
from vlmoe_core.train.results import save_result
from vlmoe_core.train.trained import load_trained

DATA = "vlmoe scenes (drawn)"
METRICS = {"accuracy": 10.256, "accuracy/number": 50.0, "question/colour": 1.0}
SCRIPT = "a|b<script>alert(1)</script>`x`*y*[z](http://e.org)@me.jsonl"


class Shown(HTMLParser):
    """What a reader of the rendered card sees: its tables by rows of cells, and the tags."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: set[str] = set()
        self.text, self.in_cell = "", False
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells behind a name, of the first table that has it."""
        return next(row[1:] for table in self.tables for row in table if row[0] == name)


def front(card: str) -> dict[str, Any]:
    """The metadata."""
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card[4 : card.index("\n---\n")])
    return found


def shown(card: str) -> Shown:
    return Shown(ModelCard(card).text)


def snippet(card: str) -> str:
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run with its report."""
    folder = tmp_path_factory.mktemp("base")
    run = train(tiny(folder), folder / "run").folder
    report_on(run)
    return run


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned run."""
    return finetuned(tmp_path_factory.mktemp("vqa"), "vqa")


@pytest.fixture
def model(vqa: Path, tmp_path: Path) -> Path:
    """The model folder of the finetuned run, with a result."""
    folder = model_folder(vqa / "checkpoints" / "step-00000004", tmp_path / "model")
    save_result(folder, REPORT | {"metrics": METRICS}, DATA, 4, None)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a recipe alone."""
    found = tmp_path / "alone"
    found.mkdir()
    (found / "recipe.yaml").write_text(RECIPE)
    yield found


def test_the_metadata_is_read_by_the_library_and_by_the_hub(model: Path, hub: FakeHub) -> None:
    text = build_card(model, repo="tester/tiny-vqa", license="mit")
    card = ModelCard(text)
    assert card.data.to_dict() == front(text)
    card.validate()
    assert hub.count("POST", "/api/validate-yaml") == 1
    found = front(text)
    index = found.pop("model-index")
    assert found == {
        "library_name": "vlmoe",
        "license": "mit",
        "pipeline_tag": "visual-question-answering",
        "tags": ["vlmoe", "vision-language", "mixture-of-experts", "vqa"],
    }
    assert index[0]["name"] == "tiny-vqa"
    assert [m["value"] for m in index[0]["results"][0]["metrics"]] == [10.26, 50.0]


def test_a_pretrained_model_has_no_results_in_its_metadata(base: Path) -> None:
    assert front(build_card(base, repo=None)) == {
        "library_name": "vlmoe",
        "pipeline_tag": "feature-extraction",
        "tags": ["vlmoe", "vision-language", "mixture-of-experts"],
    }


@pytest.mark.parametrize("which", ["base", "vqa"])
def test_parameters_are_those_of_the_built_model(which: str, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(which)
    page, objective = shown(build_card(run, repo=None)), load_trained(run).objective
    total = sum(p.numel() for p in objective.parameters())
    idle = sum(p.numel() * 3 // 4 for name, p in objective.named_parameters() if ".experts." in name)
    assert page.row("Parameters, heads included") == [f"{total:,}"]
    assert page.row("of which a token of each modality uses") == [f"{total - idle:,}"]
    assert f"with {total / 1000:.3g}k parameters" in page.text


def test_experts_are_told_by_layer_and_modality(base: Path) -> None:
    page = shown(build_card(base, repo=None))
    ways = "(counted from 0), 1 a token; router softmax; capacity 1.25 in training, dropless in evaluation"
    assert page.row("Experts, vision") == [f"4 in block 1 {ways}"]
    assert page.row("Experts, text") == [f"4 in block 0 {ways}"]


def test_experts_that_were_removed_are_told(folder: Path) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe["model"]["moe"]["text"] |= {"kept_experts": {0: [1, 3]}, "removed": "drop"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = shown(build_card(folder, repo=None))
    assert page.row("Experts, text")[0].endswith(
        "; of these are left 2 in block 0, tokens of the others go past the experts"
    )
    assert "left" not in page.row("Experts, vision")[0]


def test_results_stand_beside_their_baselines_with_intervals(model: Path) -> None:
    page = shown(build_card(model, repo=None))
    assert f"vqa: 28 examples of test (1 broken left out), {DATA}" in page.text
    assert page.tables[0] == [
        ["percent", "this model", "majority"],
        ["accuracy", "10.3 (0.0 to 21.5)", "17.5 (3.5 to 35.0)"],
        ["accuracy/number", "50.0", ""],
    ]
    assert page.tables[1][1:] == [["question/colour", "1.0", ""]]
    assert "Held-out losses" not in page.text


def test_without_a_result_the_last_held_out_line_is_told(base: Path) -> None:
    lines = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if line["split"] == "eval" and line["step"] in (0, 6))
    page = shown(build_card(base, repo=None))
    assert page.row("words of texts") == [
        f"{last['loss/mlm']:.3f}",
        f"{first['loss/mlm']:.3f}",
        f"{first['baseline/mlm']:.3f}",
    ]
    assert page.row("all, weighted") == [f"{last['loss/total']:.3f}", f"{first['loss/total']:.3f}", ""]


def test_an_earlier_checkpoint_is_told_by_the_lines_up_to_it(base: Path) -> None:
    card = build_card(base / "checkpoints" / "step-00000004", repo=None)
    assert "Held-out losses in nats at step 3" in card
    assert shown(card).row("Steps") == ["4 of 6"]


def test_time_and_machine_are_those_of_the_run(base: Path, model: Path) -> None:
    page = shown(build_card(base, repo=None))
    assert re.fullmatch(r"\d+\.\d s from first to last line of the log, \d+\.\d s of it in .*", page.row("Time")[0])
    cores = json.loads((base / "environment.json").read_text())["cores"]
    assert page.row("Hardware")[0].startswith(f"{cores} CPU cores") or "x" in page.row("Hardware")[0]
    (model / "environment.json").write_text('{"cores": 77, "devices": []}')  # of the export, not of the training
    assert "77" not in build_card(model, repo=None)


def test_a_figure_is_shown_where_there_is_one(base: Path, model: Path) -> None:
    assert (base / "report/figures/loads.png").is_file()
    assert "](report/figures/loads.png)" in build_card(base, repo=None)
    assert "![" not in build_card(model, repo=None)
    assert "![" not in build_card(model, repo=None, beside=[base])
    earlier = build_card(base / "checkpoints" / "step-00000004", repo=None)
    assert "by layer (at step 6, not of these weights)." in earlier


def test_a_result_of_another_step_is_told_as_such(model: Path, vqa: Path) -> None:
    save_result(model, REPORT, DATA, 2, None)
    text = build_card(model, repo=None, beside=[vqa])
    assert "model-index" not in front(text)
    page = shown(text)
    assert page.tables[0][0] == ["percent", "step 2", "majority"]
    assert "Not measured on these weights: step 2." in page.text
    assert "Held-out losses and metrics at step 4" in page.text


def test_the_three_lines_load_the_model(model: Path) -> None:
    code = snippet(build_card(model, repo="org/name"))
    assert len(code.splitlines()) == 3 and '"org/name"' in code
    names: dict[str, Any] = {}
    exec(code.replace("org/name", str(model)), names)
    assert names["model"].recipe.task.name == "vqa"


def exported(folder: Path, **changes: Any) -> None:
    size = {"parameters": 100, "bytes": 400}
    (folder / "export.json").write_text(json.dumps({"format": "onnx", "before": size, "after": size} | changes))


def test_an_export_for_transformers_says_how_transformers_loads_it(folder: Path) -> None:
    autos = {"AutoConfig": "c.C", "AutoModel": "m.M", "AutoModelForMaskedLM": "m.N"}
    (folder / "config.json").write_text(json.dumps({"auto_map": autos}))
    exported(folder, format="transformers")
    text = build_card(folder, repo="org/name")
    assert snippet(text).splitlines() == [
        "from transformers import AutoModelForMaskedLM, AutoProcessor",
        'model = AutoModelForMaskedLM.from_pretrained("org/name", trust_remote_code=True)',
        'processor = AutoProcessor.from_pretrained("org/name", trust_remote_code=True)',
    ]
    assert front(text)["library_name"] == "transformers"


@pytest.mark.parametrize(("name", "call"), [("model-pair.onnx", "InferenceSession"), ("model-text.pt2", "load")])
def test_a_graph_says_how_it_is_loaded(folder: Path, name: str, call: str) -> None:
    (folder / name).write_bytes(b"")
    code = snippet(build_card(folder, repo="org/name"))
    ast.parse(code)
    assert len(code.splitlines()) == 3 and name in code and f".{call}(path)" in code


def test_an_export_finds_recipe_and_results_beside_itself(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match=r"has no recipe\.yaml"):
        build_card(out, repo=None)
    text = build_card(out, repo=None, beside=[model])
    assert shown(text).tables[0][1][0] == "accuracy"
    assert "recipe.yaml" not in text and "F32" not in text


def test_a_changed_export_is_not_given_the_results_of_the_model(model: Path) -> None:
    measured = {"name": "accuracy", "examples": 28, "split": "test", "interval": [0.0, 20.0]}
    exported(
        model,
        quantised={"values_quantised": 90, "values_total": 100},
        metric_before=measured | {"value": 10.256},
        metric_after=measured | {"value": 9.5},
        after={"parameters": 60, "bytes": 100},
        options={"dtype": None},
    )
    text = build_card(model, repo=None)
    page = shown(text)
    assert "model-index" not in front(text)
    assert page.tables[0] == [
        ["", "before", "after"],
        ["accuracy", "10.256 (0.000 to 20.000)", "9.500 (0.000 to 20.000)"],
    ]
    assert page.tables[1][0][1] == "before the export"
    assert "90.0 % of the values are int8" in page.text and "60 of 100 parameters" in page.text


def test_an_imported_encoder_says_what_it_is(folder: Path) -> None:
    recipe = yaml.safe_load(RECIPE)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({k: recipe[k] for k in ("model", "tokenizers")}))
    receipt = {"format": 1, "family": "beit", "source": "hf-hub:org/beit-base@main", "sha256": {}, "keys": {}}
    receipt |= {"tensors": {"a": "new: BEiT has no words", "b": "x"}, "notes": ["positions were resampled"]}
    (folder / "import.json").write_text(json.dumps(receipt))
    text = build_card(folder, repo=None)
    page = shown(text)
    assert front(text)["base_model"] == "org/beit-base"
    assert "imported into vlmoe from beit weights" in page.text
    assert "1 tensors are not from there but as initialised: BEiT has no words." in page.text
    assert "Positions were resampled." in page.text
    assert "## Training" not in text and "## Data" not in text and "## Results" not in text


def test_an_upcycled_model_says_so(folder: Path) -> None:
    receipt = {"source": "/home/me/runs/dense/checkpoints/step-00000006", "step": 6, "experts": 8}
    receipt |= {"examples": {"pair": 3, "text": 4}, "difference": {"states": 1.5e-7, "outputs": None}}
    (folder / "upcycle.json").write_text(json.dumps(receipt))
    text = build_card(folder, repo=None)
    assert "became 8 experts" in text and "On 7 examples" in text and "at most 1.5e-07" in text
    assert "/home/me" not in text and "base_model" not in front(text)


@pytest.mark.parametrize("name", ["import.json", "upcycle.json", "export.json", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["{", "[]\n", '{"source": 1}\n'])
def test_a_foreign_file_is_refused_by_name(folder: Path, name: str, content: str) -> None:
    if (name, content) == ("config.json", '{"source": 1}\n'):
        assert build_card(folder, repo=None)
        return
    (folder / name).write_text(content + "\n")
    with pytest.raises(CheckpointError, match=re.escape(str(folder / name))):
        build_card(folder, repo=None)


def nasty(folder: Path) -> str:
    """A card in which every name that others choose is hostile."""
    recipe = yaml.safe_load(RECIPE)
    bad = {"source": "jsonl", "path": f"{folder}/{SCRIPT}", "image_root": str(folder)}
    recipe["data"]["root"], recipe["init"] = str(folder), f"{folder}/runs/a|b\n---\nlicense: gpl"
    recipe["tokenizers"]["text"]["load"] = str(folder / "tokenizer.json")
    recipe["data"]["train"]["pair"] = [bad, {"source": "arrow", "hub": "org/data", "split": "a|b"}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = REPORT | {
        "metrics": {"accuracy": 1.0, "question/<b>|\n---\n'\"": 2.0},
        "baselines": {"ma|jo<i>": {"accuracy": 3.0}},
    }
    (folder / "state.json").write_text(
        json.dumps({"step": 4, "positions": {}, "recipe": "<img src=x>|`a`\n---\n# h1\x00\u202e"})
    )
    save_result(folder, report, f'x: "y"|<b>\n---\n{SCRIPT}', 4, None)
    return build_card(folder, repo=None)


def test_hostile_names_break_neither_table_nor_metadata(folder: Path) -> None:
    text = nasty(folder)
    page = shown(text)
    assert page.tags <= {
        "h1", "h2", "p", "pre", "code", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "a",
        "details", "summary",
    }  # fmt: skip
    assert all(len(row) == len(table[0]) for table in page.tables for row in table)
    assert page.tables[0][0] == ["percent", "this model", "ma|jo<i>"]
    assert page.tables[1][1] == ["question/<b>| --- '\"", "2.0", ""]
    assert ["train", "pair", f"jsonl: {SCRIPT.rpartition('/')[2]}", ""] in page.tables[-1]
    assert page.row("Started from") == ["a|b --- license: gpl"]
    found = front(text)
    assert set(found) == {"library_name", "pipeline_tag", "tags", "model-index", "datasets"}
    assert found["datasets"] == ["org/data"]
    assert found["model-index"][0]["name"] == "<img src=x>|`a` --- # h1"
    assert ModelCard(text).data.to_dict() == found
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[len(front_lines(text))]]


def front_lines(text: str) -> list[str]:
    """The lines in front of the title: metadata, their marks, and an empty one."""
    return text[: text.index("\n# ") + 1].splitlines()


def test_no_path_of_this_machine_is_published(folder: Path, model: Path, base: Path) -> None:
    assert str(folder.parent) not in nasty(folder)
    assert str(model.parent) not in build_card(model, repo=None)
    assert str(base.parent) not in build_card(base, repo=None)


def test_a_model_of_the_hub_is_the_base_model_where_its_weights_were_taken(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE + "init: hf-hub:org/base@v1\n")
    assert front(build_card(folder, repo=None))["base_model"] == "org/base"
    (folder / "recipe.yaml").write_text(RECIPE + "init: hf-hub:org/base@v1\ninit_weights: false\n")
    text = build_card(folder, repo=None)
    assert "base_model" not in front(text)
    assert "with random weights" in shown(text).row("Started from")[0]


def test_only_limits_that_hold_are_told(folder: Path, model: Path) -> None:
    assert "Results are on data of the source that was trained on" in build_card(model, repo=None)
    assert "have a capacity in evaluation" not in build_card(model, repo=None)
    recipe = yaml.safe_load(RECIPE)
    recipe["model"]["moe"]["text"]["eval_capacity_factor"] = 1.5
    recipe["data"]["train"] = {"text": [{"source": "text", "path": "a.txt"}]}
    recipe["batch"] = {"size": {"text": 4}, "micro": {"text": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = build_card(folder, repo=None)
    assert "Experts have a capacity in evaluation too (text 1.5)" in text
    assert "This run had no examples of: image, pair." in text
    assert "drawings" not in text and "Results are on" not in text and "Intervals" not in text


def test_a_card_replaces_a_generated_one_and_no_other(model: Path, base: Path) -> None:
    assert write_card(model, "org/name") == model / "README.md"
    assert write_card(model, "org/other", license="mit").read_text() == build_card(
        model, repo="org/other", license="mit"
    )
    load_trained(model)
    (model / "README.md").write_text("# Mine\n")
    with pytest.raises(UsageError, match="was not generated by vlmoe"):
        write_card(model, None)
    with pytest.raises(UsageError, match="write it beside its run"):
        write_card(base / "checkpoints" / "step-00000006", None)


@pytest.mark.parametrize("wrong", [{"repo": 'a/b"); evil('}, {"repo": None, "license": "My: own\nlicence"}])
def test_what_is_no_name_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build_card(folder, **wrong)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Imported, ImportReceipt), (Upcycled, UpcycleReceipt), (Exported, ExportReceipt)]
)
def test_what_is_read_of_a_receipt_is_what_is_written(ours: Any, theirs: Any) -> None:
    assert {field.name for field in fields(ours)} <= {field.name for field in fields(theirs)}
