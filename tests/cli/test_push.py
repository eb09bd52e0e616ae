import json
import re
from pathlib import Path

import pytest

from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import TOKEN
from tests.hub.runs_support import make_model, make_run
from vlmoe_cli import push as verb
from vlmoe_cli.errors import guarded, show_tracebacks
from vlmoe_cli.options import group
from vlmoe_cli.output import Output
from vlmoe_cli.pushing import push_after, push_request, send_after, size_words
from vlmoe_core.errors import UsageError

NAME = "org/model"


def vlmoe(*arguments: object) -> int:
    """The exit code of `vlmoe push ARGUMENTS`."""
    app = group()
    app.command()(verb.push)
    with pytest.raises(SystemExit) as end:
        guarded(lambda: app([str(argument) for argument in arguments], prog_name="vlmoe push"))
    return int(end.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "toy")


def test_a_dry_run_lists_and_asks_nobody(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe(run, "--to", NAME, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"13 files, \d+\.\d KiB, would go to org/model", lines[0])
    listed = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in lines[2:]}
    size = (run / "checkpoints" / "step-00000020" / "state.json").stat().st_size
    assert listed["state.json"] == f"{size} B" and "metrics.jsonl" in listed and len(listed) == 13
    assert hub.asked == []


def test_a_dry_run_for_machines(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe(run, "--to", NAME, "--dry-run", "--with-optimizer", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] and found["repo"] == NAME
    assert found["bytes"] == sum(file["size"] for file in found["files"])
    assert any(file["path"].startswith("optim-") for file in found["files"])


def test_a_push(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe(run, "--to", NAME, "--message", "First") == 0
    assert re.fullmatch(rf"pushed \(13 files, .* KiB, private\): {hub.url}/{NAME}\n", capsys.readouterr().out)
    assert hub.store.repos[NAME].at("main").title == "First"
    assert vlmoe(run, "--to", NAME) == 0
    assert capsys.readouterr().out.startswith("nothing new (13 files, ")
    assert vlmoe(run, "--to", NAME, "--best", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed"] and found["commit"] == hub.store.repos[NAME].refs["main"] and not found["dry_run"]
    assert json.loads(hub.store.repos[NAME].files()["state.json"])["step"] == 10


def test_public_branch_and_pull_request(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    assert vlmoe(model, "--to", NAME, "--public", "--revision", "v1") == 0
    assert f", public): {hub.url}/{NAME}/tree/v1" in capsys.readouterr().out
    assert vlmoe(model, "--to", NAME, "--public", "--pr") == 0
    assert f"{hub.url}/{NAME}/discussions/1" in capsys.readouterr().out
    assert not hub.store.repos[NAME].private


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "model"], "'model' is nothing to push to; write ORG/NAME"),
        (["--to", NAME, "--pr", "--revision", "v1"], "give --pr or --revision, not both"),
        (["--to", "org/public"], "org/public is public already; to publish there add --public"),
    ],
)
def test_what_was_typed_wrong(
    hub: FakeHub, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.store.make("org/public")
    assert vlmoe(make_model(tmp_path / "model"), *arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err and "Traceback" not in printed.err and printed.out == ""


def test_what_the_hub_refuses(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    hub.fail("POST", "/commit/", times=0, status=403, message=f"not with {TOKEN}")
    assert vlmoe(model, "--to", NAME) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: nothing could be pushed to org/model: the token may not do that (403)")
    assert len(said.splitlines()) == 1 and "not with ***" in said
    monkeypatch.setenv("VLMOE_DEBUG", "0")
    show_tracebacks()
    assert vlmoe(model, "--to", NAME) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and TOKEN not in said


def test_what_other_verbs_call(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = make_model(tmp_path / "model"), Output()
    push_after(out, model, None)
    send_after(out, {"a.txt": b"a"}, None)
    assert hub.asked == []
    push_after(out, model, push_request(NAME))
    send_after(out, {".eval_results/vqa.yaml": b"- score: 1\n"}, push_request(NAME, message="Results of vqa"))
    assert ".eval_results/vqa.yaml" in hub.store.repos[NAME].files() and hub.store.repos[NAME].private
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 2
    with pytest.raises(UsageError, match="is nothing to push to"):
        push_request("model")


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB")])
def test_sizes(count: int, words: str) -> None:
    assert size_words(count) == words
