"""The same tensors in other files: bit for bit, whoever would have written them."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.test_shares import trained
from vlmoe_core.checkpoint import reshard as room
from vlmoe_core.checkpoint.layout import latest_checkpoint
from vlmoe_core.checkpoint.quantised import QuantisedTensors
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.checkpoint.reshard import Cut, reshard
from vlmoe_core.checkpoint.restore import named_optimizer_state
from vlmoe_core.checkpoint.spans import Span, same, spans_in, write_spans
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.checkpoint.summary import verify_checkpoint
from vlmoe_core.checkpoint.write import write_checkpoint, write_model
from vlmoe_core.errors import CheckpointError, UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model, optimizer = trained()
    state, moments = model.state_dict(), named_optimizer_state(optimizer, model.named_parameters())
    run = write_checkpoint(
        tmp_path / "run", state, moments, RunState(7, {"pair": 56}), "seed: 0\n", write_tokenizers, 300
    )
    return run


def write_tokenizers(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "tokenizer.json").write_text("{}")


def bytes_by_key(checkpoint: Checkpoint) -> dict[str, tuple[str, bytes]]:
    """Read by the library, not by what is tested."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in checkpoint.path.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            part = f"{path.name.split('-')[0]}/{key}"
            assert part not in found, "each tensor is in one file"
            found[part] = str(tensor.dtype), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


CUTS = [Cut(), Cut(2, 1), Cut(2, 2), Cut(4, 2), Cut(4, 4), Cut(8, 4, 200), Cut(max_shard_bytes=64)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_tensor_and_every_other_file_is_the_same(source: Path, tmp_path: Path, cut: Cut) -> None:
    told = reshard(source, tmp_path / "out", cut)
    before, after = (read_checkpoint(folder, verify="sha256") for folder in (source, tmp_path / "out"))
    assert bytes_by_key(before) == bytes_by_key(after)
    assert (after.state, after.recipe_text) == (before.state, before.recipe_text)
    assert before.optimizer is not None and after.optimizer is not None
    for left, right in ((before.model, after.model), (before.optimizer, after.optimizer)):
        assert list(left) == list(right) and left.tied == right.tied
        assert len(right.shards) >= cut.world
    assert (after.tokenizers / "text" / "tokenizer.json").read_text() == "{}"
    assert (told.step, told.files) == (7, len(list((tmp_path / "out").glob("*.safetensors"))))
    assert not [report for report in verify_checkpoint(tmp_path / "out") if report.problem]
    assert not list(tmp_path.glob("*.partial"))


def test_a_process_has_no_expert_but_its_own(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", Cut(4, 4))
    for stem in ("model", "optim"):
        for number, path in enumerate(sorted((tmp_path / "out").glob(f"{stem}-*.safetensors"))):
            experts = {key.split(".experts.")[1].split(".")[0] for key in load_file(path) if ".experts." in key}
            assert {expert for expert in experts if expert.isdigit()} == {str(number)}


def test_and_back_is_the_same_again(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "there", Cut(4, 2))
    reshard(tmp_path / "there", tmp_path / "back", Cut())
    reshard(source, tmp_path / "one", Cut())
    one, back = ((tmp_path / name).glob("*.safetensors*") for name in ("one", "back"))
    assert {path.name: path.read_bytes() for path in one} == {path.name: path.read_bytes() for path in back}


def test_a_model_folder_without_optimiser_with_int8_and_a_file_of_its_own(tmp_path: Path) -> None:
    numbers = torch.randint(-127, 128, (4, 3, 2), dtype=torch.int8)
    state = {"a.experts.up.weight": numbers, "a.experts.up.weight_scale": torch.rand(4, 3), "empty": torch.ones(0, 2)}
    tensors = QuantisedTensors(state, frozenset({"a.experts.up.weight"}))

    def more(folder: Path) -> None:
        (folder / "labels.json").write_text("[]")

    write_model(tmp_path / "model", tensors, RunState(0, {}), "seed: 0\n", lambda folder: None, more=more)
    reshard(tmp_path / "model", tmp_path / "out", Cut(4, 4))
    before, after = read_checkpoint(tmp_path / "model"), read_checkpoint(tmp_path / "out", verify="sha256")
    assert after.optimizer is None and after.model.quantised == before.model.quantised
    assert all(torch.equal(before.model[name], after.model[name]) for name in before.model)
    assert (tmp_path / "out" / "labels.json").read_text() == "[]"


def test_a_run_goes_to_its_newest(source: Path, tmp_path: Path) -> None:
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    reshard(newest, tmp_path / "moved" / "step-00000007", Cut())
    assert read_checkpoint(tmp_path / "moved" / "step-00000007").state.step == 7


@pytest.mark.parametrize("expert", [3, 8])
def test_an_expert_degree_that_does_not_fit(source: Path, tmp_path: Path, expert: int) -> None:
    with pytest.raises(UsageError, match=rf"--expert {expert} must divide --world 8 .*\(4\); .* fit: 1, 2, 4$"):
        reshard(source, tmp_path / "out", Cut(8, expert))
    assert not (tmp_path / "out").exists()


def test_no_experts_to_share(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {"w": torch.ones(2)}, RunState(0, {}), "seed: 0\n", lambda folder: None)
    with pytest.raises(UsageError, match="--expert 2: the model has no experts"):
        reshard(tmp_path / "m", tmp_path / "out", Cut(2, 2))


def test_places_that_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, words in {
        "filled": "is there already and not empty",
        "file": "is there already and not empty",
        "link": "is a link, and a folder would take its place",
        "step-00000007.partial": "can't be the folder of a checkpoint",
        "step-00000008": "is named after step 8, but .* holds step 7",
    }.items():
        with pytest.raises(UsageError, match=words):
            reshard(source, tmp_path / name, Cut())
    with pytest.raises(UsageError, match="lies inside the checkpoint"):
        reshard(source, source / "out", Cut())
    reshard(source, tmp_path / "empty", Cut())
    assert (tmp_path / "filled" / "note").read_text() == "mine"


def test_a_damaged_source_is_named_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("optim-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{shard.name} has other bytes"):
        reshard(source, tmp_path / "out", Cut())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_one_message_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, spans: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(room, "write_spans", full)
    with pytest.raises(CheckpointError, match=r"out could not be written: .*No space left on device.*is as it was"):
        reshard(source, tmp_path / "out", Cut())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_copy_that_differs_is_not_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong bytes, which the manifest of the copy vouches for."""

    def wrong(path: Path, spans: dict[str, Span]) -> None:
        write_spans(path, spans)
        if path.name.startswith("optim-"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(room, "write_spans", wrong)
    with pytest.raises(CheckpointError, match="was written, but is read back otherwise"):
        reshard(source, tmp_path / "out", Cut())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


DTYPES = [torch.float64, torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.int64]


def test_the_library_reads_a_file_of_spans(tmp_path: Path) -> None:
    """Taken from two files; every tensor begins where its numbers may lie."""
    state = {f"{dtype}".removeprefix("torch."): torch.rand(3, 5).mul(9).to(dtype) for dtype in DTYPES}
    state |= {"none": torch.ones(0, 3), "one": torch.tensor(3.0), "ünïcode": torch.rand(1)}
    names = list(state)
    save_file({name: state[name] for name in names[:4]}, tmp_path / "a")
    save_file({name: state[name] for name in names[4:]}, tmp_path / "b")
    write_spans(tmp_path / "mine", spans_in(tmp_path / "b") | spans_in(tmp_path / "a"))
    found = load_file(tmp_path / "mine")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in names)
    assert all(found[name].dtype == state[name].dtype for name in names)
    assert all(span.start % max(1, span.width) == 0 for span in spans_in(tmp_path / "mine").values())


def test_spans_of_several_chunks_are_compared_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmoe_core.checkpoint.spans.CHUNK", 16)
    one, other = torch.arange(40.0), torch.arange(40.0)
    other[-1] = 0
    save_file({"x": one, "y": one.clone(), "z": other, "short": one[:39].clone()}, tmp_path / "f")
    spans = spans_in(tmp_path / "f")
    assert same(spans["x"], spans["y"]) and not same(spans["x"], spans["z"]) and not same(spans["x"], spans["short"])


def test_nothing_is_read_as_numbers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no tensor is ever in memory as a whole."""
    monkeypatch.setattr(StoredTensors, "_read", None)
    reshard(source, tmp_path / "out", Cut(2, 2))
