"""Names of the Hub (`hf-hub:ORG/NAME[@REVISION]`), fetching what they name, and what goes wrong as one message.

huggingface_hub does the work, so its environment variables hold: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME.
"""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from vlmoe_core.errors import HubError, UsageError, VlmoeError

HUB_PREFIX = "hf-hub:"
CACHED = "models--"

NAME = re.compile(r"[A-Za-z0-9_]([\w.-]{0,94}\w)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]*", re.ASCII)
TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[^\s'\"]+")
QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
"""An address with what follows its `?`: on its way to a store that may be a signature."""
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
AGAIN = "try again: what has arrived is not sent twice"
LOG_IN = "set HF_TOKEN, or run 'hf auth login'"


@dataclass(frozen=True)
class Address:
    """A repository of the Hub, at one revision."""

    repo: str
    """`ORG/NAME`, or `NAME` for one of the few old models without owner."""
    revision: str | None = None
    """Branch, tag, commit or `refs/pr/N`; None: the default branch."""

    def __post_init__(self) -> None:
        parts = self.repo.split("/")
        if len(parts) > 2 or not all(map(NAME.fullmatch, parts)) or "--" in self.repo or ".." in self.repo:
            raise UsageError(f"'{self.repo}' is no name of a repository on the Hub; write ORG/NAME")
        if self.revision is not None and not REVISION.fullmatch(self.revision):
            raise UsageError(f"'{self.revision}' is no revision; name a branch, a tag or a commit")

    @classmethod
    def parse(cls, spec: str) -> "Address":
        """Read `[hf-hub:]ORG/NAME[@REVISION]`. Raises UsageError."""
        repo, at, revision = spec.removeprefix(HUB_PREFIX).partition("@")
        return cls(repo, revision if at else None)

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_hub(spec: str) -> bool:
    """Whether what was typed names a repository of the Hub, not a path."""
    return spec.startswith(HUB_PREFIX)


def cached_spec(folder: Path) -> str | None:
    """`hf-hub:ORG/NAME@COMMIT` of a folder that was fetched into the cache of huggingface_hub; None: it is no such."""
    owner = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not owner.startswith(CACHED):
        return None
    return f"{HUB_PREFIX}{owner.removeprefix(CACHED).replace('--', '/')}@{folder.name}"


def shown(folder: Path) -> str:
    """A folder as a person knows it: one that was fetched by its name on the Hub."""
    return cached_spec(folder) or str(folder)


def fetch_folder(spec: str, patterns: Sequence[str]) -> Path:
    """Fetch the files of a repository that match a pattern; those that the cache has are not fetched again.

    Args:
        spec: `hf-hub:ORG/NAME[@REVISION]`.
        patterns: as in a shell, over whole paths: `*` goes into folders.

    Returns:
        The folder in the cache of huggingface_hub. It may hold other files of that revision too.

    Raises:
        HubError: the Hub refuses or can't be reached, or the repository holds no such file.
        UsageError: `spec` is no name.
    """
    from huggingface_hub import snapshot_download

    address = Address.parse(spec)
    with hub_errors(f"{address} can't be fetched"), quiet(bars=sys.stderr.isatty()):
        found = snapshot_download(address.repo, revision=address.revision, allow_patterns=list(patterns))
    folder = Path(found)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
        raise HubError(f"{address} holds none of {', '.join(patterns)}; is it the right repository and revision?")
    return folder


def first_file(spec: str, names: Sequence[str]) -> Path | None:
    """Fetch the first of several files that a repository has; None: it has none of them. Raises HubError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    address = Address.parse(spec)
    for name in names:
        with hub_errors(f"{address} can't be fetched"), quiet(bars=sys.stderr.isatty()):
            try:
                return Path(hf_hub_download(address.repo, name, revision=address.revision))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    return None


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Around calls of huggingface_hub and nothing else: whatever fails becomes one HubError.

    It says `what` could not be done, what happened and what to do, and never holds a token. The original exception is
    left out of the traceback, because its text may hold one.
    """
    try:
        yield
    except VlmoeError:
        raise
    except Exception as error:
        message = scrubbed(f"{what}: {_explain(error)}")
        raise HubError(message) from None


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """Around calls of huggingface_hub: without its warnings, which hold signed addresses, and its progress bars.

    Args:
        bars: leave the progress bars. HF_HUB_DISABLE_PROGRESS_BARS beats it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, hide = logger.level, not bars and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    hide = hide and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


def scrubbed(text: str) -> str:
    """The text without the token in use, without all that looks like a token, and without signatures of addresses."""
    text = QUERY.sub(r"\1", text)
    token = _token()
    return TOKENS.sub("***", text.replace(token, "***") if token else text)


def _explain(error: Exception) -> str:
    """What happened and what to do, from the first in the chain of causes that tells."""
    one: BaseException | None = error
    while one is not None:
        if said := _of_answer(one) or _of_failure(one):
            return said
        one = one.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _of_answer(error: BaseException) -> str | None:
    """From what the Hub answered; None: it did not answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if response is None or not isinstance(status, int):
        return None
    said = response.headers.get("X-Error-Message") or getattr(error, "server_message", None)
    words = f"; the Hub says: {_line(said)}" if said else ""
    return _of_code(response.headers.get("X-Error-Code", "")) or _of_status(status) + words


def _of_code(code: str) -> str | None:
    """From the Hub's own name of the problem."""
    known = _token() is not None
    if code == "GatedRepo":
        who = "the account of the token has no access" if known else f"it asks who you are: {LOG_IN}"
        return f"the repository is gated and {who}; ask for access on its page, then run it again"
    if code == "RepoNotFound":
        who = "the token in use may not read" if known else "nobody may read without a token"
        return f"there is no such repository, or a private one that {who}; check the name, or {LOG_IN}"
    if code == "RevisionNotFound":
        return "the repository has no such revision; name a branch, tag or commit that it has"
    if code == "EntryNotFound":
        return "the repository has no such file at that revision"
    return None


def _of_status(status: int) -> str:
    """From the status of HTTP alone."""
    settings = f"{_endpoint()}/settings/tokens"
    if status == 401 and _token() is None:
        return f"the Hub asks who you are (401) and no token is set; {LOG_IN}"
    if status == 401:
        return f"the Hub does not accept the token (401): it is wrong or expired; make one at {settings}, set HF_TOKEN"
    if status == 403:
        return f"the token may not do that (403); it needs rights to this repository or its owner: {settings}"
    if status == 404:
        return "the Hub does not know it (404); check the names, and that the token may see it"
    if status in (409, 412):
        return f"something else changed it at the same time ({status}); {AGAIN}"
    if status == 429:
        return f"too many requests (429); wait some minutes and {AGAIN}"
    if status >= 500:
        return f"the Hub itself fails ({status}); nothing is wrong here: later, {AGAIN}"
    return f"the Hub refuses it ({status})"


def _of_failure(error: BaseException) -> str | None:
    """From an exception without an answer; None: it says nothing by itself."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    name = type(error).__name__
    if isinstance(error, LocalEntryNotFoundError) and _is_offline():
        return "HF_HUB_OFFLINE is set and the cache does not have it; unset HF_HUB_OFFLINE"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked; unset HF_HUB_OFFLINE"
    if isinstance(error, UnicodeEncodeError) or "Illegal header" in str(error):
        return "the token holds characters that no token has; set HF_TOKEN anew"
    if "Timeout" in name or isinstance(error, TimeoutError):
        return f"no answer from {_endpoint()} in time; check the network, then {AGAIN}"
    from_library = any(base.__module__.split(".")[0] in HTTP_LIBRARIES for base in type(error).__mro__)
    if from_library or isinstance(error, ConnectionError):
        where = f"the connection to {_endpoint()} failed or was cut ({_first_line(error)})"
        return f"{where}; check the network and HF_ENDPOINT, then {AGAIN}"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"this machine's disk refuses: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    return None


def _first_line(error: BaseException) -> str:
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _token() -> str | None:
    """The token in use; one that can't be read counts as none."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:
        return None
