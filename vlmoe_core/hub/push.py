"""Sends files to a repository of the Hub, as one commit.

One commit, because a repository must never hold half a model. A push that was cut goes on when it is repeated: what has
arrived is known by its SHA-256 and not sent again. A push of what is there already makes no commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from vlmoe_core.checkpoint.layout import MANIFEST, MODEL, OPTIMIZER, TOKENIZERS
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.errors import UsageError
from vlmoe_core.hf import Address, hub_errors, quiet
from vlmoe_core.hub.contents import Contents, PushFile, model_in, plan_push, same_weights
from vlmoe_core.hub.results import FOLDER as EVAL_RESULTS
from vlmoe_core.hub.there import published
from vlmoe_core.train.results import FOLDER as RESULTS

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

MESSAGE = "Upload with vlmoe"
REPLACED = (f"{MODEL}-*.safetensors", f"{OPTIMIZER}-*", f"{OPTIMIZER}.*", f"{TOKENIZERS}/*")
"""A pushed model takes the place of the one before it: files of these names that it lacks are deleted."""
MEASURED = (f"{RESULTS}/*.json", f"{EVAL_RESULTS}/*")
"""And these, where its weights are others: they would be taken for its own."""


@dataclass(frozen=True)
class PushRequest:
    """Where to push, and how."""

    repo: str
    """`ORG/NAME`; created if it is not there."""
    private: bool = True
    """Of a repository that is created. One that is public already is refused, unless False."""
    revision: str | None = None
    """Branch, created if it is not there, or `refs/pr/N`; None: the default branch."""
    create_pr: bool = False
    """Open a pull request; one of the same author and message that is still open is continued."""
    message: str = MESSAGE
    """Title of the commit and of the pull request."""

    def __post_init__(self) -> None:
        address = Address.parse(self.repo)
        if address.revision is not None or "/" not in address.repo:
            raise UsageError(f"'{self.repo}' is nothing to push to; write ORG/NAME, and a branch with --revision")
        if self.create_pr and self.revision is not None:
            raise UsageError("a pull request is opened against the default branch; give --pr or --revision, not both")
        if not self.message.strip():
            raise UsageError("a commit needs a message; leave --message away for the usual one")
        Address(address.repo, self.revision)
        object.__setattr__(self, "repo", address.repo)

    @property
    def words(self) -> list[str]:
        """The request as `vlmoe push DIR` takes it."""
        revision = ["--revision", self.revision] if self.revision else []
        return ["--to", self.repo, *([] if self.private else ["--public"]), *revision, *(["--pr"] * self.create_pr)]


@dataclass(frozen=True)
class Pushed:
    """What became of a push."""

    url: str
    """Page of the repository, its branch, or the pull request."""
    commit: str
    """The commit that holds the files."""
    files: int
    """Files of the push; unchanged ones were not sent."""
    bytes: int
    """Their sizes together."""
    changed: bool
    """A commit was made; False: all files were there already."""
    private: bool
    """Only those with access see the repository."""


def push(folder: Path, request: PushRequest, contents: Contents = Contents(), bars: bool = False) -> Pushed:
    """Push a run, a checkpoint, a model folder or an export; `plan_push` says which files. `bars` show the progress.

    Raises:
        HubError: the Hub refuses or can't be reached; the same call goes on later.
        UsageError: nothing to push, or the request does not fit the repository.
        CheckpointError: the checkpoint is damaged; every byte is checked before one is sent.
    """
    model = model_in(folder, contents.best)
    if model is None:
        return send(plan_push(folder, contents, request.repo), request, bars=bars)
    read_checkpoint(model, verify="sha256")
    there = published(request.repo, request.revision)
    files = plan_push(model, replace(contents, best=False), request.repo, there)
    is_other = there is not None and (there / MANIFEST).is_file() and not same_weights(there, model)
    return send(files, request, (*REPLACED, *MEASURED) if is_other else REPLACED, bars)


def send(files: Sequence[PushFile], request: PushRequest, replaced: Sequence[str] = (), bars: bool = False) -> Pushed:
    """Put files into a repository as one commit, beside what is there. Creates repository and branch where needed.

    Args:
        files: what to send.
        request: where to.
        replaced: patterns of paths; files there that match one and are not sent are deleted.
        bars: show the progress on stderr.

    Raises:
        HubError, UsageError: as in `push`.
    """
    from huggingface_hub import HfApi

    with hub_errors(f"nothing could be pushed to {request.repo}"), quiet(bars):
        api = HfApi()
        private = _prepare(api, request)
        ref = request.revision or (_open_pull_request(api, request) if request.create_pr else None)
        before = api.model_info(request.repo, revision=ref).sha
        done = api.create_commit(
            request.repo,
            [*_additions(files), *_deletions(api, request.repo, ref, files, replaced)],
            commit_message=request.message,
            revision=ref,
            create_pr=request.create_pr and ref is None,
            # What is deleted follows from what is there: a push of somebody else in between is refused.
            parent_commit=before if replaced else None,
        )
    where = done.pr_url or _page(api, request.repo, ref)
    return Pushed(where, done.oid, len(files), sum(file.size for file in files), done.oid != before, private)


def _prepare(api: "HfApi", request: PushRequest) -> bool:
    """Make sure that repository and branch are there; whether the repository is private."""
    api.create_repo(request.repo, private=request.private, exist_ok=True)
    private = bool(api.model_info(request.repo).private)
    if request.private and not private and not request.create_pr:
        raise UsageError(f"{request.repo} is public already; to publish there add --public")
    if request.revision is not None and not request.revision.startswith("refs/"):
        api.create_branch(request.repo, branch=request.revision, exist_ok=True)
    return private


def _open_pull_request(api: "HfApi", request: PushRequest) -> str | None:
    """The open pull request of this author with this title, which an earlier push made."""
    found = api.get_repo_discussions(
        request.repo, author=api.whoami()["name"], discussion_type="pull_request", discussion_status="open"
    )
    return next((f"refs/pr/{one.num}" for one in found if one.title == request.message), None)


def _additions(files: Sequence[PushFile]) -> "list[CommitOperationAdd]":
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(file.path, file.content) for file in files]


def _deletions(
    api: "HfApi", repo: str, ref: str | None, files: Sequence[PushFile], replaced: Sequence[str]
) -> "list[CommitOperationDelete]":
    from huggingface_hub import CommitOperationDelete

    sent = {file.path for file in files}
    there = api.list_repo_files(repo, revision=ref) if replaced else []
    return [
        CommitOperationDelete(path)
        for path in there
        if path not in sent and any(fnmatch(path, pattern) for pattern in replaced)
    ]


def _page(api: "HfApi", repo: str, ref: str | None) -> str:
    """Where a person looks at what was pushed."""
    if ref is None:
        return f"{api.endpoint}/{repo}"
    number = ref.removeprefix("refs/pr/")
    return f"{api.endpoint}/{repo}/" + (f"discussions/{number}" if number != ref else f"tree/{ref}")
