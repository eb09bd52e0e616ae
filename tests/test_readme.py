"""What the README tells a newcomer to type exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmoe_core.config import plugin_names
from vlmoe_core.data.config import DataConfig
from vlmoe_core.data.files import FilesConfig
from vlmoe_core.data.stream import open_streams
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import ROUTERS, BalanceConfig, MoEConfig
from vlmoe_core.recipe.tree import plain
from vlmoe_core.recipe.yaml12 import parse
from vlmoe_core.tasks.config import TASKS
from vlmoe_core.train.init import load_planned_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
EXPERTS = (ROOT / "docs/EXPERTS.md").read_text("utf-8")
DATA = (ROOT / "docs/DATA.md").read_text("utf-8")
SMALL_SETS = DATA.partition("\n## Small sets\n")[2].partition("\n## ")[0]
SHARED = ROOT.parent / "shared" / "data"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def typed(program: str) -> list[list[str]]:
    """The commands of a program in the README and in docs/EXPERTS.md, as words."""
    lines = "".join(blocks("sh") + blocks("sh", EXPERTS)).splitlines()
    return [line.split() for line in lines if line.startswith(f"{program} ")]


def test_the_first_blocks_install_and_run_and_test() -> None:
    first, second = blocks("sh")[0], next(block for block in blocks("sh") if "[test]" in block)
    assert "pip install -c constraints.txt -e .\n" in first
    assert first.endswith("vlmoe pretrain recipes/quickstart/pretrain.yaml\n")
    assert second.splitlines()[0] == "pip install -c constraints.txt -e '.[test]'"
    assert second.splitlines()[1].endswith("pytest -n 2")


def test_every_verb_and_option_exists() -> None:
    """Asks each verb for its help, once."""
    commands = typed("vlmoe")
    options = {}
    for words in commands:
        verb = tuple(word for word in words[1:3] if re.fullmatch(r"[a-z][a-z-]*", word))
        options.setdefault(verb, set()).update(word for word in words if word.startswith("--"))
    assert len(options) > 5
    for verb, used in options.items():
        done = subprocess.run([sys.executable, "-m", "vlmoe_cli", *verb, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, f"README: {' '.join(verb)}: {done.stderr}"
        assert not [option for option in used if option not in done.stdout], f"README: options of {' '.join(verb)}"


def test_the_data_example_is_valid() -> None:
    text = blocks("yaml")[0]
    data = DataConfig.model_validate(plain(parse(text, "README.md"))["data"])
    shown = [source for stream in ("image", "text", "pair") for source in getattr(data.train, stream)]
    assert {source.source for source in shown} == {"image-folder", "tar", "text", "jsonl", "arrow"}
    assert any(isinstance(source, FilesConfig) for source in shown)


def test_the_finetuning_example_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(blocks("yaml")[1])
    recipe = load_planned_recipe(str(path), model=Path("runs/flickr8k-pretrain")).loaded.recipe
    assert recipe.task is not None
    assert recipe.model.image_size == 480
    assert set(re.findall(r"^\| `(\w+)` \| stream", README, re.MULTILINE)) == set(plugin_names(TASKS))


@pytest.mark.parametrize("text", blocks("yaml", EXPERTS))
def test_the_examples_of_experts_are_valid(text: str) -> None:
    model = plain(parse(text, "docs/EXPERTS.md"))["model"]
    assert ModelConfig.model_validate({"preset": "base", **model}).pools


def data_of(text: str, **fields: str) -> DataConfig:
    return DataConfig.model_validate({**plain(parse(text, "docs/DATA.md"))["data"], **fields})


@pytest.mark.parametrize("text", blocks("yaml", DATA))
def test_the_lines_of_data_sets_are_valid(text: str) -> None:
    train = data_of(text).train
    assert train.image or train.text or train.pair


def test_examples_of_vqa_v2_drop_questions_without_a_listed_answer() -> None:
    """Else training stops at the first of them."""
    examples = [text for page in (README, DATA) for text in blocks("yaml", page) if "v2_mscoco_train2014" in text]
    assert [data_of(text).on_error for text in examples] == ["skip", "skip"]


def test_data_sets_use_every_source_that_reads_published_files() -> None:
    own_data = {"arrow"}
    shown = {word for text in blocks("yaml", DATA) for word in re.findall(r"source: ([\w-]+)", text)}
    assert shown == set(plugin_names("vlmoe_core.data.sources")) - own_data
    assert set(plugin_names("vlmoe_core.data.sources")) - set(re.findall(r"`([\w-]+)`", DATA)) == set()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
@pytest.mark.parametrize("text", [text for text in blocks("yaml", SMALL_SETS) if "easy-vqa" not in text])
def test_the_lines_of_small_sets_open_them(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path))
    data = data_of(text, root=str(SHARED))
    for split in (data.train, data.eval, data.test):
        for stream in open_streams(data, split, seed=0).values():
            assert all(len(source) >= 300 and source[0].name for source in stream.sources)


@pytest.mark.parametrize("code", blocks("python", DATA))
def test_the_program_for_visual_genome_writes_lines(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    regions = [{"image_id": 7, "phrase": "a red card"}, {"image_id": 7, "phrase": " "}]
    Path("region_descriptions.json").write_text(json.dumps([{"id": 7, "regions": regions}, {"id": 8, "regions": []}]))
    exec(code, {})
    (line,) = Path("regions.jsonl").read_text().splitlines()
    assert json.loads(line) == {"image": "7.jpg", "caption": ["a red card"]}


def test_docs_name_every_router_and_every_field_of_a_sparse_layer() -> None:
    words = set(re.findall(r"`([\w-]+)`", EXPERTS)) | set(re.findall(r"([\w-]+):", EXPERTS))
    asked = {*plugin_names(ROUTERS.package), *MoEConfig.model_fields, *BalanceConfig.model_fields}
    assert asked - words - {"local_entropy_threshold"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text("utf-8"))
    assert not [link for link in links if not (ROOT / link).exists()]
