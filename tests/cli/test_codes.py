"""What a person sees of a visual tokenizer: the end of its training, its use, and where it does not belong."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.analysis.codes.support import RECIPE
from tests.train.support import RECIPE as MASKED
from tests.train.support import fresh_process
from vlmoe_cli.codes import code_rows, next_with_codes
from vlmoe_cli.main import main
from vlmoe_cli.progress import LiveProgress, figures_line
from vlmoe_core.analysis.codes import files
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.tokenizers.vqkd import VQKD

CODES = {"codes/used": 0.956, "codes/perplexity": 380.4, "codes/pixel_error": 0.01}
LINE = {"step": 2, "loss/total": 0.2, "loss/teacher": 0.123, **CODES}


def vlmoe(*words: object) -> int:
    """The exit code of a command in this process."""
    fresh_process()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tokenizer in runs/tokens; commands run in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tokens.yaml").write_text(RECIPE)
    (folder / "tiny.yaml").write_text(MASKED)
    Image.new("RGB", (16, 16)).save(folder / "black.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert vlmoe("pretrain", "tokens.yaml") == 0
        yield folder


def test_the_end_of_its_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("pretrain", "tokens.yaml", "--overwrite") == 0
    shown = capsys.readouterr()
    assert "Held-out figures, step 0 to 2" in shown.out
    assert "nats" not in shown.out and "unigram" not in shown.out
    report = json.loads((folder / "runs/tokens/report/codes.json").read_text())
    row = re.search(r"^squared error of a pixel +\S+ +(\S+) +(\S+)$", shown.out, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(report["pixels"]["mse"], rel=1e-3)
    assert float(row[2]) == pytest.approx(report["kmeans"]["mse"], rel=1e-3)
    assert "what the codes tell: runs/tokens/report/codes.json, runs/tokens/report/reconstructions.png" in shown.err
    assert re.search(r"held-out at step 2: teacher .* codes used \d+\.\d%  codes perplexity \d+", shown.err)
    assert "what the experts do" not in shown.err
    assert re.search(r"^next +vlmoe pretrain RECIPE --set tokenizers.visual.kind=vqkd ", shown.out, re.MULTILINE)


def test_what_next_says_works(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlmoe("pretrain", "tokens.yaml", "--resume", "runs/tokens")
    printed = re.search(r"^next +vlmoe pretrain RECIPE (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert printed is not None
    short = ("--set", "train.steps=1", "--set", "optim.warmup_steps=1")
    assert vlmoe("pretrain", "tiny.yaml", *printed[1].split(), *short, "--out", "runs/model") == 0
    predict = ("predict", "masked", "--image", "black.png", "--model", "runs/model")
    assert vlmoe(*predict, "--out", "drawn.png") == 0 and Path("drawn.png").is_file()
    monkeypatch.setattr(VQKD, "draws", property(lambda _: False))  # as with a model as teacher
    capsys.readouterr()
    pair = (*predict, "--text", "a [MASK]")
    assert vlmoe(*pair) == 0
    shown = capsys.readouterr()
    assert "probability" in shown.out and "no picture: the codes" in shown.err and not Path("filled.png").exists()
    assert vlmoe(*pair, "--out", "other.png") == 2
    assert "error: --out other.png: no picture: the codes" in capsys.readouterr().err


def test_a_run_that_is_done_does_not_fail_for_its_report(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Path) -> Sequence[Path]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(files, "report_on", broken)
    assert vlmoe("pretrain", "tokens.yaml", "--out", "runs/again", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["finished"] and found["codes"] == {}
    assert {row["loss"] for row in found["losses"]} == {"teacher", "commitment"}
    again = re.search(r"no report of the codes \(out of memory\); to try again: vlmoe (.*)$", shown.err, re.MULTILINE)
    assert again is not None
    monkeypatch.undo()
    assert vlmoe(*again[1].split()) == 0 and Path("runs/again/report/codes.json").is_file()


def test_it_is_not_taken_for_a_pretrained_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("predict", "masked", "--image", "black.png", "--model", "runs/tokens") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is a visual tokenizer" in said and "--set tokenizers.visual.kind=vqkd" in said


def test_its_export_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("export", "--model", "runs/tokens", "--format", "safetensors", "--out", "exported") == 0
    assert "11 examples in a fresh process: the same bit by bit" in capsys.readouterr().out
    assert Path("exported/visual_tokenizer.json").is_file()


def test_a_line_of_progress() -> None:
    assert figures_line(LINE) == "teacher 0.123  codes used 95.6%  codes perplexity 380  codes pixel error 0.0100"


def test_the_live_table_has_no_empty_column() -> None:
    panel = LiveProgress()
    panel.console = Console(file=StringIO())

    def headings() -> list[str]:
        return [str(column.header) for column in panel._losses(LINE).columns]  # type: ignore[union-attr]

    panel.evaluated(LINE)
    assert headings() == ["loss", "training", "held out"]
    assert "codes used 95.6%" in panel.console.file.getvalue()  # type: ignore[attr-defined]
    panel.evaluated({"loss/mlm": 3.0, "baseline/mlm": 4.0})
    assert headings() == ["loss", "training", "held out", "unigram"]


def test_a_tokenizer_of_the_grid_of_a_shipped_recipe_is_used_with_that(tmp_path: Path) -> None:
    recipe = load_recipe("tokenizer/vqkd-tiny", ("data.root=../my data",)).recipe
    words = shlex.split(next_with_codes(recipe, tmp_path))
    assert words[:5] == ["vlmoe", "pretrain", "flickr8k/pretrain", "--set", "data.root=../my data"]
    used = load_recipe(words[2], words[4::2]).recipe
    assert used.tokenizers.visual.kind == "vqkd" and used.tokenizers.visual.load == str(tmp_path)
    assert used.tokenizers.visual.codebook_size == recipe.tokenizers.visual.codebook_size


def test_without_a_report_there_is_no_column_of_k_means() -> None:
    rows = code_rows(LINE, LINE, {})
    assert [list(row) for row in rows] == [["figure", "before", "after"]] * 4
    rows = code_rows(LINE, LINE, {"kmeans": {"mse": 0.02}})
    assert [row["k-means"] for row in rows] == [None, None, None, 0.02]
