"""Names of the Hub, fetching, and what goes wrong: against the fake Hub, with the real client."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests.hub.connect import environment
from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import READ_TOKEN, STRANGER_TOKEN, TOKEN
from vlmoe_core.errors import HubError, UsageError
from vlmoe_core.hf import Address, fetch_folder, first_file, hub_errors, is_hub, scrubbed

SPEC = "hf-hub:org/model"
BIG = bytes(range(256)) * 400
FILES = {"manifest.json": b"{}", "tokenizers/text/tokenizer.json": b"words", "model-1.safetensors": BIG}


@pytest.fixture
def model(hub: FakeHub) -> FakeHub:
    hub.store.make("org/model", **FILES)
    return hub


def fetch_file(spec: str, name: str) -> Path:
    """A file that is there."""
    found = first_file(spec, [name])
    assert found is not None
    return found


def problem(spec: str = SPEC, name: str = "manifest.json") -> str:
    """The message when a file is fetched, after a look for tokens in the whole traceback."""
    with pytest.raises(HubError) as caught:
        fetch_file(spec, name)
    shown = "".join(traceback.format_exception(caught.value))
    for token in (TOKEN, READ_TOKEN, STRANGER_TOKEN, os.environ.get("HF_TOKEN", TOKEN)):
        assert token not in shown
    message = str(caught.value)
    assert message.startswith(f"{spec} can't be fetched: ") and "\n" not in message
    return message


def test_names() -> None:
    assert Address.parse("hf-hub:org/name@refs/pr/1") == Address("org/name", "refs/pr/1")
    assert str(Address.parse("org/name@v1.0")) == "hf-hub:org/name@v1.0"
    assert Address.parse("hf-hub:bert-base-uncased") == Address("bert-base-uncased")
    assert is_hub(SPEC) and not is_hub("org/model")


@pytest.mark.parametrize(
    "spec",
    ["", "a/b/c", "/b", "../b", "a/b c", "a/b@", "a/b@../../x", "a/b@/x", "a--b/c", "a/b@x y", "https://x/y"],
)
def test_what_is_no_name(spec: str) -> None:
    with pytest.raises(UsageError, match=r"is no (name|revision)"):
        Address.parse(f"hf-hub:{spec}")


def test_a_folder_holds_what_was_asked_for(model: FakeHub) -> None:
    folder = fetch_folder(SPEC, ["*.json"])
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "manifest.json",
        "tokenizers/text/tokenizer.json",
    ]
    assert folder.is_relative_to(os.environ["HF_HOME"])
    assert (fetch_folder(SPEC, ["model-*"]) / "model-1.safetensors").read_bytes() == BIG
    with pytest.raises(HubError, match=r"holds none of \*\.onnx; is it the right repository"):
        fetch_folder(SPEC, ["*.onnx"])


def test_what_is_cached_is_not_fetched_again(model: FakeHub) -> None:
    fetch_folder(SPEC, ["*"])
    before = model.count("GET", "/resolve/")
    fetch_folder(SPEC, ["*"])
    fetch_file(SPEC, "manifest.json")
    assert model.count("GET", "/resolve/") == before == 4


def test_a_revision_is_its_own(model: FakeHub) -> None:
    repo = model.store.repos["org/model"]
    old = repo.refs["main"]
    repo.add(
        "main", "newer", "org", {**repo.at("main").files, "manifest.json": repo.at("main").files[".gitattributes"]}
    )
    assert fetch_file(f"{SPEC}@{old}", "manifest.json").read_bytes() == b"{}"
    assert fetch_file(SPEC, "manifest.json").read_bytes() != b"{}"


def test_the_first_of_several_files(model: FakeHub) -> None:
    found = first_file(SPEC, ["vocab.txt", "manifest.json"])
    assert found is not None and found.name == "manifest.json"
    assert first_file(SPEC, ["vocab.txt"]) is None


def test_no_such_repository_or_revision(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such repository, or a private one that the token in use may not read" in problem("hf-hub:org/gone")
    assert "no such revision; name a branch" in problem(f"{SPEC}@v9")
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody may read without a token; check the name, or set HF_TOKEN" in problem("hf-hub:org/gone")


def test_private_and_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.make("org/model", private=True, **FILES)
    gated = hub.store.make("other/gated", gated=True, **FILES)
    assert fetch_file(SPEC, "manifest.json")
    assert "is gated and the account of the token has no access; ask for access" in problem("hf-hub:other/gated")
    monkeypatch.setenv("HF_TOKEN", STRANGER_TOKEN)
    assert "the token in use may not read" in problem(name="tokenizers/text/tokenizer.json")
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody may read without a token" in problem(name="tokenizers/text/tokenizer.json")
    assert "is gated and it asks who you are: set HF_TOKEN" in problem("hf-hub:other/gated")
    with pytest.raises(HubError, match="gated"):
        fetch_folder("hf-hub:other/gated", ["*"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    gated.granted.add("tester")
    assert fetch_file("hf-hub:other/gated", "manifest.json")


def test_a_token_that_is_refused(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expiredexpiredexpired")
    message = problem()
    assert "does not accept the token (401)" in message and f"{model.url}/settings/tokens" in message


@pytest.mark.parametrize("token", ["hf_with\x00zero", "hf_schlüssel", "hf_two words"])
def test_a_token_that_is_none(model: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    message = problem()
    assert "set HF_TOKEN" in message and token not in message


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, r"refuses it \(400\); the Hub says: planted"),
        (403, r"the token may not do that \(403\).*settings/tokens; the Hub says: planted"),
        (404, r"does not know it \(404\); check the names"),
        (409, r"at the same time \(409\); try again"),
        (429, r"too many requests \(429\); wait"),
        (500, r"the Hub itself fails \(500\); nothing is wrong here"),
        (503, r"the Hub itself fails \(503\); nothing is wrong here"),
    ],
)
def test_what_the_hub_answers(model: FakeHub, status: int, words: str) -> None:
    import re

    model.fail("HEAD", "/resolve/", times=0, status=status)
    assert re.search(words, problem())
    model.faults[0].times = 0
    assert fetch_file(SPEC, "manifest.json").read_bytes() == b"{}"


def test_an_answer_that_repeats_the_token(model: FakeHub) -> None:
    model.fail("HEAD", "/resolve/", times=0, status=400, message=f"bad header Bearer {TOKEN} and hf_otherToken123456")
    assert "bad header Bearer *** and ***" in problem()


def test_a_failed_fetch_goes_on_when_repeated(model: FakeHub) -> None:
    model.fail("GET", r"/resolve/.*model-1", times=0, status=500)
    with pytest.raises(HubError, match=r"the Hub itself fails \(500\)"):
        fetch_folder(SPEC, ["*"])
    model.faults.clear()
    before = model.count("GET", "/resolve/.*model-1")
    assert (fetch_folder(SPEC, ["*"]) / "model-1.safetensors").read_bytes() == BIG
    assert model.count("GET", "/resolve/.*model-1") == before + 1
    assert model.count("GET", "/resolve/.*manifest") <= 1


def test_a_download_that_is_cut(model: FakeHub) -> None:
    model.fail("GET", "/resolve/", cut=0.4)
    assert fetch_file(SPEC, "model-1.safetensors").read_bytes() == BIG
    model.fail("GET", "/resolve/.*tokenizer", times=0, cut=0.0)
    assert "connection" in problem(name="tokenizers/text/tokenizer.json")
    model.faults.clear()
    assert fetch_file(SPEC, "tokenizers/text/tokenizer.json").read_bytes() == b"words"


def test_a_hub_that_is_too_slow(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
    model.fail("HEAD", "/resolve/", times=0, delay=0.4)
    assert f"no answer from {model.url} in time; check the network" in problem()
    model.faults.clear()
    model.fail("HEAD", "/resolve/", delay=0.05)
    assert fetch_file(SPEC, "manifest.json")


def test_no_hub_at_all(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    url = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    message = problem()
    assert f"the connection to {url} failed or was cut" in message and "check the network and HF_ENDPOINT" in message
    with pytest.raises(HubError, match="failed or was cut"):
        fetch_folder(SPEC, ["*"])


def test_offline_reads_the_cache_alone(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = fetch_folder(SPEC, ["*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(model.asked)
    assert fetch_folder(SPEC, ["*"]) == folder and fetch_file(SPEC, "manifest.json").read_bytes() == b"{}"
    assert "HF_HUB_OFFLINE is set and the cache does not have it; unset" in problem("hf-hub:org/other")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set and the cache does not have it"):
        fetch_folder("hf-hub:org/other", ["*"])
    assert len(model.asked) == asked


def test_a_disk_that_refuses() -> None:
    refusal = "x: this machine's disk refuses: No space left on device: /cache"
    with pytest.raises(HubError, match=refusal), hub_errors("x"):
        raise OSError(28, "No space left on device", "/cache")


def test_our_own_errors_pass() -> None:
    with pytest.raises(UsageError, match=r"^mine$"), hub_errors("x"):
        raise UsageError("mine")


def test_what_is_scrubbed(hub: FakeHub) -> None:
    text = f"PUT https://store/x?X-Amz-Signature=abc&y=1 'Bearer secret' {TOKEN}: hf_hub_download"
    assert scrubbed(text) == "PUT https://store/x 'Bearer ***' ***: hf_hub_download"


SCRIPT = """
import sys
from vlmoe_core.errors import HubError
from vlmoe_core.hf import first_file
try:
    print(first_file(sys.argv[1], ["manifest.json"]))
except HubError as error:
    print(error)
"""


def test_the_variables_alone_are_obeyed(hub: FakeHub, tmp_path: Path) -> None:
    """In fresh processes: endpoint, token, home and offline come from the environment and from nowhere else."""
    hub.store.make("org/model", private=True, **FILES)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(**changes: str) -> str:
        variables = plain | environment(hub, tmp_path / "home") | changes
        done = subprocess.run([sys.executable, "-c", SCRIPT, SPEC], env=variables, capture_output=True, text=True)
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    assert "nobody may read without a token" in run(HF_TOKEN="")
    assert "HF_HUB_OFFLINE is set" in run(HF_HUB_OFFLINE="1")
    assert Path(run().strip()).is_relative_to(tmp_path / "home")
    asked = len(hub.asked)
    assert Path(run(HF_HUB_OFFLINE="1").strip()).read_bytes() == b"{}"
    assert len(hub.asked) == asked
