"""Pushes to the fake Hub, with the real client."""

import os
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import READ_TOKEN, STRANGER_TOKEN, TOKEN, Blob
from tests.hub.runs_support import RECIPE, make_model, make_run, save, tensors
from vlmoe_core.checkpoint.locate import fetch_model
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.errors import CheckpointError, HubError, UsageError
from vlmoe_core.hub.contents import Contents, PushFile, plan_push
from vlmoe_core.hub.push import PushRequest, _deletions, push, send

NAME = "org/model"
TO = PushRequest(NAME)
MODEL_FILES = {
    "manifest.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "recipe.yaml",
    "state.json",
    "tokenizers/text/tokenizer.json",
}
RUN_FILES = {
    "README.md",
    "environment.json",
    "metrics.jsonl",
    "report/figures/loads.png",
    "report/routing.html",
    "report/routing.json",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "toy")


def paths(files: list[PushFile]) -> set[str]:
    return {file.path for file in files}


def refusal(folder: Path, request: PushRequest = TO) -> str:
    """The message of a push that fails, after a look for tokens in the whole traceback."""
    with pytest.raises(HubError) as caught:
        push(folder, request)
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(token in shown for token in (TOKEN, READ_TOKEN, STRANGER_TOKEN))
    assert "signature" not in shown
    message = str(caught.value)
    assert message.startswith(f"nothing could be pushed to {request.repo}: ") and "\n" not in message
    return message


def test_what_a_run_sends(run: Path) -> None:
    files = plan_push(run)
    assert paths(files) == MODEL_FILES | RUN_FILES
    assert [file.path for file in files] == sorted(paths(files))
    content = {file.path: file.content for file in files}
    assert content["metrics.jsonl"] == b'{"step": 20, "split": "eval"}\n'
    assert content["recipe.yaml"] == run / "checkpoints" / "step-00000020" / "recipe.yaml"


def test_the_report_goes_without_pictures_unless_asked(run: Path) -> None:
    page = next(file.content for file in plan_push(run) if file.path == "report/routing.html")
    assert isinstance(page, bytes) and b"<html" in page and b"data:image/webp" not in page
    with_images = plan_push(run, Contents(with_images=True))
    assert next(f.content for f in with_images if f.path == "report/routing.html") == run / "report" / "routing.html"
    (run / "report" / "routing.json").write_text('{"schema": 99}')
    assert "report/routing.html" not in paths(plan_push(run))


def test_the_optimiser_goes_only_when_asked(run: Path) -> None:
    more = plan_push(run, Contents(with_optimizer=True))
    extra = paths(more) - paths(plan_push(run))
    assert extra and all(path.startswith("optim") for path in extra)
    with pytest.raises(UsageError, match="holds no optimiser; leave --with-optimizer away"):
        plan_push(make_model(run / "model"), Contents(with_optimizer=True))


def test_which_checkpoint_is_sent(run: Path, tmp_path: Path) -> None:
    def step(folder: Path, contents: Contents = Contents()) -> str:
        sources = [f.content for f in plan_push(folder, contents) if f.path == "state.json"]
        return Path(str(sources[0])).parent.name

    first = run / "checkpoints" / "step-00000010"
    assert (step(run), step(run / "checkpoints"), step(first)) == ("step-00000020", "step-00000020", "step-00000010")
    assert step(run, Contents(best=True)) == "step-00000010"
    assert paths(plan_push(first)) >= RUN_FILES
    with pytest.raises(UsageError, match="knows no best checkpoint"):
        plan_push(make_model(tmp_path / "model"), Contents(best=True))


def test_other_folders(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert paths(plan_push(model)) == MODEL_FILES | {"README.md"}
    export = tmp_path / "export"
    for name in ("model.onnx", "sub/config.json", ".git/config", "sub/.cache/x", "model.onnx.tmp", "a.partial/b"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text("x")
    with pytest.raises(UsageError, match="export is no run, checkpoint, model folder or export of vlmoe"):
        plan_push(export)
    (export / "export.json").write_text("{}")
    assert paths(plan_push(export)) == {"model.onnx", "sub/config.json", "export.json"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty is no run"):
        plan_push(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"no checkpoint at .*gone"):
        plan_push(tmp_path / "gone")
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        plan_push(tmp_path / "empty")


def test_a_pushed_run_is_a_model_for_others(hub: FakeHub, run: Path) -> None:
    pushed = push(run, TO)
    repo = hub.store.repos[NAME]
    assert repo.private and set(repo.files()) == MODEL_FILES | RUN_FILES
    assert pushed.changed and pushed.private and pushed.commit == repo.refs["main"]
    assert pushed.url == f"{hub.url}/{NAME}"
    assert (pushed.files, pushed.bytes) == (len(repo.files()), sum(map(len, repo.files().values())))
    found = read_checkpoint(fetch_model(f"hf-hub:{NAME}"), verify="sha256")
    assert (found.state.step, found.optimizer, found.recipe_text) == (20, None, RECIPE)
    for name, tensor in tensors(20).items():
        torch.testing.assert_close(found.model[name], tensor, rtol=0, atol=0)


def test_with_the_optimiser_training_can_go_on(hub: FakeHub, run: Path) -> None:
    push(run, TO, Contents(with_optimizer=True))
    found = read_checkpoint(fetch_model(f"hf-hub:{NAME}"), verify="sha256")
    assert found.optimizer is not None
    torch.testing.assert_close(found.optimizer["exp_avg.layer.0.weight"], 0.1 * tensors(20)["layer.0.weight"])


def test_a_second_push_of_the_same_makes_no_commit(hub: FakeHub, run: Path) -> None:
    first = push(run, TO)
    commits, puts = len(hub.store.repos[NAME].commits), hub.count("PUT", "/lfs/")
    second = push(run, TO)
    assert (len(hub.store.repos[NAME].commits), hub.count("PUT", "/lfs/")) == (commits, puts)
    assert not second.changed and second.commit == first.commit and second.files == first.files


def test_one_push_is_one_commit_and_leaves_no_stale_shard(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    repo = hub.store.make(NAME, private=True, **{"model-00009-of-00009.safetensors": b"old", "mine.txt": b"kept"})
    push(run, TO, Contents(with_optimizer=True))
    assert len(repo.commits) == 3
    push(run, TO)
    assert len(repo.commits) == 4
    assert set(repo.files()) == MODEL_FILES | RUN_FILES | {"mine.txt"}


def test_a_push_that_is_cut_goes_on(hub: FakeHub, run: Path) -> None:
    hub.fail("PUT", "/lfs/", times=1, delay=0.0)
    hub.fail("PUT", "/lfs/", times=0, cut=0.5)
    assert "the connection to" in refusal(run)
    repo = hub.store.repos[NAME]
    assert set(repo.files()) == set(), "no half model"
    assert len(hub.store.objects) == 1
    hub.faults.clear()
    before = hub.count("PUT", "/lfs/")
    push(run, TO)
    assert set(repo.files()) == MODEL_FILES | RUN_FILES
    assert hub.count("PUT", "/lfs/") - before == len(hub.store.objects) - 1


def test_a_cut_that_passes_is_not_noticed(hub: FakeHub, run: Path) -> None:
    hub.fail("PUT", "/lfs/", times=2, cut=0.5)
    assert push(run, TO).changed


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/api/repos/create", 401, "the Hub does not accept the token (401)"),
        ("/api/repos/create", 403, "the token may not do that (403)"),
        ("/preupload/", 404, "the Hub does not know it (404)"),
        ("/info/lfs/", 500, "the Hub itself fails (500)"),
        ("/commit/", 403, "the token may not do that (403)"),
        ("/commit/", 409, "at the same time (409); try again"),
        ("/commit/", 412, "at the same time (412); try again"),
        ("/commit/", 500, "the Hub itself fails (500)"),
    ],
)
def test_what_the_hub_answers(hub: FakeHub, tmp_path: Path, where: str, status: int, words: str) -> None:
    model = make_model(tmp_path / "model")
    hub.fail("POST", where, times=0, status=status, message="Invalid credentials in Authorization header")
    assert words in refusal(model)
    hub.faults.clear()
    assert push(model, TO).changed
    assert set(hub.store.repos[NAME].files()) == MODEL_FILES | {"README.md"}


def test_who_may_push(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    assert "may not do that (403)" in refusal(model, PushRequest("other/model"))
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "may not do that (403)" in (said := refusal(model)) and "must use a write token" in said
    monkeypatch.setenv("HF_TOKEN", "hf_expiredexpiredexpired")
    assert "does not accept the token (401)" in refusal(model)
    monkeypatch.delenv("HF_TOKEN")
    assert "no token is set; set HF_TOKEN, or run 'hf auth login'" in refusal(model)
    assert hub.store.repos == {}


def test_offline(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(make_model(tmp_path / "model"))
    assert hub.asked == []


def test_public_and_private(hub: FakeHub, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert not push(model, PushRequest(NAME, private=False)).private
    assert not hub.store.repos[NAME].private
    with pytest.raises(UsageError, match="org/model is public already; to publish there add --public"):
        push(model, TO)
    hub.store.make("org/closed", private=True)
    assert push(model, PushRequest("org/closed", private=False)).private, "pushing opens nothing"


def test_a_branch_is_made_and_used(hub: FakeHub, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    request = PushRequest(NAME, revision="v1/beta")
    pushed = push(model, request)
    repo = hub.store.repos[NAME]
    assert repo.files() == {} and set(repo.files("v1/beta")) == MODEL_FILES | {"README.md"}
    assert pushed.url == f"{hub.url}/{NAME}/tree/v1/beta"
    assert not push(model, request).changed
    assert read_checkpoint(fetch_model(f"hf-hub:{NAME}@v1/beta"))


def test_a_pull_request_is_made_and_continued(hub: FakeHub, tmp_path: Path) -> None:
    repo = hub.store.make("other/model", **{"a.txt": b"theirs"})
    repo.open_pull("Upload with vlmoe", "stranger")
    model = make_model(tmp_path / "model")
    pushed = push(model, PushRequest("other/model", create_pr=True))
    assert pushed.url == f"{hub.url}/other/model/discussions/2"
    assert repo.files() == {"a.txt": b"theirs"}
    assert set(repo.files("refs/pr/2")) == MODEL_FILES | {"README.md", "a.txt"}


def test_a_pull_request_is_continued_not_repeated(hub: FakeHub, tmp_path: Path) -> None:
    repo = hub.store.make(NAME, private=True)
    model, request = make_model(tmp_path / "model"), PushRequest(NAME, create_pr=True)
    first = push(model, request)
    assert not push(model, request).changed
    (model / "README.md").write_text("# Better\n")
    third = push(model, request)
    assert third.changed and third.url == first.url and len(repo.pulls) == 1
    assert repo.files("refs/pr/1")["README.md"] == b"# Better\n"
    push(model, replace(request, message="Another"))
    assert len(repo.pulls) == 2


def test_a_damaged_checkpoint_is_not_pushed(hub: FakeHub, run: Path) -> None:
    shard = run / "checkpoints" / "step-00000020" / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors has other bytes"):
        push(run, TO)
    assert hub.asked == []


def test_files_are_added_beside_others(hub: FakeHub) -> None:
    repo = hub.store.make(NAME, private=True, **{"model-1.safetensors": b"theirs"})
    send([PushFile(".eval_results/vqa.yaml", b"- score: 1\n")], replace(TO, message="Results of vqa"))
    assert repo.files() == {"model-1.safetensors": b"theirs", ".eval_results/vqa.yaml": b"- score: 1\n"}
    assert repo.at("main").title == "Results of vqa"


@pytest.mark.parametrize("name", ["model", "org/model@v1", "a/b/c", "", "org/../x", "hf-hub:model"])
def test_what_is_nothing_to_push_to(name: str) -> None:
    with pytest.raises(UsageError, match=r"is nothing to push to|is no name"):
        PushRequest(name)


def test_requests_that_contradict_themselves() -> None:
    assert PushRequest("hf-hub:org/model").repo == "org/model"
    with pytest.raises(UsageError, match="give --pr or --revision, not both"):
        PushRequest(NAME, revision="v1", create_pr=True)
    with pytest.raises(UsageError, match="is no revision"):
        PushRequest(NAME, revision="../x")
    with pytest.raises(UsageError, match="needs a message"):
        PushRequest(NAME, message=" ")


def test_no_token_and_no_signature_is_written_anywhere(
    hub: FakeHub, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("PUT", "/lfs/", times=0, status=500)
    refusal(run)
    hub.faults.clear()
    push(run, TO)
    fetch_model(f"hf-hub:{NAME}")
    printed = capfd.readouterr()
    said = printed.out + printed.err + caplog.text
    assert TOKEN not in said and "signature" not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and Path(os.environ["HF_HOME"]).is_relative_to(tmp_path)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    sent = b"".join(one.body for one in hub.asked)
    assert TOKEN.encode() not in sent and str(tmp_path).encode() not in sent


def test_a_model_that_moves_on(hub: FakeHub, run: Path) -> None:
    push(run, TO)
    save(run, 30)
    push(run, TO)
    assert read_checkpoint(fetch_model(f"hf-hub:{NAME}")).state.step == 30


def test_a_push_of_somebody_else_in_between_is_refused(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run, TO)
    repo, delete = hub.store.repos[NAME], _deletions
    save(run, 30)

    def slowly(*arguments: Any) -> Any:
        found = delete(*arguments)
        repo.add("main", "theirs", "other", {**repo.at("main").files, "model-00007-of-00007.safetensors": Blob(b"x")})
        return found

    monkeypatch.setattr("vlmoe_core.hub.push._deletions", slowly)
    assert "something else changed it at the same time (412)" in refusal(run)
    assert repo.at("main").title == "theirs"


def test_other_checkpoints_are_not_looked_into(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that trains on removes them meanwhile."""
    newest, looked, real = run / "checkpoints" / "step-00000020", [], Path.rglob

    def watched(self: Path, pattern: str) -> Any:
        looked.append(self)
        return real(self, pattern)

    monkeypatch.setattr(Path, "rglob", watched)
    plan_push(newest)
    assert newest in looked and not {run, run / "checkpoints", run / "checkpoints" / "step-00000010"} & set(looked)
