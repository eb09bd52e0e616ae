"""What all importers share: the account, the folder, and that a run can start from it."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.hub.importers.support import encoder_of, vocab_file
from tests.hub.importers.test_beit import beit, folder_of, official
from tests.hub.importers.test_beit3 import official_state
from tests.hub.importers.vlmo_reference import Sizes, random_state
from tests.train.support import RECIPE
from tests.train.tasks_support import finetuned
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.importers.beit import HEADS as BEIT_HEADS
from vlmoe_core.hub.importers.beit import map_beit
from vlmoe_core.hub.importers.beit3 import HEADS as BEIT3_HEADS
from vlmoe_core.hub.importers.beit3 import map_beit3
from vlmoe_core.hub.importers.bert import map_bert
from vlmoe_core.hub.importers.importing import ImportOptions, assemble, import_model
from vlmoe_core.hub.importers.ledger import Ledger
from vlmoe_core.hub.importers.vlmo import HEADS as VLMO_HEADS
from vlmoe_core.hub.importers.vlmo import map_vlmo
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tokenizers.text import load_text_tokenizer
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.init import load_run_recipe, open_start, start_from
from vlmoe_core.train.trained import load_trained

SIZES = Sizes(rows=60)


@pytest.fixture(scope="module")
def vlmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, its tokenizer beside it, and the model folder made of them."""
    folder = tmp_path_factory.mktemp("vlmo")
    torch.save({"state_dict": random_state(SIZES), "epoch": 1}, folder / "vlmo.pt")
    tokenizer = str(vocab_file(folder, 60))
    import_model("vlmo", str(folder / "vlmo.pt"), folder / "out", ImportOptions(tokenizer=tokenizer))
    return folder


def test_every_key_and_every_tensor_is_in_the_receipt(vlmo: Path) -> None:
    receipt = json.loads((vlmo / "out" / "import.json").read_text())
    assert set(receipt["keys"]) == {*random_state(SIZES), "(epoch)"}
    assert set(receipt["tensors"]) == {f"encoder.{name}" for name in encoder_of(vlmo / "out").state_dict()}
    assert receipt["format"] == 1 and receipt["family"] == "vlmo" and receipt["source"] == "vlmo.pt"
    assert receipt["sha256"] == {"vlmo.pt": hashlib.sha256((vlmo / "vlmo.pt").read_bytes()).hexdigest()}
    assert str(vlmo) not in (vlmo / "out" / "import.json").read_text()


def test_the_receipt_is_part_of_the_folder(vlmo: Path) -> None:
    assert "import.json" in json.loads((vlmo / "out" / "manifest.json").read_text())["files"]


def states() -> dict[str, tuple[dict[str, torch.Tensor], Callable[[Ledger], ModelConfig]]]:
    """Small models of each family under their official keys."""
    absolute = official(beit(use_absolute_position_embeddings=True))
    return {
        "vlmo": (random_state(SIZES), map_vlmo),
        "vlmo-absolute": (random_state(Sizes(relative=False)), map_vlmo),
        "beit3": (official_state(), map_beit3),
        "beit": (official(beit(use_relative_position_bias=True)), map_beit),
        "beit-absolute": (absolute, map_beit),
        "bert": ({"embeddings.word_embeddings.weight": torch.ones(50, 128)}, map_bert),
    }


@pytest.mark.parametrize("family", ["vlmo", "vlmo-absolute", "beit3", "beit", "beit-absolute", "bert"])
def test_shapes_that_can_not_be_are_refused_whatever_the_key(family: str) -> None:
    state, fill = states()[family]
    for key in (key for key in state if not re.search(r"\.[12]\.", key)):
        for tensor in (torch.tensor(1.0), torch.ones(5), torch.ones(2, 3, 5, 7, 2)):
            ledger = Ledger(state | {key: tensor}, {}, 3)
            try:
                config = fill(ledger)
                assemble(config, 60, ledger)
            except (CheckpointError, UsageError):
                continue
            assert key in ledger.unused or not any(key in said for said in ledger.origins.values()), (key, tensor.shape)


def test_heads_of_the_published_widths() -> None:
    """As beit3/modeling_utils.py, vlmo's multiway_transformer.py and beit/modeling_pretrain.py build them."""
    base_and_large = {768: 12, 1024: 16}
    assert base_and_large == BEIT3_HEADS == BEIT_HEADS
    assert base_and_large | {544: 16} == VLMO_HEADS


def test_a_reason_covers_whole_keys_alone() -> None:
    ledger = Ledger({"logit_scale": torch.ones(1), "logit_scale_of_more": torch.ones(1)}, {})
    ledger.leave({"logit_scale": "head"})
    assert ledger.unused == {"logit_scale": "head"}
    with pytest.raises(CheckpointError, match="1 keys of the source are unknown: logit_scale_of_more"):
        ledger.close(allow_unknown=False)


@pytest.mark.parametrize("tensor", [torch.zeros(0, 3), torch.ones(4, 4).to_sparse()])
def test_a_tensor_without_numbers_or_not_dense_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="'a' holds no numbers or is not dense"):
        Ledger({"a": tensor}, {}).tensor("a")


def test_a_model_folder_is_never_overwritten(vlmo: Path) -> None:
    with pytest.raises(UsageError, match="is there already and not empty; choose another folder"):
        import_model("vlmo", str(vlmo / "absent.pt"), vlmo / "out")


def test_an_unknown_family_is_named(vlmo: Path) -> None:
    with pytest.raises(UsageError, match="there is no importer for clip; known: beit3, vlmo, beit, bert, vqkd"):
        import_model("clip", str(vlmo / "vlmo.pt"), vlmo / "clip")


@pytest.mark.parametrize("family", ["beit3", "beit", "bert"])
def test_weights_of_another_family_are_refused(family: str, vlmo: Path) -> None:
    options = ImportOptions(tokenizer=str(vlmo / "vocab.txt"), heads=3, allow_unknown=True)
    with pytest.raises(CheckpointError, match=r"missing in the source|another kind of model"):
        import_model(family, str(vlmo / "vlmo.pt"), vlmo / family, options)
    assert not (vlmo / family).exists()


def test_a_tensor_of_another_shape_is_refused(vlmo: Path, tmp_path: Path) -> None:
    state = random_state(SIZES)
    state["transformer.blocks.1.mlp_text.fc1.weight"] = torch.zeros(30, 24)
    torch.save(state, tmp_path / "vlmo.pt")
    with pytest.raises(
        CheckpointError, match=r"fc1\.weight' makes blocks\.1\.ffn\.text\.up\.weight of shape \(30, 24\)"
    ):
        import_model(
            "vlmo", str(tmp_path / "vlmo.pt"), tmp_path / "out", ImportOptions(tokenizer=str(vlmo / "vocab.txt"))
        )
    assert not (tmp_path / "out").exists()


def test_half_precision_weights_become_single(vlmo: Path, tmp_path: Path) -> None:
    torch.save({key: tensor.half() for key, tensor in random_state(SIZES).items()}, tmp_path / "vlmo.pt")
    import_model("vlmo", str(tmp_path / "vlmo.pt"), tmp_path / "out", ImportOptions(tokenizer=str(vlmo / "vocab.txt")))
    assert all(tensor.dtype == torch.float32 for tensor in encoder_of(tmp_path / "out").state_dict().values())


def test_a_run_starts_from_it(vlmo: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = yaml.safe_load(RECIPE)
    recipe["model"] = {"drop_path": 0.0}
    del recipe["tokenizers"]["text"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_run_recipe(str(tmp_path / "my.yaml"), model=vlmo / "out").recipe
    start = open_start(loaded.init)
    assert start is not None and start.text_tokenizer.vocab_size == 60
    objective = build_objective(loaded, None)
    notes = start_from(objective, start, loaded, start.labels)
    wanted = encoder_of(vlmo / "out").state_dict()
    found = {name.removeprefix("encoder."): tensor for name, tensor in objective.state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert notes and all(note.startswith("new, not from") for note in notes)


@pytest.mark.parametrize(("family", "task"), [("beit", "classification"), ("vlmo", "vqa")])
def test_an_imported_encoder_is_finetuned(family: str, task: str, vlmo: Path, tmp_path: Path) -> None:
    start = vlmo / "out"
    if family == "beit":
        theirs, start = beit(use_relative_position_bias=True), tmp_path / "beit"
        import_model("beit", str(folder_of(theirs, tmp_path / "theirs")), start)
    trained = load_trained(finetuned(tmp_path, task, "train.steps=2", init=str(start)))
    assert trained.step == 2 and trained.recipe.model.positions == "relative"
    assert trained.tokenizers.text.fingerprint == load_text_tokenizer(str(start / "tokenizers" / "text")).fingerprint
