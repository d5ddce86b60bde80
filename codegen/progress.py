"""Parts of one progress bar."""

from __future__ import annotations

from ..passes.base import Progress


class Share:
    """Parts of one progress bar."""

    def __init__(self, progress: Progress, passes_end: float) -> None:
        self.progress = progress
        self.passes_end = passes_end

    def between(self, low: float, high: float) -> Progress:
        def report(what: str, share: float) -> None:
            self.progress(what, low + (high - low) * min(max(share, 0.0), 1.0))

        return report
