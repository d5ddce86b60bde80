"""The errors that llmc raises on purpose.

Each says, in one line, which file or tensor is concerned, what is wrong with it, and what to do about it.
The command line prints that line and leaves with `exit_code`; a bare traceback is a bug.
"""

from __future__ import annotations


class LlmcError(Exception):
    """The work failed.

    Args:
        message: what is wrong, naming the file, tensor, op or option; joined into one line.
        remedy: what the user can do, as an imperative ("pass --context 2048"); empty where nothing helps.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = " ".join(message.split())
        self.remedy = " ".join(remedy.split())
        super().__init__(self.message, self.remedy)

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The keyword argument would be lost by the default pickling, which worker processes use.
        return (_rebuild, (type(self), self.message, self.remedy))


class DeviceError(LlmcError):
    """A device has failed, and computes nothing more for this process."""


def _rebuild(kind: type[LlmcError], message: str, remedy: str) -> LlmcError:
    return kind(message, remedy=remedy)


class InputError(LlmcError):
    """The call or an input file is wrong: another call or another file would work."""

    exit_code = 2


class CompileError(LlmcError):
    """A pass or a target failed on a model that it claims to support."""


class VerifyError(LlmcError):
    """A graph breaks the rules of its op definitions or of its stage: a bug in whatever made it."""


class UnsupportedError(LlmcError):
    """The model uses something that llmc (or the chosen target) cannot compile."""


class ArtifactError(InputError):
    """An artifact is damaged, incomplete, from a newer llmc, or not an artifact."""
