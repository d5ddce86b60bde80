"""Why a grammar or a schema is refused."""

from __future__ import annotations

from ...ir.errors import InputError


class GrammarError(InputError):
    """A grammar that is wrong, too large, or cannot be honoured."""

    def __init__(self, message: str, *, remedy: str = "", keyword: str | None = None) -> None:
        """`keyword`: of the JSON schema, where one is at fault."""
        super().__init__(message, remedy=remedy)
        self.keyword = keyword


def refused(
    path: str, keyword: str, why: str, remedy: str = "leave it out, and check the answer"
) -> GrammarError:
    """The error for a keyword at a JSON pointer."""
    return GrammarError(f"{keyword!r} of the schema at {path or '/'} {why}", remedy=remedy, keyword=keyword)
