"""Pushes beside a run: what the run sees of them, and what is on the Hub in the end."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import TOKEN
from tests.hub.runs_support import RECIPE, save
from tests.train.support import tiny
from vlmoe_core.checkpoint.layout import list_checkpoints, prune
from vlmoe_core.hub.background import BackgroundPush
from vlmoe_core.hub.push import PushRequest, push
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import run_training
from vlmoe_core.train.session import RunOptions

NAME = "org/model"
TO = PushRequest(NAME)
LONG = 20.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "toy"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    return folder


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def background(hub: FakeHub, said: list[str]) -> Iterator[BackgroundPush]:
    background = BackgroundPush(TO, said.append, said.append)
    yield background
    for fault in hub.faults:
        fault.times = 0
        if fault.gate is not None:
            fault.gate.set()
    background.close(LONG)


def gate(hub: FakeHub, times: int = 1) -> threading.Event:
    """Commits wait until it is opened."""
    event = threading.Event()
    hub.fail("POST", "/commit/", times=times, gate=event)
    return event


def wait_for(what: Callable[[], object], seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def steps(hub: FakeHub) -> list[str]:
    return [commit.title for commit in hub.store.repos[NAME].commits[1:]]


def test_each_checkpoint_is_pushed(
    hub: FakeHub, run: Path, background: BackgroundPush, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        background.on_saved(save(run, step))
        wait_for(lambda: not background.held())
    assert background.close(LONG)
    assert steps(hub) == ["Upload with vlmoe, step 1", "Upload with vlmoe, step 2"]
    assert said == [f"step 2 is on the Hub: {hub.url}/{NAME}"]
    assert hub.store.repos[NAME].files()["metrics.jsonl"] == b'{"step": 1, "split": "train"}\n'
    assert capfd.readouterr() == ("", "")


def test_saving_does_not_wait_and_the_newest_wins(hub: FakeHub, run: Path, background: BackgroundPush) -> None:
    opened = gate(hub)
    paths = [save(run, step) for step in (1, 2, 3)]
    background.on_saved(paths[0])
    wait_for(lambda: hub.count("POST", "/preupload/") == 1)
    before = time.monotonic()
    background.on_saved(paths[1])
    background.on_saved(paths[2])
    assert time.monotonic() - before < 2
    assert background.held() == {paths[0], paths[2]}
    opened.set()
    assert background.close(LONG)
    assert steps(hub) == ["Upload with vlmoe, step 1", "Upload with vlmoe, step 3"]


def test_a_checkpoint_being_pushed_is_not_removed(hub: FakeHub, run: Path, background: BackgroundPush) -> None:
    opened = gate(hub)
    first = save(run, 1)
    background.on_saved(first)
    save(run, 2)
    save(run, 3)
    assert [path.name for path in prune(run, 1, None, background.held())] == ["step-00000002"]
    assert first in list_checkpoints(run)
    opened.set()
    wait_for(lambda: not background.held())
    assert steps(hub) == ["Upload with vlmoe, step 1"]
    assert prune(run, 1, None, background.held()) == [first]


def test_errors_are_one_line_and_the_next_save_tries_again(
    hub: FakeHub, run: Path, background: BackgroundPush, said: list[str]
) -> None:
    hub.fail("POST", "/api/repos/create", status=403, message=f"not for {TOKEN}")
    background.on_saved(save(run, 1))
    wait_for(lambda: said)
    assert said[0].startswith("step 1 was not pushed: nothing could be pushed to org/model: the token may not do that")
    assert said[0].endswith("; the run goes on, and the next checkpoint is the next attempt")
    assert "\n" not in said[0] and TOKEN not in said[0]
    background.on_saved(save(run, 2))
    assert background.close(LONG)
    assert len(said) == 2 and steps(hub) == ["Upload with vlmoe, step 2"]


def test_a_hub_that_is_down_all_the_time(
    hub: FakeHub, run: Path, background: BackgroundPush, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for method in ("GET", "POST", "PUT"):
        hub.fail(method, "/", times=0, cut=0.0)
    for step in (1, 2):
        background.on_saved(save(run, step))
        wait_for(lambda: not background.held())
    assert not background.close(LONG)
    assert [line.split(":")[0] for line in said] == [
        "step 1 was not pushed",
        "step 2 was not pushed",
        "step 2 is not on the Hub; to send what is missing",
    ]
    assert said[2].endswith(f": vlmoe push {run} --to {NAME}")
    assert capfd.readouterr().err == ""
    hub.faults.clear()
    assert push(run, TO).changed and set(hub.store.repos[NAME].files()) >= {"metrics.jsonl", "manifest.json"}


def test_what_nobody_thought_of_does_not_reach_the_run(
    hub: FakeHub, run: Path, background: BackgroundPush, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError(f"with {TOKEN}")

    monkeypatch.setattr("vlmoe_core.hub.background.push", broken)
    background.on_saved(save(run, 1))
    wait_for(lambda: said)
    assert said[0].startswith("step 1 was not pushed: ZeroDivisionError: with ***;")
    monkeypatch.undo()


def test_a_checkpoint_that_vanished_is_a_line(run: Path, background: BackgroundPush, said: list[str]) -> None:
    background.on_saved(run / "checkpoints" / "step-00000009")
    wait_for(lambda: said)
    assert said[0].startswith("step 9 was not pushed: no checkpoint at")


def test_closing_waits_no_longer_than_it_may(hub: FakeHub, run: Path, said: list[str]) -> None:
    opened = gate(hub)
    background = BackgroundPush(replace(TO, private=False, revision="v1"), said.append, said.append)
    background.on_saved(save(run, 1))
    before = time.monotonic()
    assert not background.close(0.2)
    assert time.monotonic() - before < 2
    assert said == [
        f"step 1 is not on the Hub yet after 0 s; to send what is missing: "
        f"vlmoe push {run} --to {NAME} --public --revision v1"
    ]
    assert background.held(), "it is still on its way"
    opened.set()
    wait_for(lambda: not background.held())
    background.on_saved(save(run, 2))
    assert not background.held(), "closed"


def test_a_long_wait_is_told(
    hub: FakeHub, run: Path, background: BackgroundPush, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmoe_core.hub.background.QUIET", 0.05)
    hub.fail("POST", "/api/repos/create", delay=0.5)
    background.on_saved(save(run, 1))
    assert background.close(LONG)
    assert said == ["waiting up to 20 s until the last push is through", f"step 1 is on the Hub: {hub.url}/{NAME}"]


def test_without_a_save_there_is_no_thread(said: list[str]) -> None:
    threads = threading.active_count()
    background = BackgroundPush(TO, said.append, said.append)
    assert background.close(LONG) and said == [] and threading.active_count() == threads


def test_a_pull_request_stays_one(hub: FakeHub, run: Path, said: list[str]) -> None:
    background = BackgroundPush(replace(TO, create_pr=True), said.append, said.append)
    for step in (1, 2):
        background.on_saved(save(run, step))
        wait_for(lambda: not background.held())
    assert background.close(LONG)
    assert len(hub.store.repos[NAME].pulls) == 1
    assert said == [f"step 2 is on the Hub: {hub.url}/{NAME}/discussions/1"]


def test_the_command_can_be_typed(background: BackgroundPush) -> None:
    assert background._command(Path("my runs/toy/checkpoints/step-00000001")) == f"vlmoe push 'my runs/toy' --to {NAME}"


class Holding:
    """Holds the first checkpoint for ever."""

    def __init__(self) -> None:
        self.saved: list[Path] = []

    def on_saved(self, path: Path) -> None:
        self.saved.append(path)

    def held(self) -> list[Path]:
        return self.saved[:1]


def test_a_run_asks_what_is_held(tmp_path: Path) -> None:
    saves = Holding()
    outcome = run_training(tiny(tmp_path, "train.keep_last=1"), RunOptions(tmp_path / "run"), Reporter(), saves=saves)
    kept = list_checkpoints(outcome.folder)
    assert len(saves.saved) > 2 and kept[0] == saves.saved[0] and kept[-1] == saves.saved[-1]
    assert saves.saved[2] not in kept
