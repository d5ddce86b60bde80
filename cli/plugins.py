"""`llmc plugins`: the packages that extend llmc, what they bring, and what is wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .output import emit, json_option, table

if TYPE_CHECKING:
    from ..plugins.listing import Plugin


@click.command("plugins", short_help="List installed plugins and their faults.")
@json_option
def command(as_json: bool) -> None:
    """List the installed packages that extend llmc: version, plugin API, what each brings, and what is wrong.

    Nothing of a plugin is imported by other commands before it is asked for by name; this one imports all.
    """
    from ..plugins.listing import installed
    from ..plugins.version import API_VERSION

    found = installed()
    result = {"api": API_VERSION, "plugins": [plugin.as_json() for plugin in found]}
    emit(result, as_json=as_json, text=_text(found, API_VERSION))


def _text(found: list[Plugin], api: str) -> str:
    if not found:
        return f"no plugins are installed (plugin API {api}, docs/plugins.md)"
    parts = [f"plugin API {api}"]
    for plugin in found:
        made_for = f"API {', '.join(plugin.api)}" if plugin.api else "no API named"
        parts.append(f"\n{plugin.package} {plugin.version or '?'} ({made_for})")
        if plugin.error is not None:
            parts.append(f"  error: {plugin.error}")
        rows = [(f"  {one.kind}", one.name, one.error or one.summary) for one in plugin.brings]
        parts.append(table(("  kind", "name", ""), rows))
    return "\n".join(parts)
