"""A trained visual tokenizer on the Hub, as an export, and where it is taken for a model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.analysis.codes.support import CODES, random_images, random_tokenizer, tokenizer_run
from tests.analysis.codes.support import RECIPE as TOKENS
from tests.hub.fake_hub import FakeHub
from tests.train.support import RECIPE, metrics, tiny, train
from vlmoe_core.analysis.codes.files import report_on
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.card.build import build_card
from vlmoe_core.hub.contents import Contents, plan_push
from vlmoe_core.hub.export.request import make_request
from vlmoe_core.hub.export.run import export
from vlmoe_core.hub.push import PushRequest, push
from vlmoe_core.hub.upcycling.recipe import Asked
from vlmoe_core.hub.upcycling.upcycle import upcycle
from vlmoe_core.hub.upcycling.weights import Ways
from vlmoe_core.train.init import load_planned_recipe, load_run_recipe
from vlmoe_core.train.trained import load_finetuned, load_trained
from vlmoe_core.train.visual import find_visual_tokenizer

IMAGES = random_images(5)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report."""
    run = tokenizer_run(tmp_path_factory.mktemp("tokens"))
    report_on(run)
    return run


def codes_of(spec: object) -> torch.Tensor:
    return find_visual_tokenizer(str(spec)).encode(IMAGES)


def asked(out: Path, **changed: Any) -> Any:
    words: dict[str, Any] = {"format": "safetensors", "out": out, "removed": "next", "visual": True}
    words |= dict.fromkeys(("dtype", "quantize", "modality", "experts", "data", "max_shard_size"))
    return make_request(**{**words, **changed})


def test_a_pushed_run_is_a_tokenizer_for_others(hub: FakeHub, tokens: Path, tmp_path: Path) -> None:
    push(tokens, PushRequest("org/tokens"))
    found = codes_of("hf-hub:org/tokens")
    assert torch.equal(found, codes_of(tokens)) and len(found.unique()) > 1
    words = f"tokenizers.visual={{kind: vqkd, load: hf-hub:org/tokens, codebook_size: {CODES}}}"
    run = train(tiny(tmp_path, "train.steps=1", "optim.warmup_steps=1", words), tmp_path / "model").folder
    assert torch.equal(codes_of(run), found)  # it travels in every checkpoint of a model
    sent = {file.path for file in plan_push(run)}
    assert {"tokenizers/visual/visual_tokenizer.json", "tokenizers/visual/visual_tokenizer.safetensors"} <= sent
    assert "pretrained with vlmoe on these streams: image, text, pair" in build_card(run, repo=None)


def test_its_pictures_are_sent_only_when_asked(tokens: Path) -> None:
    def sent(contents: Contents) -> set[str]:
        return {file.path for file in plan_push(tokens, contents) if file.path.startswith("report/")}

    assert sent(Contents()) == {"report/codes.json"}
    assert sent(Contents(with_images=True)) == {"report/codes.json", "report/reconstructions.png"}


def test_the_card_says_what_it_is_and_how_it_is_used(tokens: Path) -> None:
    card = build_card(tokens, repo="org/tokens")
    front = yaml.safe_load(card[4 : card.index("\n---\n")])
    assert front["pipeline_tag"] == "image-feature-extraction" and front["tags"] == ["vlmoe", "visual-tokenizer"]
    assert f"into one of {CODES} codes" in card and "tell the pixels of the patches" in card
    block = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)
    assert block is not None
    visual = yaml.safe_load(block[1])["tokenizers"]["visual"]
    assert visual == {"kind": "vqkd", "load": "hf-hub:org/tokens", "codebook_size": CODES}
    parameters = sum(p.numel() for p in load_trained(tokens).objective.parameters())
    assert f"| Parameters, decoder included | {parameters:,} |" in card
    assert "| codes in use, percent |" in card and "| k-means codebook |" in card
    assert "in nats" not in card and "| Texts |" not in card and "no head that answers a task" not in card


def test_k_means_of_another_step_is_not_told(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tokens, run)
    report = json.loads((run / "report/codes.json").read_text())
    error = report["kmeans"]["mse"]
    assert f"| {error:.4f} |" in build_card(run, repo=None)
    (run / "report/codes.json").write_text(json.dumps({**report, "step": 1}))
    assert "k-means" not in build_card(run, repo=None)


def test_an_export_is_a_folder_that_others_load(hub: FakeHub, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    receipt = export(load_trained(tokens), asked(out), lambda _: None)
    assert receipt.check.identical and receipt.before.parameters == receipt.after.parameters
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "export.json",
        "visual_tokenizer.json",
        "visual_tokenizer.safetensors",
    }
    push(out, PushRequest("org/export"))
    assert torch.equal(codes_of(out), codes_of(tokens))
    assert torch.equal(codes_of("hf-hub:org/export"), codes_of(tokens))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "onnx"}, "exported whole as safetensors"),
        ({"modality": "vision"}, "exported whole as safetensors"),
        ({"dtype": "bf16"}, "leave out --dtype"),
        ({"visual": False}, "leave out --dtype"),
    ],
)
def test_what_an_export_can_not_be(tokens: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"is a visual tokenizer, .*{message}"):
        export(load_trained(tokens), asked(tmp_path / "export", **changed), lambda _: None)
    assert not (tmp_path / "export").exists()


def test_an_imported_tokenizer_is_pushed_as_it_is(hub: FakeHub, tmp_path: Path) -> None:
    tokenizer, folder = random_tokenizer(), tmp_path / "imported"
    tokenizer.save(folder)
    with pytest.raises(UsageError, match="is no run, checkpoint, model folder or export"):
        plan_push(folder)
    (folder / "import.json").write_text("{}")
    push(folder, PushRequest("org/imported"))
    assert torch.equal(codes_of("hf-hub:org/imported"), tokenizer.encode(IMAGES))


def _start(tokens: Path, folder: Path) -> object:
    (folder / "tiny.yaml").write_text(RECIPE)
    return load_run_recipe(str(folder / "tiny.yaml"), (), tokens)


def _plan(tokens: Path, folder: Path) -> object:
    return load_planned_recipe("quickstart/classification", (), tokens)


def _upcycle(tokens: Path, folder: Path) -> object:
    ways = Ways(experts=2, router_std=0.01, noise=0, drop=0, seed=0)
    return upcycle(tokens, Asked(ways, (0,), ("vision",), 1, 1.25, None), folder / "sparse")


def _finetuned(tokens: Path, folder: Path) -> object:
    return load_finetuned(tokens, "classification")


@pytest.mark.parametrize("use", [_start, _plan, _upcycle, _finetuned])
def test_it_is_no_model_to_start_from(use: Callable[[Path, Path], object], tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        use(tokens, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tokens} is a visual tokenizer: ") and "\n" not in message
    assert f"--set tokenizers.visual.kind=vqkd --set tokenizers.visual.load={tokens}" in message


def test_another_tokenizer_may_start_from_it(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.yaml").write_text(TOKENS)
    loaded = load_run_recipe(str(tmp_path / "tokens.yaml"), ("train.steps=1",), tokens)
    assert find_visual_tokenizer(str(train(loaded, tmp_path / "run").folder)).codebook_size == CODES


def test_training_goes_on_with_the_codes_it_starts_from(tokens: Path, tmp_path: Path) -> None:
    """The first held-out line is the last one of the tokenizer that the run starts from."""
    (tmp_path / "tokens.yaml").write_text(TOKENS)
    loaded = load_run_recipe(str(tmp_path / "tokens.yaml"), ("train.steps=1",), tokens)
    first = metrics(train(loaded, tmp_path / "run").folder)[0]
    last = metrics(tokens)[-1]
    assert first["split"] == last["split"] == "eval"
    for name in ("loss/teacher", "loss/commitment", "codes/used", "codes/pixel_error"):
        assert first[name] == pytest.approx(last[name])
