"""`VLMoE`: what is read is what was written, bit for bit, from a folder and from the Hub."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import TOKEN
from tests.train.support import tiny, train
from tests.train.tasks_support import finetuned
from vlmoe_core.checkpoint.held import Box
from vlmoe_core.checkpoint.layout import latest_checkpoint
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.checkpoint.write import write_model
from vlmoe_core.errors import CheckpointError, HubError, UsageError
from vlmoe_core.hub.card.build import GENERATED
from vlmoe_core.hub.export.native import NativeOptions, in_dtype, write_native
from vlmoe_core.hub.model import VLMoE
from vlmoe_core.hub.push import PushRequest, push
from vlmoe_core.recipe.config import ModelRecipe
from vlmoe_core.recipe.load import dump_recipe, load_recipe
from vlmoe_core.train.trained import load_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return train(tiny(folder, "train.steps=2"), folder / "run").folder


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def written(model: VLMoE, folder: Path, options: NativeOptions) -> Path:
    return write_native(model.recipe, model.tokenizers, model.objective, model.origin.step, folder, options)


def test_saved_and_opened_again(run: Path, tmp_path: Path) -> None:
    model = VLMoE.from_pretrained(run)
    assert not model.training and model.origin.step == 2
    assert_same(model.objective, load_trained(run).objective)
    model.save_pretrained(tmp_path / "model")
    again = VLMoE.from_pretrained(tmp_path / "model")
    assert_same(again, model)
    assert again.recipe == model.recipe and again.origin.step == 2
    assert again.tokenizers.text.fingerprint == model.tokenizers.text.fingerprint
    assert not list((tmp_path / "model").rglob("*.bin")) and not list((tmp_path / "model").rglob("*.pkl"))
    with pytest.raises(UsageError, match="not empty"):
        model.save_pretrained(tmp_path / "model")


def test_pictures_texts_and_pairs(run: Path) -> None:
    model = VLMoE.from_pretrained(run)
    picture, words = Image.new("RGB", (40, 30), "red"), "a red square"
    with torch.no_grad():
        alone, text, pair = model([picture]), model(texts=[words, "a"]), model([picture], [words])
    length = len(model.tokenizers.text.encode(words)) + 2
    assert alone.states_TD.shape == (17, 16) and pair.states_TD.shape == (17 + length, 16)
    assert text.layout.num_sequences == 2
    batch = model.prepare(texts=[words])
    assert model.encoder(batch).states_TD.shape == (length, 16)
    with pytest.raises(UsageError, match="give images, texts, or both"):
        model()
    with pytest.raises(UsageError, match="1 images and 2 texts"):
        model([picture], [words, words])


def test_from_the_hub(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push(run, PushRequest("org/model", revision="v1"))
    model = VLMoE.from_pretrained("org/model", revision="v1")
    assert_same(model.objective, load_trained(run).objective)
    assert_same(load_trained(Path("hf-hub:org/model@v1")).objective, model.objective)
    with pytest.raises(HubError, match="no such repository"):
        load_trained(Path("hf-hub:org/nothing"))
    with pytest.raises(HubError, match="vlmoe import"):
        load_trained(Path("hf-hub:org/model@main"))
    with pytest.raises(UsageError, match="takes no cache_dir here: set HF_TOKEN"):
        VLMoE.from_pretrained(str(run), cache_dir=str(tmp_path))


def test_an_imported_encoder_has_no_heads(run: Path, tmp_path: Path) -> None:
    whole = VLMoE.from_pretrained(run)
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    text = dump_recipe(ModelRecipe(model=recipe.model, tokenizers=recipe.tokenizers))
    tensors = {name: value for name, value in whole.objective.state_dict().items() if name.startswith("encoder.")}
    step = latest_checkpoint(run)
    assert step is not None
    shutil.copytree(step / "tokenizers", tmp_path / "tokenizers")
    write_model(tmp_path / "model", tensors, RunState(0, {}), text, tmp_path / "tokenizers")
    model = VLMoE.from_pretrained(tmp_path / "model")
    assert_same(model.encoder, whole.encoder)
    with torch.no_grad():
        assert torch.equal(model(texts=["a red square"]).states_TD, whole(texts=["a red square"]).states_TD)


@pytest.mark.parametrize("size", [1, 5_000, 2**30])
def test_sharded_at_any_size(run: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VLMoE.from_pretrained(run)
    folder = written(model, tmp_path / "model", NativeOptions(max_shard_bytes=size))
    assert (len(list(folder.glob("model-*.safetensors"))) > 1) == (size < 2**30)
    largest: list[int] = []
    load = StoredTensors._load

    def watched(self: StoredTensors, part: str, box: Box | None = None) -> torch.Tensor:
        tensor = load(self, part, box)
        largest.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(StoredTensors, "_load", watched)
    monkeypatch.setattr(StoredTensors, "__getitem__", None)  # it would put the experts of a layer together first
    assert_same(VLMoE.from_pretrained(folder), model)
    experts = model.encoder.blocks[1].ffn["vision"].experts.up.weight
    assert max(largest) < experts.nbytes * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lower_precision_is_widened_exactly(run: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = VLMoE.from_pretrained(run)
    folder = written(model, tmp_path / "model", NativeOptions(in_dtype(dtype)))
    again = VLMoE.from_pretrained(folder)
    for name, tensor in again.objective.state_dict().items():
        before = model.objective.state_dict()[name]
        rounded = before if ".router." in name or not before.is_floating_point() else before.to(dtype).to(before.dtype)
        assert tensor.dtype == before.dtype and tensor.equal(rounded), name
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 0.7 * sum(
        t.nbytes for t in model.objective.state_dict().values()
    )


class Tied(nn.Module):
    """Two names, one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight


@pytest.mark.parametrize("options", [NativeOptions(), NativeOptions(in_dtype(torch.bfloat16))])
def test_tied_weights_are_stored_once_and_stay_tied(run: Path, tmp_path: Path, options: NativeOptions) -> None:
    model = VLMoE.from_pretrained(run)
    folder = write_native(model.recipe, model.tokenizers, Tied(), 1, tmp_path / "tied", options)
    stored = StoredTensors(folder, "model")
    assert stored.tied == {"head.weight": "words.weight"} and list(stored.infos) == ["words.weight"]


def test_bad_folders_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    model = VLMoE.from_pretrained(run)

    def broken(file: str, before: bytes, after: bytes) -> Path:
        folder = tmp_path / file.replace("/", "-")
        written(model, folder, NativeOptions())
        data = (folder / file).read_bytes()
        assert before in data
        (folder / file).write_bytes(data.replace(before, after, 1))
        return folder

    newer = broken("manifest.json", b'"format": 1', b'"format": 2')
    with pytest.raises(CheckpointError, match=r"format 2.*install a newer vlmoe"):
        VLMoE.from_pretrained(newer)
    with pytest.raises(CheckpointError, match="header that is not the one"):
        VLMoE.from_pretrained(broken("model-00001-of-00001.safetensors", b'"F32"', b'"I32"'))
    with pytest.raises(CheckpointError, match=r"recipe\.yaml"):
        VLMoE.from_pretrained(broken("recipe.yaml", b"layers", b"lagers"))


def test_a_task_goes_along_with_its_labels(tmp_path: Path) -> None:
    run = finetuned(tmp_path, "nli", "train.steps=2", init="scratch")
    model = VLMoE.from_pretrained(run)
    model.save_pretrained(tmp_path / "model")
    assert VLMoE.from_pretrained(tmp_path / "model").tokenizers.labels == model.tokenizers.labels
    assert model.tokenizers.labels.names


def test_its_own_card_goes_along_and_a_new_repository_is_private(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    model = VLMoE.from_pretrained(run)
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert GENERATED in card and "Mixin" not in card
    assert model.push_to_hub("org/new", commit_message="From Python") == f"{hub.url}/org/new"
    repo = hub.store.repos["org/new"]
    assert repo.private and repo.at("main").title == "From Python"
    assert b'from_pretrained("org/new")' in repo.files()["README.md"]
    for name in ("org/new", "hf-hub:org/new", "hf-hub:org/new@main"):
        assert_same(VLMoE.from_pretrained(name), model)
    model.push_to_hub("org/open", private=False)
    assert not hub.store.repos["org/open"].private
    with pytest.raises(UsageError, match="push_to_hub takes no token here: set HF_TOKEN"):
        model.push_to_hub("org/new", token=TOKEN)
