"""torch.export, quietly: what it logs and prints becomes one line of an error."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ..ir.errors import UnsupportedError
from .repeats import CannotRepeat

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """torch.export logs and prints what it raises as well, over many lines; the error says it in one."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    shapes: Any,
    name: str,
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """An ExportedProgram by torch.export, traced without Dynamo. Raises UnsupportedError with torch's first
    reason.
    """
    import torch

    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except CannotRepeat:
        raise
    except Exception as e:  # torch.export raises many kinds; all mean that the module cannot be traced
        raise UnsupportedError(
            f"{name} cannot be traced: {_first_reason(e)}",
            remedy="control flow and shapes must not depend on tensor values or on the number of tokens",
        ) from e


def _first_reason(error: Exception) -> str:
    """One line of torch.export's message: the first listed violation, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    listed = next((line.removeprefix("- ") for line in lines if line.startswith("- ")), lines[0])
    for advice in (" For more information", " If you're using mark_dynamic"):  # on torch's own interface
        listed = listed.partition(advice)[0]
    return listed[:300]
