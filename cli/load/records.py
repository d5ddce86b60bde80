"""What one request was and what came of it, in seconds of one clock: what all statistics are made from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to send: `at` seconds after the start (0 in a closed loop), and the lengths it should have.

    `blocks` are the prompt's shared pieces by number, each of `BLOCK_TOKENS` tokens, where a trace says so:
    the same number means the same tokens, so that a server's prefix cache meets what the trace's did.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no complete answer: `kind` is `connect`, `timeout`, `disconnected`, `malformed`,
    `error_event` (an error inside the stream), `no_output`, or `http_` and the status.
    """

    kind: str
    detail: str = ""


@dataclass(slots=True)
class Record:
    """One request that was sent. `scheduled` is when it was due, `started` when it was sent.

    `chunks` are the times when a piece of the answer came, one for each server-sent event that carries a
    token; `ended` is when the stream was over. `prompt_tokens` and `output_tokens` are those that the server
    counted (`usage`); 0 and the number of chunks where it counted none (`counted` is False).
    """

    arrival: Arrival
    scheduled: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    chunks: list[float] = field(default_factory=list[float])
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    failure: Failure | None = None

    @property
    def ttft(self) -> float:
        """Seconds from sending the request to the first piece of the answer."""
        return self.chunks[0] - self.started

    @property
    def latency(self) -> float:
        """Seconds from sending the request to the last piece of the answer (E2EL)."""
        return self.chunks[-1] - self.started

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for an answer of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between one piece of the answer and the next."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]
