"""The fake Hub answers the real client as the real Hub does."""

import warnings
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import READ_TOKEN, STRANGER_TOKEN

NAME = "org/model"
BIG = bytes(range(256)) * 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "a.txt").write_text("small")
    (made / "empty.txt").touch()
    (made / "sub" / "model.safetensors").write_bytes(BIG)
    return made


def test_a_folder_goes_there_and_back(hub: FakeHub, folder: Path) -> None:
    api = HfApi()
    assert api.create_repo(NAME, private=True).repo_id == NAME
    assert api.create_repo(NAME, exist_ok=True).repo_id == NAME
    api.upload_folder(repo_id=NAME, folder_path=folder)
    repo = hub.store.repos[NAME]
    assert repo.private
    assert repo.files() == {"a.txt": b"small", "empty.txt": b"", "sub/model.safetensors": BIG}
    assert [path for path, blob in repo.at("main").files.items() if blob.is_lfs] == ["sub/model.safetensors"]
    got = Path(snapshot_download(NAME))
    assert (got / "sub" / "model.safetensors").read_bytes() == BIG and (got / "a.txt").read_text() == "small"
    assert got.name == repo.refs["main"]


def test_a_second_upload_of_the_same_makes_no_commit(hub: FakeHub, folder: Path) -> None:
    api = HfApi()
    api.create_repo(NAME)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    commits, puts = len(hub.store.repos[NAME].commits), hub.count("PUT", "/lfs/")
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert (len(hub.store.repos[NAME].commits), hub.count("PUT", "/lfs/")) == (commits, puts) == (2, 1)


def test_what_there_is_to_ask(hub: FakeHub) -> None:
    hub.store.make(NAME, **{"a.txt": b"one", "b/c.txt": b"two"})
    api = HfApi()
    assert api.whoami()["name"] == "tester"
    assert api.repo_exists(NAME) and not api.repo_exists("org/gone")
    assert api.file_exists(NAME, "b/c.txt") and not api.file_exists(NAME, "d.txt")
    assert api.list_repo_files(NAME) == [".gitattributes", "a.txt", "b/c.txt"]
    assert [entry.path for entry in api.get_paths_info(NAME, ["a.txt", "d.txt"])] == ["a.txt"]
    assert api.model_info(NAME).sha == hub.store.repos[NAME].refs["main"]


def test_branches_and_deletions(hub: FakeHub) -> None:
    hub.store.make(NAME, **{"old.txt": b"old"})
    api = HfApi()
    api.create_branch(NAME, branch="v1/beta")
    api.create_branch(NAME, branch="v1/beta", exist_ok=True)
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("old.txt")]
    api.create_commit(NAME, operations, commit_message="change", revision="v1/beta")
    repo = hub.store.repos[NAME]
    assert (repo.files("v1/beta"), repo.files("main")) == ({"new.txt": b"new"}, {"old.txt": b"old"})
    assert {ref.name for ref in api.list_repo_refs(NAME).branches} == {"main", "v1/beta"}
    assert Path(hf_hub_download(NAME, "new.txt", revision="v1/beta")).read_bytes() == b"new"
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "new.txt", revision="v2")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(NAME, branch="v1/beta")


def test_pull_requests(hub: FakeHub) -> None:
    repo = hub.store.make("other/model", **{"a.txt": b"old"})
    api = HfApi()
    done = api.create_commit(repo.name, [CommitOperationAdd("a.txt", b"new")], commit_message="Mine", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert (repo.files(), repo.files("refs/pr/1")) == ({"a.txt": b"old"}, {"a.txt": b"new"})
    assert Path(hf_hub_download(repo.name, "a.txt", revision="refs/pr/1")).read_bytes() == b"new"
    found = list(api.get_repo_discussions(repo.name, author="tester", discussion_type="pull_request"))
    assert [(one.num, one.title, one.git_reference) for one in found] == [(1, "Mine", "refs/pr/1")]
    assert list(api.get_repo_discussions(repo.name, author="stranger")) == []


def test_a_card_is_validated_and_pushed(hub: FakeHub) -> None:
    HfApi().create_repo(NAME)
    card = ModelCard.from_template(ModelCardData(license="mit"), template_str="---\n{{ card_data }}\n---\nHi")
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=NAME)
    assert hub.count("POST", "validate-yaml") > 0
    assert ModelCard.load(NAME).data.license == "mit"


@pytest.mark.parametrize(("token", "status"), [(False, 401), (STRANGER_TOKEN, 404)])
def test_a_private_repository_looks_like_none(hub: FakeHub, token: str | bool, status: int) -> None:
    hub.store.make(NAME, private=True, **{"a.txt": b"mine"})
    with pytest.raises(RepositoryNotFoundError) as caught:
        hf_hub_download(NAME, "a.txt", token=token)
    assert caught.value.response.status_code == status
    assert hf_hub_download(NAME, "a.txt", token=READ_TOKEN)


@pytest.mark.parametrize(("token", "status"), [(False, 401), (None, 403)])
def test_a_gated_repository(hub: FakeHub, token: bool | None, status: int) -> None:
    repo = hub.store.make("other/gated", gated=True, **{"a.txt": b"mine"})
    assert HfApi(token=token).model_info(repo.name).gated == "manual"
    with pytest.raises(GatedRepoError) as caught:
        hf_hub_download(repo.name, "a.txt", token=token)
    assert caught.value.response.status_code == status
    repo.granted.add("tester")
    assert hf_hub_download(repo.name, "a.txt")


def test_rights_to_write(hub: FakeHub) -> None:
    hub.store.make("other/model")
    operations = [CommitOperationAdd("a.txt", b"a")]
    with pytest.raises(HfHubHTTPError, match="write token"):
        HfApi(token=READ_TOKEN).create_repo(NAME)
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        HfApi().create_repo("other/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_commit("other/model", operations, commit_message="Mine")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrongwrongwrong").create_repo(NAME)


def test_planted_faults_end_after_so_many_times(hub: FakeHub) -> None:
    hub.store.make(NAME, **{"a.txt": b"one"})
    hub.fail("GET", f"/api/models/{NAME}$", times=2, status=500)
    api = HfApi()
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.model_info(NAME)
    assert api.model_info(NAME).id == NAME


def test_a_cut_download_goes_on_where_it_was_cut(hub: FakeHub) -> None:
    hub.store.make(NAME, **{"big.bin": BIG})
    hub.fail("GET", "/resolve/", cut=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Path(hf_hub_download(NAME, "big.bin")).read_bytes() == BIG
    assert hub.count("GET", "/resolve/") == 2


def test_a_corrupt_upload_is_refused(hub: FakeHub) -> None:
    import urllib.request

    request = urllib.request.Request(f"{hub.url}/lfs/{NAME}/{'0' * 64}", data=b"other bytes", method="PUT")
    with pytest.raises(OSError, match="400"):
        urllib.request.urlopen(request)
    assert not hub.store.objects
