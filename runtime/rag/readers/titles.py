"""Titles: the line of a plain text that is one, metadata that is worth believing, and names of files."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import unquote

MAX_TITLE = 120
_LONGEST = 300  # where the text itself says "Title:"

_LABELLED = re.compile(r"(?:title|titel|titre|título|titolo)\s*[:：]\s*(\S.*)", re.IGNORECASE)
_ATX = re.compile(r"#{1,6}\s+(\S.*)")
_ABBREVIATED = re.compile(
    r"(?:\b(?:Jr|Sr|Inc|Ltd|Co|Corp|Bros|St|Mt|Dr|Vol|Pt|No|Ph\.D|etc|[A-Z])|\.[A-Za-z])\.$", re.IGNORECASE
)
_LETTER = re.compile(r"[^\W\d_]")
_LETTERS = re.compile(r"[^\W\d_]+")
_LIST = re.compile(r"(?:[-*•+>|]|\d{1,3}[.)])\s")
_SENTENCE_END = tuple(".!?…。！？;:,、，；：")
_DANGLING_WORDS = """
a an the of and or to in on at by for from with as is was are were be been that which who whose this its
his her their it he she they has have had but nor so than then into over under after before when while
"""
_DANGLING = frozenset(_DANGLING_WORDS.split())

_TOOLS = re.compile(
    r"(?:microsoft (?:word|powerpoint|excel)|powerpoint presentation|slide 1$)", re.IGNORECASE
)
_PLACEHOLDER = re.compile(
    r"(?:(?:untitled|unknown|no title|title|document|presentation|dokument|word document|new document|"
    r"template|print|default|null|none|\(anonymous\)|anonymous|unbenannt)[\s\d.]*)",
    re.IGNORECASE,
)
_FILE_LIKE = re.compile(
    r"\S*\.(?:docx?|pdf|dvi|tex|ps|pptx?|xlsx?|rtf|odt|html?|txt|md|indd|qxd|pmd|p65|fm)", re.IGNORECASE
)

_HASH = re.compile(r"(?=[0-9a-f-]*[0-9])[0-9a-f]{8,}(?:-[0-9a-f]{2,})*", re.IGNORECASE)
_RANDOM = re.compile(r"(?=[^\W_]*\d[^\W_]*[^\W\d_])[^\W_]{20,}")
_GENERIC_WORDS = """
doc docs document file text txt page passage para paragraph chunk item row record entry article art part
data dataset corpus sample example test train dev img image scan output out export untitled unnamed new
copy download index readme license notice changelog default main content contents id wiki ctx context no
nr note notes temp tmp a p d s of
"""
_GENERIC = frozenset(_GENERIC_WORDS.split())
_NUMBERING = re.compile(r"(?:0\d*(?=[ ._-])|\d{1,4}[.)](?=\s|\D)|\d{1,4}\s+-\s)[ ._-]*")
_LANGUAGE = re.compile(r"\.(?:tar|[a-z]{2})$")  # page.en.html
_SUFFIX = re.compile(r"\.(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{1,8}$")


def split_title(text: str) -> tuple[str, int]:
    """The title that a plain text begins with, and where the rest begins; ("", 0) where it begins without.

    A title is a line that says so (`Title: …`, `# …`), or a short one that ends no sentence, before a blank
    line or before prose.
    """
    start = len(text) - len(text.lstrip())
    first, first_end = _line(text, start)
    line = first.strip()
    rest = _skip_space(text, first_end)
    if rest >= len(text):
        return "", 0
    for pattern in (_LABELLED, _ATX):
        said = pattern.fullmatch(line) if len(line) <= _LONGEST else None
        if said:
            return said[1].rstrip("# \t").strip("\"'“”") or said[1], rest
    if not _could_be_title(line):
        return "", 0
    following, _ = _line(text, rest)
    following = following.strip()
    blank = "\n" in text[first_end + 1 : rest]
    if blank and (not line.endswith((".", "?", "!")) or _ABBREVIATED.search(line) or len(line) <= 60):
        return line, rest
    return (line, rest) if not blank and _is_prose_after(line, following) else ("", 0)


def _line(text: str, start: int) -> tuple[str, int]:
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    return text[start : min(end, start + 100_000)], end


def _skip_space(text: str, start: int) -> int:
    found = re.compile(r"\S").search(text, start)
    return found.start() if found else len(text)


def _could_be_title(line: str) -> bool:
    words = line.split()
    if not line or len(line) > MAX_TITLE or len(words) > 20 or not _LETTER.search(line) or _LIST.match(line):
        return False
    if words[-1].casefold() in _DANGLING and len(words) > 3:
        return False
    if line.endswith((".", "…")) and not _ABBREVIATED.search(line):
        return False
    if line.endswith(("?", "!")):
        return len(words) <= 10
    return line.endswith(".") or not line.endswith(_SENTENCE_END)


def _is_prose_after(line: str, following: str) -> bool:
    """Whether the line below, with no blank one between, is the text that a title stands over: prose, and not
    the rest of a sentence that was broken into lines."""
    if not following or following[0].islower() or _LIST.match(following):
        return False
    if len(following) >= max(80, 1.5 * len(line)):
        return True
    ends = following.endswith((".", "!", "?", "。", "！", "？"))
    return ends and len(line.split()) <= 12 and len(line) <= 60 and len(following.split()) >= 3


def sensible(title: str) -> str:
    """A title from metadata, cleaned; "" where it is a program's placeholder or a file's name."""
    title = " ".join(title.replace("\x00", " ").split())
    if _TOOLS.match(title):  # "Microsoft Word - report.doc"
        return ""
    if not 1 <= len(title) <= _LONGEST or not _LETTER.search(title):
        return ""
    if (
        _PLACEHOLDER.fullmatch(title)
        or _FILE_LIKE.fullmatch(title)
        or title.startswith(("/", "file:", "http"))
    ):
        return ""
    letters = len(_LETTER.findall(title))
    return title if letters * 3 >= len(title.replace(" ", "")) else ""


def title_from_name(name: str) -> str:
    """A title out of a file's name, where that reads as words: `films/Ed_Wood_(film).txt` → "Ed Wood (film)";
    "" for `00017.txt`, `doc_12.txt`, hashes and the like."""
    stem = PurePosixPath(name.replace("\\", "/")).name
    stem = _SUFFIX.sub("", stem) or stem
    stem = _LANGUAGE.sub("", stem) or stem
    stem = unquote(stem)
    if _HASH.fullmatch(stem) or _RANDOM.fullmatch(stem):
        return ""
    stem = _NUMBERING.sub("", stem, count=1) if _NUMBERING.match(stem) else stem
    words = stem.replace("_", " ").replace("+", " ")
    if " " not in words.strip() and (words.count("-") > 1 or ("-" in words and words.islower())):
        words = words.replace("-", " ")
    if " " not in words.strip() and "." in words:
        words = words.replace(".", " ")
    words = " ".join(words.split()).strip(" -.")
    if len(_LETTER.findall(words)) < 2 or len(words) > 200:
        return ""
    if _GENERIC.issuperset(word.casefold() for word in _LETTERS.findall(words)):
        return ""
    if any(_HASH.fullmatch(word) or _RANDOM.fullmatch(word) for word in words.split()):
        return ""
    return words
