"""Files and folders that survive a crash: synced to disk, renamed into place, removed in one step."""

import hashlib
import os
import shutil
from pathlib import Path

PARTIAL = ".partial"
REMOVED = ".removed"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file and every folder under `folder`, contents before the folder that lists them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder, and wait until the new name is on disk. A crash leaves one name or the other."""
    source.rename(target)
    sync(target.parent)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a finished, synced folder its final name. A folder that already has the name is set aside first."""
    aside = target.with_name(target.name + REMOVED)
    if target.exists():
        rename(target, aside)
    rename(partial, target)
    if aside.exists():
        shutil.rmtree(aside)


def remove_folder(folder: Path) -> None:
    """Take the final name from a folder before its files go, so that no half folder ever has it."""
    aside = folder.with_name(folder.name + REMOVED)
    if aside.exists():
        shutil.rmtree(aside)
    rename(folder, aside)
    shutil.rmtree(aside)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed_files(folder: Path) -> list[str]:
    """Paths, relative to `folder` and with '/', of everything under it that is not a folder, sorted."""
    entries = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(folder).as_posix() for p in entries)
