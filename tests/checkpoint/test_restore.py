from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint.conftest import Sparse, make_training, train
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state, load_named_optimizer_state, named_optimizer_state
from vlmoe_core.errors import CheckpointError

Trained = tuple[Sparse, torch.optim.Optimizer]


def resumed(checkpoint: Path) -> Trained:
    """Another start, whose parameters stand in another order in the optimiser, filled from the checkpoint."""
    model, _ = make_training(seed=1)
    order = list(enumerate(model.parameters()))
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in reversed(order)]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    train(model, optimizer, range(90, 91))
    found = read_checkpoint(checkpoint, verify="sha256")
    load_model_state(model, found.model)
    load_named_optimizer_state(optimizer, model.named_parameters(), found.optimizer)
    return model, optimizer


def assert_same(left: Trained, right: Trained) -> None:
    for one, other in (
        (left[0].state_dict(), right[0].state_dict()),
        (
            named_optimizer_state(left[1], left[0].named_parameters()),
            named_optimizer_state(right[1], right[0].named_parameters()),
        ),
    ):
        assert set(one) == set(other)
        for name, value in one.items():
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def test_resumed_is_the_straight_run_bit_for_bit(checkpoint: Path, trained: Trained) -> None:
    again = resumed(checkpoint)
    assert_same(trained, again)
    train(*trained, range(2, 6))
    train(*again, range(2, 6))
    assert_same(trained, again)
    assert again[0].head.weight is again[0].embed.weight


def test_moments_are_stored_by_name_and_by_expert(checkpoint: Path, trained: Trained) -> None:
    infos = read_checkpoint(checkpoint).optimizer.infos
    assert {
        "exp_avg.ffn.experts.2.up.weight",
        "exp_avg_sq.ffn.experts.0.down.weight",
        "step.ffn.experts.up.weight",
    } <= set(infos)
    assert "exp_avg.head.weight" not in infos, "the tied weight has one state, under its first name"


def test_loaded_state_is_a_copy(checkpoint: Path) -> None:
    before = {path: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    model, optimizer = resumed(checkpoint)
    train(model, optimizer, range(3))
    assert {path: path.read_bytes() for path in before} == before


def test_parameter_without_a_gradient_has_no_state() -> None:
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    names = [("used", used), ("idle", idle)]
    optimizer = torch.optim.AdamW([used, idle])
    used.sum().backward()
    optimizer.step()
    state = named_optimizer_state(optimizer, names)
    assert set(state) == {"step.used", "exp_avg.used", "exp_avg_sq.used"}
    other = torch.optim.AdamW([idle, used])
    load_named_optimizer_state(other, names, state)
    assert set(other.state) == {used}


def test_missing_extra_and_misshaped_keys_are_listed(trained: Trained) -> None:
    model = trained[0]
    state = model.state_dict()
    del state["norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: norm\.weight; not in the model: other"):
        load_model_state(model, state | {"other": torch.ones(1)})
    wrong = model.state_dict() | {"norm.weight": torch.ones(5), "norm.bias": torch.zeros(4, dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"norm\.weight is \(5,\), the model wants \(4,\).*norm\.bias is float64"):
        load_model_state(model, wrong)


def test_long_lists_are_counted() -> None:
    with pytest.raises(CheckpointError, match="w7 and 12 more"):
        load_model_state(nn.Module(), {f"w{i}": torch.ones(1) for i in range(20)})


def test_tie_that_the_checkpoint_does_not_have(trained: Trained) -> None:
    model = trained[0]
    with pytest.raises(CheckpointError, match=r"ties 'head\.weight' to 'embed\.weight'"):
        load_model_state(model, model.state_dict() | {"head.weight": torch.zeros(11, 4)})


def test_views_of_one_storage_are_all_filled() -> None:
    base = torch.zeros(3, 2)
    module = nn.Module()
    module.register_buffer("whole", base)
    module.register_buffer("row", base[0])
    load_model_state(module, {"whole": torch.ones(3, 2), "row": torch.ones(2)})
    assert torch.equal(base, torch.ones(3, 2))


def test_optimiser_state_that_does_not_fit(trained: Trained) -> None:
    model, optimizer = trained
    state = {name: value.clone() for name, value in named_optimizer_state(optimizer, model.named_parameters()).items()}
    named = list(model.named_parameters())
    with pytest.raises(CheckpointError, match=r"what is not trained here: stranger"):
        load_named_optimizer_state(optimizer, named, state | {"exp_avg.stranger": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'exp_avg\.norm\.bias' is \(7,\), but its parameter is \(4,\)"):
        load_named_optimizer_state(optimizer, named, state | {"exp_avg.norm.bias": torch.ones(7)})
    del state["exp_avg_sq.norm.bias"]
    with pytest.raises(CheckpointError, match=r"lacks optimiser state: exp_avg_sq\.norm\.bias"):
        load_named_optimizer_state(optimizer, named, state)
    with pytest.raises(CheckpointError, match="not one of the model's"):
        named_optimizer_state(optimizer, named[1:])
