from pathlib import Path

import pytest

from vlmoe_core.checkpoint.metrics import check_metrics, cut_metrics, metrics_offset
from vlmoe_core.errors import CheckpointError


def test_cut_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics_offset(path) == 0
    path.write_text('{"step": 0, "é": 1}\n')
    offset = metrics_offset(path)
    path.write_text(path.read_text() + '{"step": 1}\n{"step"')
    cut_metrics(path, offset)
    assert path.read_text() == '{"step": 0, "é": 1}\n'
    cut_metrics(path, offset)
    cut_metrics(path, 0)
    assert path.read_bytes() == b""


def test_what_is_recorded_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut would leave a file that is shorter than its checkpoint says."""
    synced: list[Path] = []
    monkeypatch.setattr("vlmoe_core.checkpoint.metrics.sync", synced.append)
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    assert metrics_offset(path) == 3 and synced == [path]


def test_shorter_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(CheckpointError, match="has 0 bytes, the checkpoint was written after 5"):
        cut_metrics(path, 5)
    path.write_text("{}\n")
    for refused in (check_metrics, cut_metrics):
        with pytest.raises(CheckpointError, match="has 3 bytes"):
            refused(path, 5)
    assert path.read_text() == "{}\n"
    cut_metrics(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_cut_within_a_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n{}\n")
    with pytest.raises(CheckpointError, match="no line ends at byte 4"):
        cut_metrics(path, 4)
    assert path.read_text() == "{}\n{}\n"
