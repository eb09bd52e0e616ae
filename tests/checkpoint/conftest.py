"""A small sparse model with a tie, its optimiser after two steps, and a checkpoint of both."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vlmoe_core.checkpoint.restore import named_optimizer_state
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_checkpoint

NUM_EXPERTS, DIM, HIDDEN, WORDS = 3, 4, 6, 11


class Experts(nn.Module):
    """Two fused weights and a bias, (E, ...) each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ParameterDict(
            {"weight": torch.randn(NUM_EXPERTS, HIDDEN, DIM), "bias": torch.randn(NUM_EXPERTS, HIDDEN)}
        )
        self.down = nn.ParameterDict({"weight": torch.randn(NUM_EXPERTS, DIM, HIDDEN)})


class Sparse(nn.Module):
    """Embedding tied to the output, one layer of experts, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)
        self.ffn = nn.ModuleDict({"experts": Experts()})
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor([1, 2, 3]))

    def forward(self, ids_T: Tensor) -> Tensor:
        x_TD, experts = self.norm(self.embed(ids_T)), self.ffn["experts"]
        h_ETH = torch.einsum("td,ehd->eth", x_TD, experts.up["weight"]) + experts.up["bias"][:, None]
        y_TD = torch.einsum("eth,edh->td", h_ETH.tanh(), experts.down["weight"])
        return self.head(x_TD + y_TD)


def make_training(seed: int) -> tuple[Sparse, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Sparse()
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(model.parameters())]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: Sparse, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids_T = torch.randint(0, WORDS, (5,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids_T), ids_T.roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def write_tokenizers(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "tokenizer.json").write_text('{"model": "words"}')


@pytest.fixture
def trained() -> tuple[Sparse, torch.optim.Optimizer]:
    model, optimizer = make_training(0)
    train(model, optimizer, range(2))
    return model, optimizer


@pytest.fixture
def save(tmp_path: Path, trained: tuple[Sparse, torch.optim.Optimizer]) -> Callable[[int], Path]:
    """Writes the trained model as the checkpoint of a step, in shards small enough for several."""
    model, optimizer = trained

    def write(step: int) -> Path:
        moments = named_optimizer_state(optimizer, model.named_parameters())
        state = RunState(step=step, positions={"pair": 8 * step}, recipe="toy")
        run = tmp_path / "run"
        return write_checkpoint(
            run, model.state_dict(), moments, state, "seed: 0\n", write_tokenizers, max_shard_bytes=512
        )

    return write


@pytest.fixture
def checkpoint(save: Callable[[int], Path]) -> Path:
    return save(100)
