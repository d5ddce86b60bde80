"""The version of the plugin API, and which plugins suit it.

A package says what it was made for by the name of an entry point in the group `llmc.plugins`, which is read
without importing anything of it:

    [project.entry-points."llmc.plugins"]
    "1.0" = "my_package"

The major number changes when something that a plugin may use goes or means something else; the minor number
when something is added. A package that suits several versions names each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

API_VERSION = "1.0"
API_GROUP = "llmc.plugins"


def parse_version(text: str) -> tuple[int, int] | None:
    """ "1.0" → (1, 0); None for what is no version."""
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
    return None if found is None else (int(found[1]), int(found[2]))


def is_compatible(declared: str) -> bool:
    """Whether a plugin made for `declared` works here: the same major number, and no later minor one."""
    ours, theirs = parse_version(API_VERSION), parse_version(declared)
    return ours is not None and theirs is not None and theirs[0] == ours[0] and theirs[1] <= ours[1]


def refusal(package: str, declared: Iterable[str]) -> tuple[str, str] | None:
    """(what is wrong, way out) for a package made for other versions than this one; None where it fits."""
    versions = sorted(declared)
    if any(is_compatible(version) for version in versions):
        return None
    if not versions:
        return (
            f"package {package} does not say which plugin API of llmc it was made for (this is "
            f"{API_VERSION})",
            f'its pyproject.toml needs [project.entry-points."{API_GROUP}"] "{API_VERSION}" = "its_module"',
        )
    what = f"package {package} was made for plugin API {' and '.join(versions)}, this llmc has {API_VERSION}"
    ours, theirs = parse_version(API_VERSION), [parse_version(version) for version in versions]
    if ours is not None and any(version is not None and version > ours for version in theirs):
        major = API_VERSION.partition(".")[0]
        return what, f"upgrade llmc, or install a {package} made for API {major}.x"
    return what, f"upgrade {package}, or uninstall it"
