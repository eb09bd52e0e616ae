"""A Hub on the loopback device, with which the real client of huggingface_hub talks.

It speaks what a model repository needs: create, commit, large files (git LFS), branches, pull requests, reading;
private and gated repositories answer as those of hf.co do. Faults can be planted. It does not speak Xet.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.fake_repos import ACCOUNTS, Account, Blob, Refusal, Repo, Store, may_write

LARGE = 20_000
"""Bytes from which a file goes the way of large files, as any *.safetensors does."""


@dataclass
class Fault:
    """Something that goes wrong with requests whose method and path match."""

    method: str
    path: str
    times: int
    status: int = 0
    """Answer this."""
    message: str = ""
    cut: float | None = None
    """Close the connection after this share of the body, of the request if it has one."""
    delay: float = 0.0
    """Seconds to wait before all else."""
    gate: threading.Event | None = None
    """Wait until this is set before all else."""


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    body: bytes
    account: str | None


@dataclass
class FakeHub:
    """The server's state, which tests read and change."""

    store: Store = field(default_factory=Store)
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fail(self, method: str, path: str, times: int = 1, **what: Any) -> None:
        """Plant a Fault; `path` is a regular expression, `times` 0 means always."""
        self.faults.append(Fault(method, path, times or 10**9, **what))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        """How many requests came."""
        return sum(one.method == method and re.search(path, one.path) is not None for one in self.asked)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A Hub that answers on 127.0.0.1 while the block runs."""
    hub = FakeHub()
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            if fault.gate is not None:
                fault.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut, by either side, is no news."""


@dataclass(frozen=True)
class _Call:
    """A request as an endpoint sees it."""

    hub: FakeHub
    account: Account | None
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def has(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0] == "1"


@dataclass(frozen=True)
class _Answer:
    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


def _json(value: Any, status: int = 200) -> _Answer:
    return _Answer(json.dumps(value).encode(), status)


def _create(call: _Call) -> _Answer:
    wanted = call.json
    namespace = wanted.get("organization") or (call.account.name if call.account else "")
    name = f"{namespace}/{wanted['name']}"
    may_write(call.account, namespace)
    url = f"{call.hub.url}/{name}"
    if name in call.hub.store.repos:
        return _json({"url": url, "error": "You already created this model repo"}, 409)
    private = wanted.get("private") is True or wanted.get("visibility") == "private"
    call.hub.store.make(name, private)
    return _json({"url": url, "name": name, "id": name})


def _whoami(call: _Call) -> _Answer:
    if call.account is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org} for org in call.account.orgs]
    return _json({"type": "user", "name": call.account.name, "orgs": orgs, "auth": {"type": "access_token"}})


def _validate_yaml(call: _Call) -> _Answer:
    return _json({"errors": [], "warnings": []})


def _info(call: _Call, name: str, revision: str = "main") -> _Answer:
    repo = call.hub.store.repo(name, call.account)
    commit = repo.at(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    about = {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings}
    return _json(about | {"gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return entry


def _tree(call: _Call, name: str, revision: str) -> _Answer:
    files = call.hub.store.readable(name, call.account).at(revision).files
    return _json([_entry(path, blob) for path, blob in sorted(files.items())])


def _paths_info(call: _Call, name: str, revision: str) -> _Answer:
    files = call.hub.store.readable(name, call.account).at(revision).files
    asked = call.json["paths"] if call.body.startswith(b"{") else parse_qs(call.body.decode())["paths"]
    return _json([_entry(path, files[path]) for path in asked if path in files])


def _refs(call: _Call, name: str) -> _Answer:
    repo = call.hub.store.repo(name, call.account)
    named = {
        kind: [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith("refs/pr/") == (kind == "pullRequests")
        ]
        for kind in ("branches", "pullRequests")
    }
    return _json(named | {"converts": [], "tags": []})


def _branch(call: _Call, name: str, branch: str) -> _Answer:
    repo = call.hub.store.writable(name, call.account)
    if branch.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {branch}")
    if branch in repo.refs:
        raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
    repo.refs[branch] = repo.at(call.json.get("startingPoint", "main")).oid
    return _json({})


def _discussions(call: _Call, name: str) -> _Answer:
    repo = call.hub.store.repo(name, call.account)
    author = call.query.get("author", [None])[0]
    found = [
        {
            "title": pull.title,
            "num": pull.number,
            "author": {"name": pull.author},
            "createdAt": "2024-01-01T00:00:00.000Z",
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": name, "type": "model"},
        }
        for pull in repo.pulls
        if author in (None, pull.author)
    ]
    return _json({"discussions": found, "count": len(found), "start": 0})


def _preupload(call: _Call, name: str, revision: str) -> _Answer:
    repo = _commit_target(call, name)
    files = repo.at(revision).files
    return _json(
        {
            "files": [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if _is_large(file["path"], file["size"]) else "regular",
                    "oid": files[file["path"]].oid if file["path"] in files else None,
                }
                for file in call.json["files"]
            ]
        }
    )


def _is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE


def _commit_target(call: _Call, name: str) -> Repo:
    """A repository to commit to; a pull request may come from whoever may read."""
    store = call.hub.store
    if not call.has("create_pr"):
        return store.writable(name, call.account)
    if call.account is None:
        raise Refusal(401, "Invalid username or password.")
    return store.repo(name, call.account)


def _lfs_batch(call: _Call, name: str) -> _Answer:
    repo = call.hub.store.repo(name, call.account)
    if call.account is None:
        raise Refusal(401, "Invalid username or password.")
    objects = []
    for wanted in call.json["objects"]:
        one = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.store.objects:
            href = f"{call.hub.url}/lfs/{repo.name}/{wanted['oid']}?signature=secret"
            one["actions"] = {"upload": {"href": href, "header": {}}}
        objects.append(one)
    headers = (("Content-Type", "application/vnd.git-lfs+json"),)
    return _Answer(json.dumps({"transfer": "basic", "objects": objects}).encode(), 200, headers)


def _lfs_put(call: _Call, oid: str) -> _Answer:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refusal(400, "the content has another SHA-256")
    call.hub.store.objects[oid] = call.body
    return _Answer()


def _commit(call: _Call, name: str, revision: str) -> _Answer:
    repo = _commit_target(call, name)
    if revision not in repo.refs:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    lines = [json.loads(line) for line in call.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    base = repo.at(revision)
    if header.get("parentCommit") not in (None, base.oid):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(base.files)
    for line in lines:
        _apply(files, line["key"], line["value"], call.hub.store.objects)
    author = call.account.name if call.account else ""
    ref = repo.open_pull(header["summary"], author) if call.has("create_pr") else revision
    commit = repo.add(ref, header["summary"], author, files)
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{call.hub.url}/{name}/commit/{commit.oid}"}
    if call.has("create_pr"):
        answer["pullRequestUrl"] = f"{call.hub.url}/{name}/discussions/{len(repo.pulls)}"
    return _json(answer | {"hookOutput": ""})


def _apply(files: dict[str, Blob], key: str, value: dict[str, Any], objects: dict[str, bytes]) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise Refusal(400, f"the large file {value['path']} was never uploaded")
        files[value["path"]] = Blob(objects[value["oid"]], is_lfs=True)
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
    elif key != "header":
        raise Refusal(400, f"unknown line {key}")


def _resolve(call: _Call, name: str, revision: str, path: str) -> _Answer:
    commit = call.hub.store.readable(name, call.account).at(revision)
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    blob = commit.files[path]
    headers = (
        ("Content-Type", "application/octet-stream"),
        ("ETag", f'"{blob.oid}"'),
        ("X-Repo-Commit", commit.oid),
        ("Accept-Ranges", "bytes"),
    )
    return _Answer(blob.data, 200, headers)


_R = r"([^/]+/[^/]+)"
ENDPOINTS: list[tuple[str, str, Callable[..., _Answer]]] = [
    ("POST", "/api/repos/create", _create),
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("POST", f"/api/models/{_R}/preupload/([^/]+)", _preupload),
    ("POST", f"/{_R}\\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", f"/lfs/{_R}/(?P<oid>[0-9a-f]+)", lambda call, name, oid: _lfs_put(call, oid)),
    ("POST", f"/api/models/{_R}/commit/([^/]+)", _commit),
    ("POST", f"/api/models/{_R}/branch/([^/]+)", _branch),
    ("GET", f"/api/models/{_R}/refs", _refs),
    ("GET", f"/api/models/{_R}/discussions", _discussions),
    ("GET", f"/api/models/{_R}/revision/([^/]+)", _info),
    ("GET", f"/api/models/{_R}/tree/([^/]+)", _tree),
    ("POST", f"/api/models/{_R}/paths-info/([^/]+)", _paths_info),
    ("GET", f"/api/models/{_R}", _info),
    ("GET", f"/{_R}/resolve/([^/]+)/(.+)", _resolve),
]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, which is two packets, waits 40 ms for the client's receipt

    def handle_one(self) -> None:
        split = urlsplit(self.path)
        fault = self.hub.fault(self.command, split.path)
        if fault is not None and fault.gate is not None:
            fault.gate.wait(30)
        if fault is not None and fault.delay:
            time.sleep(fault.delay)
        body = self._body(fault.cut if fault is not None else None)
        if body is None:
            return self._hang_up()
        with self.hub.lock:
            answer = self._answer(split.path, parse_qs(split.query), body, fault)
        cut = fault.cut if fault is not None and self.command == "GET" else None
        self._send(answer, cut)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self, cut: float | None) -> bytes | None:
        """What was sent; None: a fault ends the request there."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(self._chunks())
            return None if cut is not None else body
        length = int(self.headers.get("Content-Length") or 0)
        if cut is not None and self.command != "GET":
            self.rfile.read(int(length * cut))
            return None
        return self.rfile.read(length)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes, fault: Fault | None) -> _Answer:
        try:
            account = self._account()
            self.hub.asked.append(Asked(self.command, path, body, account.name if account else None))
            if fault is not None and fault.status:
                raise Refusal(fault.status, fault.message or "planted")
            return self._dispatch(path, _Call(self.hub, account, query, body))
        except Refusal as refusal:
            headers = [("Content-Type", "application/json"), ("X-Error-Message", refusal.message)]
            headers += [("X-Error-Code", refusal.code)] if refusal.code else []
            return _Answer(json.dumps({"error": refusal.message}).encode(), refusal.status, tuple(headers))

    def _account(self) -> Account | None:
        words = self.headers.get("Authorization", "")
        if not words:
            return None
        if (account := ACCOUNTS.get(words.removeprefix("Bearer "))) is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def _dispatch(self, path: str, call: _Call) -> _Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, endpoint in ENDPOINTS:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                return endpoint(call, *map(unquote, match.groups()))
        raise Refusal(404, f"no endpoint {method} {path}")

    def _send(self, answer: _Answer, cut: float | None) -> None:
        body, status, extra = answer.body, answer.status, []
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, status = int(wanted[1]), 206
            extra = [("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")]
            body = body[first:]
        self.send_response(status)
        for name, value in [*answer.headers, *extra, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[: int(len(body) * cut)])
        if cut is not None:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        """Reset the connection, as a network does that breaks."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
