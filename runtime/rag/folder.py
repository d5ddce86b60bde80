"""Files of a folder that documents may be read from, and names for documents from elsewhere."""

from __future__ import annotations

import os
import stat
import time
import unicodedata
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from ...ir.errors import InputError

UNSURE = -1
"""`modified_ns` of a document whose file must be read again to know that it has not changed."""

_LEFT_OUT = ("*.kb*", "node_modules", "__pycache__")
_BESIDE = ("", "-wal", "-shm", "-journal", "-lock", ".cache")  # what is kept beside a store
_DEPTH = 64  # folders in folders
_SETTLED_NS = 50_000_000  # two writes closer together than this may carry the same time of change
_NAME_BYTES = 255


@dataclass(frozen=True)
class File:
    """A regular file: `name` is its path below the folder, with `/`."""

    name: str
    path: Path
    size: int
    modified_ns: int


@dataclass
class Listing:
    """What a folder holds, in order of the names. `failed` could not be looked at; what lies below the
    folders of `unknown` may still be there. `unsupported` files are of kinds that nobody reads, `empty` ones
    have no bytes.
    """

    files: list[File] = field(default_factory=list[File])
    failed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    unknown: list[str] = field(default_factory=list[str])
    unsupported: list[str] = field(default_factory=list[str])
    empty: list[str] = field(default_factory=list[str])

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def may_hold(self, name: str) -> bool:
        """Whether the file of this name lies where the folder could not be looked at."""
        return any(name == place or name.startswith(place + "/") for place in self.unknown)


def list_folder(folder: Path, *, exclude: Sequence[Path] = ()) -> Listing:
    """Every regular file below `folder`. Hidden ones, stores and what `exclude` names are left out, links to
    folders are not followed, and links to files only where the file lies in the folder too.
    """
    root = Path(os.path.realpath(folder))
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{folder} {what}", remedy="name the folder that holds the documents")
    left_out = {os.path.realpath(path) + end for path in exclude for end in _BESIDE}
    listing = Listing()
    for entry, name, error in _entries(str(root), "", 0, left_out):
        if error:
            listing.failed.append((shown_name(name) or ".", error))
            listing.unknown.append(name)
        elif entry is not None:
            _look_at(entry, name, str(root), listing)
    listing.files.sort(key=lambda file: file.name)
    return listing


def _entries(
    folder: str, below: str, depth: int, left_out: Set[str]
) -> Iterator[tuple[os.DirEntry[str] | None, str, str]]:
    """(entry, its name, "") of everything but folders, and (None, name, reason) where a folder cannot be
    listed."""
    if depth > _DEPTH:
        yield None, below, f"folders lie more than {_DEPTH} deep"
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        yield None, below, (error.strerror or str(error)).lower()
        return
    for entry in entries:
        if entry.name.startswith(".") or any(fnmatch(entry.name, pattern) for pattern in _LEFT_OUT):
            continue
        if os.path.realpath(entry.path) in left_out:
            continue
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, name, depth + 1, left_out)
        else:
            yield entry, name, ""


def _look_at(entry: os.DirEntry[str], name: str, root: str, listing: Listing) -> None:
    # Not at import: the readers bring packages that only reading documents needs.
    from .readers import is_supported

    path = Path(entry.path)
    try:
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if os.path.commonpath([root, real]) != root:
                listing.failed.append((shown_name(name), "is a link that leads out of the folder"))
                return
            if os.path.isdir(real):
                return  # what it holds is found where it lies
        facts = entry.stat()
        if not stat.S_ISREG(facts.st_mode):
            listing.failed.append((shown_name(name), "is not a regular file"))
        elif not is_supported(path):
            listing.unsupported.append(shown_name(name))
        elif fault := name_fault(name):
            listing.failed.append((shown_name(name), fault))
        elif not facts.st_size:
            listing.empty.append(name)
        else:
            listing.files.append(File(name, path, facts.st_size, settled(facts.st_mtime_ns)))
    except OSError as error:
        listing.failed.append((shown_name(name), (error.strerror or str(error)).lower()))
        if not isinstance(error, FileNotFoundError):  # a link to nothing
            listing.unknown.append(name)


def settled(modified_ns: int) -> int:
    """The time of change, or UNSURE where the file may have changed once more within the clock's tick."""
    return modified_ns if abs(time.time_ns() - modified_ns) > _SETTLED_NS else UNSURE


def file_of(path: Path, name: str) -> File:
    """A file named by hand. Raises InputError where it is none."""
    try:
        facts = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise InputError(f"{path} is not a regular file")
    return File(checked_name(name), path, facts.st_size, settled(facts.st_mtime_ns))


def checked_name(name: str) -> str:
    """The document's name that somebody else chose: a path below an unnamed folder, with `/`.

    Raises InputError for one that would lead out of it, or that cannot be shown or stored.
    """
    clean = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if fault := name_fault(clean):
        raise InputError(f"the name {shown_name(clean)!r} {fault}", remedy="rename the document")
    return clean


def name_fault(name: str) -> str:
    """Why a document cannot be called so, or nothing."""
    parts = name.split("/")
    if not name or "" in parts:
        return "is empty, absolute or has an empty part"
    if any(part in (".", "..") for part in parts):
        return "has a part '.' or '..'"
    if len(parts[0]) > 1 and parts[0][1] == ":" and parts[0][0].isalpha():
        return "begins with a drive"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not UTF-8"
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        return "has control characters"
    if any(len(part.encode()) > _NAME_BYTES for part in parts) or size > 16 * _NAME_BYTES:
        return f"is longer than {_NAME_BYTES} bytes"
    return ""


def shown_name(name: str) -> str:
    """A name for a message: what UTF-8 cannot hold, or a terminal would obey, is written as an escape."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        for letter in name
    )
