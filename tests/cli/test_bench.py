"""`vlmoe bench moe`."""

import importlib.util
import json
import sys

import pytest

from vlmoe_cli.main import main
from vlmoe_core.moe.bench import BACKENDS

TINY = ("--dim", "16", "--hidden", "32", "--experts", "4", "--tokens", "24", "--repeats", "1", "--threads", "1")


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["bench", "moe", *arguments])
    out, err = capsys.readouterr()
    code = end.value.code
    return code if isinstance(code, int) else 0, out, err


def test_a_table_of_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ends(capsys, *TINY, "--top-k", "2")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "16 x 32, 4 experts, top-2, 24 tokens, float32"
    assert lines[1].split() == ["layer", "ms", "over", "dense", "peak", "MiB", "peak", "over", "dense"]
    assert lines[2].split()[0::2] == ["dense", "1", "1"]
    assert {line.split()[0].rstrip(":") for line in lines[2:-1]} == {"dense", *BACKENDS}
    assert lines[-1].startswith("1 thread of ") and lines[-1].endswith("median of 1; dense: 16 x 64")
    assert "repeat 1 of 1" in err and "memory of grouped" in err


def test_one_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ends(capsys, *TINY, "--backend", "loop", "--dtype", "bfloat16", "--json")
    found = json.loads(out)
    assert code == 0 and found["repeats"] == 1 and found["machine"] and found["unserved"] == []
    assert found["case"] == {
        "dim": 16, "hidden": 32, "num_experts": 4, "tokens": 24, "top_k": 1, "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip
    assert [one["name"] for one in found["measured"]] == ["dense", "loop"]
    assert all(
        one.keys() == {"name", "seconds", "over_dense", "peak_bytes", "peak_over_dense"} for one in found["measured"]
    )


def test_hidden_is_four_times_the_width_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ends(capsys, "--dim", "8", "--tokens", "8", "--repeats", "1", "--backend", "loop", "--json")
    assert json.loads(out)["case"]["hidden"] == 32


def test_a_backend_that_does_not_serve_is_named_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmoe_core.moe import bench

    def refuses(case: object, backend: str) -> object:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(bench, "sparse_layer", refuses)
    code, out, _ = ends(capsys, *TINY)
    assert code == 0 and "grouped: not measured: no kernel\n" in out


def test_a_terminal_sees_what_is_measured_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = ends(capsys, *TINY, "--backend", "loop")
    assert code == 0 and "loop" in out and "repeat 1 of 1\n" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "9", "--experts", "4"], "error: top_k (9) is more than experts (4); lower it or add experts\n"),
        (["--dtype", "float23"], "error: unknown dtype 'float23'; did you mean 'float32'?\n"),
        (["--backend", "loup"], "error: unknown backend 'loup'; did you mean 'loop'?\n"),
        (["--device", "cuda:99"], "error: device 'cuda:99' is not there"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
    ],
)
def test_what_is_typed_wrong_ends_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = ends(capsys, *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_tutel_asked_for_and_absent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tutel" else real(name, *rest))
    code, _, err = ends(capsys, *TINY, "--backend", "tutel")
    assert code == 2
    assert err == "error: backend 'tutel' needs the tutel package, which is not installed; 'vlmoe env' says how\n"
