"""What a Hub holds: accounts, repositories with commits, branches and pull requests, and a store of large files."""

import hashlib
from dataclasses import dataclass, field

TOKEN = "hf_" + "TesterMayWrite00" * 2
READ_TOKEN = "hf_" + "TesterMayOnlyRead" * 2
STRANGER_TOKEN = "hf_" + "SomebodyElse0000" * 2


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Account:
    """Whom a token stands for."""

    name: str
    orgs: tuple[str, ...] = ()
    can_write: bool = True

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


ACCOUNTS = {
    TOKEN: Account("tester", ("org",)),
    READ_TOKEN: Account("tester", ("org",), can_write=False),
    STRANGER_TOKEN: Account("stranger"),
}


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    is_lfs: bool = False

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares with: SHA-256 of a large file, the git blob id of another one."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    author: str
    files: dict[str, Blob]


@dataclass(frozen=True)
class PullRequest:
    number: int
    title: str
    author: str


@dataclass
class Repo:
    """One model repository; a new one has a first commit, as on the real Hub."""

    name: str
    private: bool
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    """Accounts that may read a gated repository."""
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.add("main", "initial commit", self.namespace, {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    def add(self, ref: str, title: str, author: str, files: dict[str, Blob]) -> Commit:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, author, files))
        self.refs[ref] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, without .gitattributes."""
        return {path: blob.data for path, blob in self.at(revision).files.items() if path != ".gitattributes"}

    def open_pull(self, title: str, author: str) -> str:
        """The ref of a new pull request against main."""
        number = len(self.pulls) + 1
        self.pulls.append(PullRequest(number, title, author))
        self.refs[f"refs/pr/{number}"] = self.refs["main"]
        return f"refs/pr/{number}"


@dataclass
class Store:
    """All repositories, and large files by SHA-256."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def make(self, name: str, private: bool = False, gated: bool = False, **files: bytes) -> Repo:
        """A repository that is there already; `a_b=...` is not a path, so pass files as **{"a/b": ...}."""
        repo = self.repos[name] = Repo(name, private, gated)
        if files:
            added = {path: Blob(data) for path, data in files.items()}
            repo.add("main", "files", repo.namespace, repo.at("main").files | added)
        return repo

    def repo(self, name: str, account: Account | None) -> Repo:
        """A repository that the account may know of; hf.co hides private ones behind the answer for missing ones."""
        repo = self.repos.get(name)
        if repo is not None and (not repo.private or (account is not None and account.owns(repo.namespace))):
            return repo
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def readable(self, name: str, account: Account | None) -> Repo:
        """A repository whose files the account may read."""
        repo = self.repo(name, account)
        if not repo.gated or (account is not None and account.name in repo.granted):
            return repo
        status = 401 if account is None else 403
        raise Refusal(status, f"Access to model {name} is restricted. You are not in the authorized list.", "GatedRepo")

    def writable(self, name: str, account: Account | None) -> Repo:
        repo = self.repo(name, account)
        may_write(account, repo.namespace)
        return repo


def may_write(account: Account | None, namespace: str) -> Account:
    """The account, if it may write into a namespace."""
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    if not account.owns(namespace):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if not account.can_write:
        raise Refusal(403, "Forbidden: you must use a write token")
    return account
