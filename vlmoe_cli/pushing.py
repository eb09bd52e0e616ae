"""`--push-to`: from what was typed to a push, and what is printed of it; shared by the verbs that push."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.hub.background import BackgroundPush
    from vlmoe_core.hub.contents import PushFile
    from vlmoe_core.hub.push import Pushed, PushRequest

PATIENCE = 600.0
"""Seconds that a finished run waits for its last push."""


def push_request(to: str | None, public: bool = False, message: str | None = None) -> "PushRequest | None":
    """What `--push-to` asks for; None where it is not given. Raises UsageError before a verb works for hours."""
    if to is None:
        return None
    from vlmoe_core.hf import Address
    from vlmoe_core.hub.push import MESSAGE, PushRequest

    address = Address.parse(to)
    return PushRequest(address.repo, not public, address.revision, message=message or MESSAGE)


def push_after(out: Output, folder: Path, request: "PushRequest | None", with_images: bool = False) -> None:
    """Push the folder that a verb has made, if asked to. Raises HubError; what was made stays."""
    if request is None:
        return
    from vlmoe_core.hub.contents import Contents
    from vlmoe_core.hub.push import push

    out.note(said(push(folder, request, Contents(with_images=with_images), bars=sys.stderr.isatty())))


def send_after(out: Output, files: "Mapping[str, Path | bytes]", request: "PushRequest | None") -> None:
    """Add files to what a repository holds, if asked to: results, a report, a card. Raises HubError."""
    if request is None:
        return
    from vlmoe_core.hub.contents import PushFile
    from vlmoe_core.hub.push import send

    out.note(said(send([PushFile(path, content) for path, content in sorted(files.items())], request)))


def background_push(out: Output, request: "PushRequest | None") -> "BackgroundPush | None":
    """What pushes checkpoints while a run trains, if asked to."""
    if request is None:
        return None
    from vlmoe_core.hub.background import BackgroundPush

    return BackgroundPush(request, out.note, out.warn)


def said(pushed: "Pushed") -> str:
    """A push in one line."""
    seen = "private" if pushed.private else "public"
    what = f"{pushed.files} files, {size_words(pushed.bytes)}, {seen}"
    return f"pushed ({what}): {pushed.url}" if pushed.changed else f"nothing new ({what}): {pushed.url}"


def plan_rows(files: "Sequence[PushFile]") -> list[dict[str, object]]:
    """A line for each file of a dry run."""
    return [{"file": file.path, "size": size_words(file.size)} for file in files]


def size_words(count: int) -> str:
    """Bytes in a unit that a person reads."""
    for unit, length in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count} B"
