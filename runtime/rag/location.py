"""Where the documents of a folder are kept, and which store an argument means."""

from __future__ import annotations

from pathlib import Path

from ...ir.errors import InputError
from .store import is_postgres


def default_location(folder: Path) -> Path:
    """Where the documents of a folder are kept when nobody says: `<name>.kb` in the current directory."""
    name = folder.resolve().name
    if not name:
        raise InputError(f"{folder} has no name of its own", remedy="name the store: -o FILE.kb")
    return Path(f"{name}.kb")


def locate(argument: str) -> str:
    """The store that an argument means: a file, a URL, or the folder that was indexed."""
    if is_postgres(argument):
        return argument
    path = Path(argument)
    if path.is_dir():
        name = default_location(path)
        for place in (name, path.resolve().parent / name):
            if place.is_file():
                return str(place)
        raise InputError(f"{argument} has not been indexed", remedy=f"llmc rag index {argument}")
    if not path.exists():
        raise InputError(f"{argument} does not exist", remedy="llmc rag index FOLDER makes one")
    return argument
