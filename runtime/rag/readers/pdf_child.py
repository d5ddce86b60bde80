"""The process that takes a PDF apart: run as a script with the file as standard input, so that whatever the
file does to pypdf ends here. Writes a JSON value a line: {"document": …} once, {"page": …} for each page, and
{"end": …}; or {"error": …, "remedy": …}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_MAX_OUTLINE = 5_000
_MAX_FIRST_PAGE = 20_000  # pieces of text whose size is looked at


def main() -> None:
    limits = json.loads(sys.argv[1])
    _bound(limits)
    try:
        import pypdf
    except ImportError:
        _say(error="PDF is read with pypdf, which is not installed", remedy="pip install 'llmc[rag]'")
        return
    try:
        reader = pypdf.PdfReader(sys.stdin.buffer, strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            _say(error="is encrypted", remedy="save it without a password")
            return
        total = len(reader.pages)
        _say(document={"title": _metadata(reader), "outline": _outline(reader), "pages": total})
    except Exception as error:  # noqa: BLE001  (pypdf raises nearly anything on a damaged file)
        _say(error=_damage(error), remedy="open it in a viewer and print it to a new PDF")
        return
    _pages(reader, total, limits)


def _bound(limits: dict[str, Any]) -> None:
    try:
        import resource
    except ImportError:  # not on this system: the parent's clock remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _say(**value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _damage(error: Exception) -> str:
    name = type(error).__name__
    if name == "DependencyError":
        return "is encrypted with AES, for which pypdf needs the package cryptography"
    if isinstance(error, MemoryError):
        return "takes too much memory to read"
    return f"is no readable PDF: {' '.join(str(error).split())[:200] or name}"


def _metadata(reader: Any) -> str:
    try:
        return str((reader.metadata or {}).get("/Title") or "")[:1000]
    except Exception:  # noqa: BLE001  (a damaged title is no title)
        return ""


def _outline(reader: Any) -> list[list[Any]]:
    """[level, title, page from 1] of each bookmark, in order."""
    found: list[list[Any]] = []
    try:
        waiting: list[tuple[int, Any]] = [(1, entry) for entry in reversed(reader.outline)]
        while waiting and len(found) < _MAX_OUTLINE:
            level, entry = waiting.pop()
            if isinstance(entry, list):
                if level < 20:
                    waiting += [(level + 1, inner) for inner in reversed(entry)]
                continue
            page = reader.get_destination_page_number(entry)
            if page is not None and page >= 0:
                found.append([level, str(entry.title)[:300], page + 1])
    except Exception:  # noqa: BLE001  (what is damaged in the outline is left out; the pages count)
        return found
    return found


def _pages(reader: Any, total: int, limits: dict[str, Any]) -> None:
    characters = 0
    for number in range(min(total, limits["pages"])):
        sizes: list[tuple[float, str]] = []
        try:
            if number == 0:
                text = reader.pages[0].extract_text(visitor_text=_measure(sizes))
            else:
                text = reader.pages[number].extract_text()
        except Exception as error:  # noqa: BLE001  (one damaged page is skipped; pypdf raises nearly anything)
            _say(page=number + 1, skipped=_damage(error).replace("PDF", "page"))
            continue
        characters += len(text)
        if characters > limits["characters"]:
            _say(end="characters")
            return
        _say(page=number + 1, text=text, largest=_largest(sizes))
    _say(end="pages" if total > limits["pages"] else "")


def _measure(sizes: list[tuple[float, str]]) -> Any:
    def visit(text: str, matrix: list[float], line: list[float], font: Any, size: float) -> None:
        if text.strip() and len(sizes) < _MAX_FIRST_PAGE:
            sizes.append((round(abs(size * line[3] * matrix[3]), 1), text))

    return visit


def _largest(sizes: list[tuple[float, str]]) -> str:
    """What is set largest on the page, where it is well above the rest: a title, more often than not."""
    if not sizes:
        return ""
    letters = sum(len(text) for _, text in sizes)
    largest = max(size for size, _ in sizes)
    passed = 0
    common = largest
    for size, text in sorted(sizes, key=lambda pair: pair[0]):
        passed += len(text)
        if passed * 2 >= letters:
            common = size
            break
    if largest < 1.15 * common:
        return ""
    return " ".join("".join(text for size, text in sizes if size == largest).split())[:400]


if __name__ == "__main__":
    main()
