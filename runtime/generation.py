"""One choice of one request while it is generated: sampling state, text, and when it stops."""

from __future__ import annotations

import secrets
from array import array
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..ir.errors import LlmcError
from .adapters import LoadedAdapter
from .custom_sampler import SequenceSampler
from .detokenizer import StopStrings, StreamDecoder
from .drafters import Patience
from .grammar import Matcher
from .sampler import SamplerRow, TokenLogprob, token_logprob
from .sampling_params import SamplingParams
from .sequence import Sequence
from .tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(slots=True)
class StepOutput:
    """What one step added to one choice of a request."""

    request_id: str
    index: int
    """Number of the choice, from 0."""
    token_ids: list[int] = field(default_factory=list)
    """New tokens, several where a grammar left no choice; the one that ended the answer is among them."""
    text: str = ""
    """New text: whole characters, and nothing that may still turn out to be a stop string."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each new token, where they were asked for."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """One for each token of the prompt, the first None, in the first output of a choice that asked for them.
    """
    finish_reason: FinishReason | None = None
    """"stop": end of text, stop token or stop string, or the grammar is complete.

    "length": `max_tokens` or the context. None: more will come.
    """
    stop_reason: str | int | None = None
    """The stop string or stop token that ended it; None for the model's own end of text."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values came from the prefix cache."""
    generated_tokens: int = 0
    """Tokens of this choice so far."""
    error: LlmcError | None = None


class Request:
    """A prompt with its parameters. Made by `Engine.make_request`, which checks it."""

    __slots__ = (
        "adapter",
        "arrival",
        "cached_tokens",
        "eos",
        "id",
        "live",
        "max_tokens",
        "params",
        "prompt",
        "seed",
    )

    def __init__(
        self,
        request_id: str,
        prompt: array[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        eos: Seq[int],
        adapter: LoadedAdapter | None = None,
    ):
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.adapter = adapter
        self.max_tokens = max_tokens
        ignore_eos = params.ignore_eos and params.grammar is None
        self.eos = frozenset() if ignore_eos else frozenset(eos)
        self.seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self.arrival = 0
        self.cached_tokens = 0
        self.live: list[Generation] = []


class Generation(Sequence):
    """A sequence with all that turns its logits into an answer."""

    __slots__ = (
        "choice",
        "decoder",
        "forced",
        "matcher",
        "patience",
        "prompt_logprobs",
        "request",
        "sampler",
        "started",
        "stops",
    )

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        params = request.params
        super().__init__(request.prompt, (request.arrival, 0), slots=params.n)
        self.use(request.adapter)
        self.request = request
        self.choice = 0
        endings = request.eos | frozenset(params.stop_token_ids)
        self.sampler = SamplerRow(params, request.prompt, seed=request.seed, choice=0, stops=sorted(endings))
        if params.sampler is not None:
            self.sampler.custom = SequenceSampler(params.sampler, self, tokenizer)
        skip = params.skip_special_tokens
        self.decoder = StreamDecoder(tokenizer, skip_special_tokens=skip) if tokenizer is not None else None
        self.stops = StopStrings(params.stop)
        self.patience = Patience()
        self.started = False  # whether a step has computed part of it
        self.matcher = params.grammar.start() if params.grammar is not None else None
        # Tokens that the grammar leaves no choice about: the next ones of the answer, whatever the model
        # says.
        self.forced: deque[int] = deque(self.matcher.forced() if self.matcher is not None else ())
        self.prompt_logprobs: list[TokenLogprob | None] = []
        if params.prompt_logprobs is not None:
            self.score_end = self.num_prompt - 1
            self.prompt_logprobs.append(None)

    def fork(self, choice: int) -> Generation:
        """Another choice of the request; the scheduler makes it share this one's pages."""
        child = object.__new__(Generation)
        Sequence.__init__(child, (), (self.request.arrival, choice))
        child.request = self.request
        child.choice = choice
        child.sampler = self.sampler.fork(choice)
        if self.sampler.custom is not None:
            child.sampler.custom = self.sampler.custom.for_choice(child, choice)
        child.decoder = self.decoder.fork() if self.decoder is not None else None
        child.stops = self.stops.fork()
        child.started = True
        child.patience = Patience()
        child.matcher = self.matcher.fork() if self.matcher is not None else None
        child.forced = deque(self.forced)
        child.prompt_logprobs = self.prompt_logprobs
        return child

    @property
    def needs_mask(self) -> bool:
        """Whether the grammar has a say in the next token, and leaves more than one."""
        return self.matcher is not None and not self.forced and self.request.max_tokens > 0

    @property
    def jumps(self) -> bool:
        """Whether forced tokens are added without a step for each: not where their log probabilities are
        asked for. The tokens are the same.
        """
        return self.request.params.logprobs is None

    def note_prompt(self, rows: np.ndarray) -> None:
        """Take the logits [R, vocab] of the next tokens of the prompt that are scored."""
        top = self.request.params.prompt_logprobs
        assert top is not None
        for row in rows:
            self.scored += 1
            self.prompt_logprobs.append(token_logprob(row, self.tokens[self.scored], top))

    def _output(self) -> StepOutput:
        output = StepOutput(self.request.id, self.choice)
        output.prompt_tokens, output.cached_tokens = self.num_prompt, self.request.cached_tokens
        if not self.num_generated:
            output.prompt_logprobs = list(self.prompt_logprobs)
        return output

    def finish_scoring(self) -> list[StepOutput]:
        """The only outputs of a request that wanted its prompt scored and no token: one for each choice."""
        outputs: list[StepOutput] = []
        for choice in range(self.slots):
            output = self._output()
            output.index, output.finish_reason = choice, "length"
            outputs.append(output)
        return outputs

    @property
    def can_guess(self) -> bool:
        """Whether its next tokens depend on the logits alone, and several may follow."""
        return (
            self.remaining == 1
            and self.matcher is None
            and not self.sampler.adjusts
            and self.request.max_tokens - self.num_generated > 1
        )

    def add_draft(self, guesses: Seq[int]) -> None:
        """Append guesses, to be computed with the last token."""
        self.tokens.extend(guesses)
        self.drafted = len(guesses)

    def keep_draft(self, count: int) -> None:
        """Only the first `count` guesses."""
        self.drop_last(self.drafted - count)
        self.drafted = count

    def cut_draft(self) -> None:
        """No guesses."""
        self.keep_draft(0)

    def check_draft(self, tokens: Seq[int]) -> int:
        """How many guesses are the tokens that the model gives, from the first one on; those are guesses no
        longer, and the others go.
        """
        guesses = self.tokens[len(self.tokens) - self.drafted :]
        right = 0
        while right < self.drafted and guesses[right] == tokens[right]:
            right += 1
        self.keep_draft(right)
        self.drafted = 0
        self.patience.note(right)
        return right

    @property
    def num_guessed_from(self) -> int:
        """Generated tokens before the guesses."""
        return self.num_generated - self.drafted

    def drop_last(self, count: int) -> None:
        """Take the last tokens away."""
        del self.tokens[len(self.tokens) - count :]

    def advance(self, tokens: Seq[int], logprobs: Seq[TokenLogprob | None]) -> StepOutput:
        """Take the sampled tokens up to the one that ends the answer, and those that follow from them; -1
        says that the logits were broken.
        """
        output = self._output()
        for token, logprob in zip(tokens, logprobs, strict=True):
            if output.finish_reason is None:
                self._advance(token, logprob, output)
        output.generated_tokens = self.num_generated
        return output

    def _advance(self, token: int, logprob: TokenLogprob | None, output: StepOutput) -> None:
        failure = self.matcher.error if self.matcher is not None else None
        if failure is None and self.sampler.custom is not None:
            failure = self.sampler.custom.failure
        if token < 0 or failure is not None:
            output.finish_reason = "error"
            output.error = failure or LlmcError(
                f"request {self.request.id}: the model gave no finite logit at token {len(self.tokens)}",
                remedy="the artifact may be broken: compare it with its source by llmc eval --against",
            )
            return
        self._take(token, output)
        if logprob is not None:
            output.logprobs.append(logprob)
        while self.forced and self.jumps and output.finish_reason is None:
            self._take(self.forced[0], output)

    def _take(self, token: int, output: StepOutput) -> None:
        self.tokens.append(token)
        self.sampler.note(token)
        output.token_ids.append(token)
        if self.matcher is not None:
            self._follow(self.matcher, token, output)
        self._decide(token, output)

    def _follow(self, matcher: Matcher, token: int, output: StepOutput) -> None:
        """Go on in the grammar by a token that it allows."""
        if self.forced:
            expected = self.forced.popleft()
            assert token == expected, "a forced token was passed over"
        matcher.accept(token)
        if matcher.error is not None:
            output.finish_reason, output.error = "error", matcher.error
        elif not self.forced and not matcher.is_finished:
            self.forced.extend(matcher.forced())

    def _decide(self, token: int, output: StepOutput) -> None:
        """Set the text and the reason to stop, if there is one."""
        params, count = self.request.params, self.num_generated
        completed = self.matcher is not None and self.matcher.is_finished
        may_stop = count >= params.min_tokens or completed
        ended_by_token = may_stop and (token in self.request.eos or token in params.stop_token_ids)
        if self.decoder is not None:
            self._add_text(token, output, may_stop=may_stop, hide=ended_by_token)
        if output.finish_reason is not None:
            return
        if ended_by_token:
            output.finish_reason = "stop"
            output.stop_reason = None if token in self.request.eos else token
        elif completed:
            output.finish_reason = "stop"
        elif count >= self.request.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None and self.decoder is not None:
            self._flush(output)

    def _add_text(self, token: int, output: StepOutput, *, may_stop: bool, hide: bool) -> None:
        assert self.decoder is not None
        text = "" if hide else self.decoder.push(token)
        output.text += self._through_stops(text, output) if may_stop else text

    def _flush(self, output: StepOutput) -> None:
        """The text that was held back, now that no token follows."""
        assert self.decoder is not None
        output.text += self._through_stops(self.decoder.finish(), output)
        output.text += self.stops.finish()

    def _through_stops(self, text: str, output: StepOutput) -> str:
        shown = self.stops.push(text)
        if self.stops.found is not None:
            output.finish_reason = "stop"
            output.stop_reason = self.stops.found
        return shown
