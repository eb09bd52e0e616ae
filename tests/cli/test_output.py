"""Results on stdout, everything else on stderr; people or machines."""

import json
import sys
from pathlib import Path

import pytest

from vlmoe_cli.output import Output

ROWS = [{"word": "[MASK]", "share": 0.123456, "count": 3}, {"word": "a", "share": 1.0, "count": None}]


def test_plain_lines_when_no_terminal_reads(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.table(ROWS, "words")
    out.record({"steps": 10, "fast": True, "where": Path("runs/x")})
    out.text("as it is\n")
    assert capsys.readouterr().out.splitlines() == [
        "words",
        "word    share   count",
        "[MASK]  0.1235  3",
        "a       1       -",
        "steps  10",
        "fast   yes",
        "where  runs/x",
        "as it is",
    ]


def test_a_long_line_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table([{"a": "x" * 300, "b": 1}])
    assert "x" * 300 + "  1" in capsys.readouterr().out


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    Output().table(ROWS, "words")
    Output().record({"steps": 10})
    out = capsys.readouterr().out
    assert "[MASK]" in out and "0.1235" in out and "steps" in out and "─" in out


def test_an_empty_table_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table([])
    assert capsys.readouterr() == ("", "")


def test_machines_get_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=True)
    out.table(ROWS)
    out.record({"a": 1})
    out.text("for people")
    out.data({"loss": float("nan"), "path": Path("x"), "rows": (1.5, float("inf")), "word": "é"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"loss": None, "path": "x", "rows": [1.5, None], "word": "é"}
    assert "é" in text


def test_people_get_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    Output().data({"a": 1})
    assert capsys.readouterr() == ("", "")


def test_notes_and_warnings_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=True)
    out.note("newest run used")
    out.warn("an expert died")
    assert capsys.readouterr() == ("", "newest run used\nwarning: an expert died\n")
