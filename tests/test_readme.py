"""What the README tells a newcomer to type exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmoe_core.config import plugin_names
from vlmoe_core.data.config import DataConfig
from vlmoe_core.data.files import FilesConfig
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import ROUTERS, BalanceConfig, MoEConfig
from vlmoe_core.recipe.tree import plain
from vlmoe_core.recipe.yaml12 import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
EXPERTS = (ROOT / "docs/EXPERTS.md").read_text("utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def typed(program: str) -> list[list[str]]:
    """The commands of a program in the README and in docs/EXPERTS.md, as words."""
    lines = "".join(blocks("sh") + blocks("sh", EXPERTS)).splitlines()
    return [line.split() for line in lines if line.startswith(f"{program} ")]


def test_the_first_blocks_install_and_run_and_test() -> None:
    first, second = blocks("sh")[:2]
    assert "pip install -c constraints.txt -e .\n" in first
    assert first.endswith("vlmoe pretrain recipes/quickstart/pretrain.yaml\n")
    assert second.splitlines()[0] == "pip install -c constraints.txt -e '.[test]'"
    assert second.splitlines()[1].endswith("pytest -n 2")


def test_every_verb_and_option_exists() -> None:
    """Asks each verb for its help, once."""
    commands = typed("vlmoe")
    options = {}
    for words in commands:
        verb = tuple(word for word in words[1:3] if re.fullmatch(r"[a-z]+", word))
        options.setdefault(verb, set()).update(word for word in words if word.startswith("--"))
    assert len(options) > 5
    for verb, used in options.items():
        done = subprocess.run([sys.executable, "-m", "vlmoe_cli", *verb, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, f"README: {' '.join(verb)}: {done.stderr}"
        assert not [option for option in used if option not in done.stdout], f"README: options of {' '.join(verb)}"


def test_the_data_example_is_valid() -> None:
    (text,) = blocks("yaml")
    data = DataConfig.model_validate(plain(parse(text, "README.md"))["data"])
    shown = [source for stream in ("image", "text", "pair") for source in getattr(data.train, stream)]
    assert {source.source for source in shown} == {"image-folder", "tar", "text", "jsonl", "arrow"}
    assert any(isinstance(source, FilesConfig) for source in shown)


@pytest.mark.parametrize("text", blocks("yaml", EXPERTS))
def test_the_examples_of_experts_are_valid(text: str) -> None:
    model = plain(parse(text, "docs/EXPERTS.md"))["model"]
    assert ModelConfig.model_validate({"preset": "base", **model}).pools


def test_docs_name_every_router_and_every_field_of_a_sparse_layer() -> None:
    words = set(re.findall(r"`([\w-]+)`", EXPERTS)) | set(re.findall(r"([\w-]+):", EXPERTS))
    asked = {*plugin_names(ROUTERS.package), *MoEConfig.model_fields, *BalanceConfig.model_fields}
    assert asked - words - {"local_entropy_threshold"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text("utf-8"))
    assert not [link for link in links if not (ROOT / link).exists()]
