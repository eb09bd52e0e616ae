"""`vlmoe recipes`."""

import json
from pathlib import Path

import pytest

from vlmoe_cli.main import main
from vlmoe_core.recipe.catalogue import Catalogue


@pytest.fixture(autouse=True)
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    folder = tmp_path / "shipped" / "toy"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text("# A toy\n# vlmoe pretrain toy/base\nseed: 1\ntrain: {steps: 10}\n")
    (folder / "more.yaml").write_text("# More steps\nextends: toy/base\ntrain: {steps: 20}\n")
    made = Catalogue(tmp_path / "shipped")
    monkeypatch.setattr("vlmoe_core.recipe.catalogue.shipped", lambda: made)
    monkeypatch.setattr("vlmoe_core.recipe.load.shipped", lambda: made)
    monkeypatch.chdir(tmp_path)
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["recipes", *arguments])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "ls")
    assert (code, err) == (0, "")
    assert out == "name      what it is\ntoy/base  A toy\ntoy/more  More steps\n"


def test_ls_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "ls", "--json")
    assert json.loads(out) == [{"name": "toy/base", "summary": "A toy"}, {"name": "toy/more", "summary": "More steps"}]


def test_show_prints_the_merged_text_and_nothing_else(capsys: pytest.CaptureFixture[str], catalogue: Catalogue) -> None:
    assert run(capsys, "show", "toy/base") == (0, (catalogue.root / "toy/base.yaml").read_text(), "")
    assert run(capsys, "show", "toy/more")[1] == "# More steps\n\nseed: 1\n\ntrain: {steps: 20}\n"


def test_cp(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "cp", "toy/more", "my.yaml")
    assert (code, out) == (0, "") and "wrote my.yaml; next: vlmoe validate my.yaml" in err
    assert "steps: 20" in Path("my.yaml").read_text()
    code, _, err = run(capsys, "cp", "toy/base", "my.yaml")
    assert code == 2 and err == "error: my.yaml exists; replace it with --force, or choose another name\n"
    assert run(capsys, "cp", "toy/base", "my.yaml", "--force")[0] == 0
    assert "steps: 10" in Path("my.yaml").read_text()


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", "toy/bse")
    assert (code, out) == (2, "") and err.endswith("did you mean 'toy/base'?\n")
    _, _, err = run(capsys, "show", "recipes/toy/base.yaml")
    assert "is no file here; the shipped recipe of that name is 'toy/base'" in err
