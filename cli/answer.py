"""One answer: streamed as it comes, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.llm import LLM, Prompt
    from ..runtime.sampling_params import SamplingParams


@dataclass
class Answer:
    """Text, counts, and times in seconds."""

    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens that were computed, a second; None where it was too quick to tell."""
        computed = self.prompt_tokens - self.cached_tokens
        return round(computed / self.prefill_seconds, 2) if self.prefill_seconds > 0 else None

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens after the first one, a second; None for an answer of one token."""
        after = self.generated_tokens - 1
        return round(after / self.decode_seconds, 2) if after > 0 and self.decode_seconds > 0 else None

    def result(self) -> dict[str, Any]:
        """Its JSON."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
        }

    def speed(self) -> str:
        """One line for a person."""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        prompt = f"prompt {self.prompt_tokens} tokens{cached}"
        answer = f"answer {self.generated_tokens} tokens"
        prefill = f", {self.prefill_tok_s:.1f} tok/s" if self.prefill_tok_s else ""
        decode = f", {self.decode_tok_s:.1f} tok/s" if self.decode_tok_s else ""
        return f"[{prompt}{prefill}; {answer}{decode}]"


def stream_answer(llm: LLM, prompt: Prompt, params: SamplingParams, write: Callable[[str], None]) -> Answer:
    """Generates; `write` gets each new piece of text. Ctrl-C ends the answer with "cancelled"; no error."""
    answer = Answer()
    began = time.perf_counter()
    first = 0.0
    stream = llm.stream(prompt, params)
    try:
        for output in stream:
            now = time.perf_counter()
            if not answer.generated_tokens:
                first = now
                answer.prefill_seconds = now - began
            answer.decode_seconds = now - first
            answer.text += output.text
            answer.prompt_tokens, answer.cached_tokens = output.prompt_tokens, output.cached_tokens
            answer.generated_tokens = output.generated_tokens
            answer.finish_reason = output.finish_reason
            if output.text:
                write(output.text)
    except KeyboardInterrupt:
        answer.finish_reason = "cancelled"
    finally:
        stream.close()
    return answer
