"""How definitions begin in programming languages and configuration: patterns of one line, by suffix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

_NAME = r"[A-Za-z_$][\w$]{0,200}"


@dataclass(frozen=True)
class Language:
    """`definition` matches the first line of a definition, whose name is its group "name"; `container`
    matches those lines that members may follow, more deeply indented."""

    media_type: str
    suffixes: tuple[str, ...]
    definition: re.Pattern[str]
    container: re.Pattern[str] | None = None
    names: tuple[str, ...] = ()
    strings: tuple[str, ...] = ()  # marks that open and close text of several lines
    closed: re.Pattern[str] | None = None  # lines at the left margin that a definition goes on with


def _any_of(*patterns: str) -> re.Pattern[str]:
    # Names of groups must be unique in one pattern: each alternative gets a number, see name_of.
    numbered = (pattern.replace("(?P<name>", f"(?P<name{n}>") for n, pattern in enumerate(patterns))
    return re.compile("|".join(f"(?:{pattern})" for pattern in numbered))


def name_of(match: re.Match[str]) -> str:
    return next((value for value in match.groupdict().values() if value), "")


_MODIFIERS = (
    r"(?:(?:public|private|protected|internal|static|final|abstract|sealed|async|override|virtual|open|data|"
    r"export|default|declare|inline|const|constexpr|extern|unsafe|native|synchronized|partial|readonly|suspend)\s+)*"
)
_TYPES = (
    _MODIFIERS
    + r"(?:class|interface|enum(?: class)?|struct|record|trait|object|namespace|union|module)\s+"
    + rf"(?P<name>{_NAME})"
)
_C_FUNCTION = (
    r"(?!(?:return|else|if|for|while|switch|using|typedef|throw|new|delete|case)\b)"
    r"[A-Za-z_][\w:<>,*&\s\[\]]{0,200}?[\s*&](?P<name>~?[A-Za-z_][\w:~]{0,200})\s*\([^;]{0,500}$"
)
_PYTHON = _any_of(rf"(?:async\s+)?def\s+(?P<name>{_NAME})", rf"class\s+(?P<name>{_NAME})")

LANGUAGES = (
    Language(
        "text/x-python",
        ("py", "pyi", "pyw"),
        _PYTHON,
        re.compile(r"class\s"),
        strings=('"""', "'''"),
        closed=re.compile(r"[)\]}]|(?:else|elif|except|finally)\b"),
    ),
    Language(
        "text/javascript",
        ("js", "mjs", "cjs", "jsx", "ts", "tsx", "mts", "cts", "vue", "svelte"),
        _any_of(
            _MODIFIERS + rf"function\s*\*?\s*(?P<name>{_NAME})",
            _TYPES,
            _MODIFIERS + rf"type\s+(?P<name>{_NAME})\s*[=<]",
            rf"(?:export\s+)?(?:const|let|var)\s+(?P<name>{_NAME})\s*(?::[^=]{{1,200}})?=\s*(?:async\s*)?(?:function\b|\(|{_NAME}\s*=>)",
        ),
        strings=("`",),
    ),
    Language(
        "text/x-go",
        ("go",),
        _any_of(rf"func\s+(?:\([^)]{{0,200}}\)\s*)?(?P<name>{_NAME})", rf"type\s+(?P<name>{_NAME})\s"),
        strings=("`",),
    ),
    Language(
        "text/x-rust",
        ("rs",),
        _any_of(
            rf"(?:pub(?:\([^)]{{0,50}}\))?\s+)?(?:async\s+|const\s+|unsafe\s+|extern\s+\"C\"\s+)*fn\s+(?P<name>{_NAME})",
            rf"(?:pub(?:\([^)]{{0,50}}\))?\s+)?(?:struct|enum|trait|mod|union|type)\s+(?P<name>{_NAME})",
            r"(?:unsafe\s+)?impl\b(?:\s*<[^{]{0,100}>)?\s+(?P<name>[\w:<>&', ]{1,100}?)\s*(?:\{|where\b|$)",
            rf"macro_rules!\s*(?P<name>{_NAME})",
        ),
        re.compile(r"(?:unsafe\s+)?impl\b|(?:pub(?:\([^)]{0,50}\))?\s+)?(?:trait|mod)\s"),
    ),
    Language(
        "text/x-c",
        ("c", "h", "cc", "cpp", "cxx", "hpp", "hh", "hxx", "cu", "cuh", "m", "mm", "ino"),
        _any_of(_TYPES, rf"typedef\s+(?:struct|enum|union)\s+(?P<name>{_NAME})", _C_FUNCTION),
    ),
    Language(
        "text/x-java",
        ("java", "kt", "kts", "cs", "scala", "swift", "dart", "groovy"),
        _any_of(_TYPES, _MODIFIERS + rf"(?:fun|func|def)\s+(?P<name>{_NAME})", _C_FUNCTION),
        re.compile(_TYPES.replace("?P<name>", "")),
        strings=('"""',),
    ),
    Language(
        "text/x-ruby",
        ("rb", "rake", "ex", "exs", "cr"),
        _any_of(
            r"defp?\s+(?P<name>[\w.?!=]{1,200})",
            r"(?:class|module|defmodule)\s+(?P<name>[\w:.]{1,200})",
        ),
        re.compile(r"(?:class|module|defmodule)\s"),
    ),
    Language(
        "text/x-php",
        ("php",),
        _any_of(_TYPES, _MODIFIERS + rf"function\s+&?(?P<name>{_NAME})"),
        re.compile(_TYPES.replace("?P<name>", "")),
    ),
    Language(
        "text/x-shellscript",
        ("sh", "bash", "zsh", "fish", "ksh"),
        _any_of(r"function\s+(?P<name>[\w:.-]{1,200})", r"(?P<name>[\w:.-]{1,200})\s*\(\)"),
    ),
    Language("text/x-lua", ("lua",), _any_of(r"(?:local\s+)?function\s+(?P<name>[\w.:]{1,200})")),
    Language("text/x-perl", ("pl", "pm"), _any_of(r"sub\s+(?P<name>\w{1,200})")),
    Language("text/x-r", ("r",), _any_of(r"(?P<name>[\w.]{1,200})\s*(?:<-|=)\s*function\b")),
    Language(
        "text/x-sql",
        ("sql",),
        re.compile(
            r"(?i:create\s+(?:or\s+replace\s+)?(?:temp(?:orary)?\s+|unique\s+|materialized\s+)?"
            r"(?:table|view|function|procedure|index|trigger|type|schema)\s+(?:if\s+not\s+exists\s+)?)"
            r"(?P<name>[\w.\"`\[\]]{1,200})"
        ),
    ),
    Language(
        "text/x-proto",
        ("proto", "thrift", "graphql"),
        _any_of(rf"(?:message|service|enum|type|input|struct|interface)\s+(?P<name>{_NAME})"),
    ),
    Language(
        "application/toml",
        ("toml", "ini", "cfg", "conf", "properties", "desktop"),
        re.compile(r"\[{1,2}(?P<name>[^\[\]\n]{1,200})\]{1,2}\s*(?:[#;].*)?$"),
    ),
    Language("application/yaml", ("yaml", "yml"), re.compile(r"(?P<name>[\w./\"' -]{1,200}):(?:\s|$)")),
    Language("text/css", ("css", "scss", "less"), re.compile(r"(?P<name>[^\s{}/@;][^{};]{0,200}?)\s*\{")),
    Language(
        "text/x-makefile",
        ("mk", "cmake"),
        re.compile(r"(?P<name>[\w./-]{1,200})\s*:(?!=)"),
        names=("makefile", "dockerfile"),
    ),
)


def language_of(name: str) -> Language:
    base = PurePosixPath(name).name.lower()
    suffix = base.rpartition(".")[2]
    for language in LANGUAGES:
        if suffix in language.suffixes or base in language.names:
            return language
    return LANGUAGES[0]
