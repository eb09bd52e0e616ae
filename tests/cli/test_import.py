"""`vlmoe import`."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from tests.hub.importers.support import encoder_of, vocab_file
from tests.hub.importers.vlmo_reference import Sizes, random_state
from tests.hub.importers.vqkd_reference import Sizes as TokenizerSizes
from tests.hub.importers.vqkd_reference import published_file
from vlmoe_cli.main import main
from vlmoe_core.tokenizers.visual import load_visual_tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as its authors publish it, and its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"state_dict": random_state(Sizes()), "args": argparse.Namespace(lr=1)}, folder / "vlmo.pt")
    return vocab_file(folder, 50).with_name("vlmo.pt")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["import", *arguments])
    return end.value.code, *capsys.readouterr()


def arguments(weights: Path, out: Path) -> list[str]:
    return ["vlmo", str(weights), "--tokenizer", str(weights.with_name("vocab.txt")), "--out", str(out)]


def test_for_people(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments(weights, tmp_path / "m"), "--image-size", "24")
    assert code == 0
    assert re.search(r"keys +\d+ used, 4 unused", out) and re.search(r"tensors +\d+ filled, 1 new", out)
    assert "VLMo hides no patches" in out and "head: VLMo's pooler of the fused [CLS]" in out
    assert "positions resampled from 4 x 4 to 6 x 6 patches" in err
    assert encoder_of(tmp_path / "m").config.image_size == 24


def test_for_machines(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *arguments(weights, tmp_path / "m"), "--json")
    found = json.loads(out)
    assert code == 0 and found["family"] == "vlmo" and found["keys"]["(args)"].startswith("unused")
    assert {key: found[key] for key in ("keys", "tensors", "sha256")} == {
        key: json.loads((tmp_path / "m" / "import.json").read_text())[key] for key in ("keys", "tensors", "sha256")
    }


def test_a_visual_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(published_file(TokenizerSizes()), tmp_path / "vqkd.pth")
    source, target = str(tmp_path / "vqkd.pth"), tmp_path / "tokenizers" / "v"
    code, out, err = run(capsys, "vqkd", source, "--heads", "3", "--out", str(target))
    assert code == 0
    assert re.search(r"visual tokenizer +\S*tokenizers/v", out) and re.search(r"keys +\d+ used, 8 unused", out)
    assert "of the training: its loss, or its teacher" in out and re.search(r"tensors +\d+ filled, 0 new", out)
    assert "tokenizers.visual: {kind: vqkd, load: FOLDER, codebook_size: 40}" in " ".join(err.split())
    assert load_visual_tokenizer(target).codebook_size == 40


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["clip"], 2, "there is no importer for clip; known: beit3, vlmo, beit, bert, vqkd"),
        (["vlmo", "absent.pth"], 2, "absent.pth is no file or folder"),
        (["beit"], 1, "this is another kind of model"),
        (["vqkd"], 2, "--tokenizer: a visual tokenizer keeps its pixels"),
    ],
)
def test_what_can_not_be_is_one_message(
    changed: list[str], code: int, message: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = arguments(weights, tmp_path / "m")
    typed[: len(changed)] = changed
    ended, out, err = run(capsys, *typed)
    assert ended == code and out == "" and message in err
    assert "Traceback" not in err and not (tmp_path / "m").exists()
