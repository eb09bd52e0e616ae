"""Reading a model takes no more than one shard beyond the model: measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import torch

from vlmoe_core.checkpoint.shards import write_tensors

MIB = 2**20
SHARD = 8 * MIB
MEASURE = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from vlmoe_core.checkpoint.restore import load_model_state
from vlmoe_core.checkpoint.stored import StoredTensors

folder = Path(sys.argv[1])
shapes = {name: StoredTensors(folder, "model").shape(name) for name in StoredTensors(folder, "model")}

def peak():
    # Bytes, of this process alone: getrusage begins with the peak of the one that started it.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

class Model(nn.Module):
    def state_dict(self):
        return TENSORS

TENSORS = {name: torch.ones(shape) for name, shape in shapes.items()}
before = peak()
load_model_state(Model(), StoredTensors(folder, "model"))
assert all(abs(float(tensor.mean())) < 0.1 for tensor in TENSORS.values()), "every tensor was filled"
print(peak() - before)
"""


SHARED = """
from vlmoe_core.moe.exchange import Exchange
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.share import Share

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts(12, 1024, 1024, init_std=1.0)
        self.experts.keep(Share(9, 3, 12), Exchange(None))

with torch.device("meta"):
    layer = Layer()
layer.to_empty(device="cpu")
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.fill_(1)
before = peak()
load_model_state(layer, StoredTensors(folder, "model"))
assert all(abs(float(tensor.mean())) < 0.1 for tensor in layer.state_dict().values()), "every tensor was filled"
print(peak() - before)
"""


def test_a_share_of_the_experts_takes_no_more_than_one_of_them_beyond_it(tmp_path: Path) -> None:
    """Three of twelve experts, 24 of 96 MiB; all of them lie in one file."""
    torch.manual_seed(0)
    state = {f"experts.{name}.weight": torch.randn(12, 1024, 1024) for name in ("up", "down")}
    state |= {f"experts.{name}.bias": torch.randn(12, 1024) for name in ("up", "down")}
    write_tensors(tmp_path, "model", state, 2**30)
    code = MEASURE[: MEASURE.index("class Model")] + SHARED
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 * MIB + 10 * MIB


def test_one_shard_beyond_the_model(tmp_path: Path) -> None:
    """96 MiB: matrices, and experts that are one tensor in memory and twelve on disk."""
    torch.manual_seed(0)
    state = {f"layers.{n}.weight": torch.randn(1024, 1024) for n in range(12)}
    state["a.experts.up.weight"] = torch.randn(12, 1024, 1024)
    write_tensors(tmp_path, "model", state, SHARD)
    assert len(list(tmp_path.glob("*.safetensors"))) == 12
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < SHARD + 16 * MIB
