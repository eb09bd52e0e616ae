"""`vlmoe data index | check | tokenize`."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from vlmoe_cli.main import main

RECIPE = """
model: {layers: 1, dim: 16, heads: 2, hidden: 16, vl_layers: 1, patch_size: 8, image_size: 16, max_text_length: 24}
tokenizers: {text: {vocab_size: 100}}
data:
  max_text: {text: 24, pair: 6}
  train: {pair: [{source: jsonl, path: captions.jsonl}]}
  eval: {text: [{source: text, path: text.txt}]}
objective: {name: masked}
batch: {size: {pair: 4}, micro: {pair: 2}}
train: {steps: 5}
"""


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 captioned pictures, of which 12 are broken; 10 documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path / "cache"))
    Path("my.yaml").write_text(RECIPE)
    Path("text.txt").write_text("Dogs run and cats sleep.\n" * 10)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    for i in range(20):
        Path(f"{i}.png").write_bytes(buffer.getvalue() if i < 8 else b"no picture")
    lines = [{"image": f"{i}.png", "caption": "a dog" + " runs" * (i % 2 * 10)} for i in range(20)]
    Path("captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["data", *arguments])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_index(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "index", "my.yaml")
    assert code == 0 and "WordPiece fitted" in err
    assert out.splitlines()[:3] == [
        "split  stream  source                examples",
        "train  pair    jsonl captions.jsonl  20",
        "eval   text    text text.txt         10",
    ]
    assert out.endswith(f"index caches: {tmp_path / 'cache'}\n") and list((tmp_path / "cache").rglob("*.npz"))
    document = json.loads(run(capsys, "index", "my.yaml", "--json")[1])
    assert document["cache"] == str(tmp_path / "cache") and document["sources"][0]["examples"] == 20


def test_broken_examples_fail_the_check_unless_they_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "my.yaml", "--out", "sheets")
    assert code == 1 and "error: broken examples: 12, the first: captions.jsonl:9: not a picture" in err
    assert "contact sheet: sheets/my-contact-sheet.png" in out
    code, out, err = run(capsys, "check", "my.yaml", "--out", "sheets", "--set", "data.on_error=skip")
    assert code == 0 and "error" not in err and Path("sheets/my-contact-sheet.png").is_file()
    lines = out.splitlines()
    assert "train  pair    jsonl captions.jsonl  20        20    12" in lines
    assert any(line.startswith("train  pair") and line.endswith("50.0%") for line in lines)
    start = lines.index("broken examples, the first 10")
    assert [line.partition(":")[0] for line in lines[start + 1 : start + 11]] == ["captions.jsonl"] * 10
    assert lines[start + 11] == ""


def test_machines_get_every_broken_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "my.yaml", "--json", "--set", "data.on_error=skip")
    document = json.loads(out)
    assert code == 0 and document["broken"] == 12 and document["contact_sheet"] == "my-contact-sheet.png"
    pair, text = document["sources"]
    assert len(pair["broken"]) == 12 and pair["image"]["median"] == [20, 10] and pair["text"]["cut"] == 0.5
    assert text["broken"] == [] and text["image"] is None and "reading 20 of 20" in err


def test_limit(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "my.yaml", "--limit", "1")
    assert code == 0 and "train  pair    jsonl captions.jsonl  20        1     0" in out
    code, out, err = run(capsys, "check", "my.yaml", "--limit", "0")
    assert (code, out) == (2, "") and "greater than or equal to 1" in err


def test_a_missing_source_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("index", "check"):
        code, out, err = run(capsys, verb, "my.yaml", "--set", "data.eval.text.0.path=absent.txt")
        assert (code, out) == (1, "") and "error: nothing matches 'absent.txt'" in err.splitlines()[-1]


SMALL = (
    "--set", "data.on_error=skip", "--set", "tokenizers.visual.codebook_size=2", "--set", "train.eval_examples=4",
    "--set", "optim.warmup_steps=1",
)  # fmt: skip


def test_tokenize(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tokenize", "my.yaml", *SMALL)
    assert (code, out.splitlines()[:3]) == (
        0,
        ["stored tokens", "split  stream  positions  files", "train  pair    20         1"],
    )
    assert out.splitlines()[-1] == "20 positions, 12 of them broken: --set tokenizers.visual.tokens=tokens/my"
    assert "tokens to store: 20 positions" in err and "train-pair: 20 of 20 positions are stored" in err
    assert "expected time: about" in err and Path("tokens/my/tokens.json").is_file()
    code, out, err = run(capsys, "tokenize", "my.yaml", "--json", *SMALL, "--set", "tokenizers.visual.tokens=tokens/my")
    document = json.loads(out)
    assert code == 0 and "nothing to do" in err and document["shards_written"] == 0
    assert (document["folder"], document["positions"], document["broken"]) == ("tokens/my", 20, 12)
    assert document["parts"] == [{"split": "train", "stream": "pair", "positions": 20, "files": 1}]


def test_tokenize_takes_a_folder_and_refuses_another_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "tokenize", "my.yaml", *SMALL, "--out", "here")[0] == 0
    assert Path("here/train-pair-00000.safetensors").is_file() and not Path("tokens").exists()
    code, out, err = run(capsys, "tokenize", "my.yaml", *SMALL, "--out", "here", "--set", "train.steps=6")
    assert (code, out) == (2, "") and "error: here was begun for another run: parts 20 positions" in err
    code, out, err = run(capsys, "tokenize", "my.yaml", "--set", "tokenizers.visual.codebook_size=2")
    assert (code, out) == (1, "") and "error: captions.jsonl:" in err


def test_tokenize_interrupted_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmoe_core.train.tokenize.write_shard", interrupted)
    code, out, err = run(capsys, "tokenize", "my.yaml", *SMALL, "--set", "data.workers=0")
    assert (code, out) == (130, "") and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; the same command goes on with the files that are missing in tokens/my"
