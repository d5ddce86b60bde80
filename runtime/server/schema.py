"""Bodies of requests. Types are checked here, strictly; what values mean, and their bounds, where they are
used.

A field that is unknown is refused: an answer that left out half of what was asked for would look like a whole
one. Fields that only describe a request (`user`, `metadata`, …) are accepted and change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..tool_calls.base import MAX_TOOLS

MAX_MESSAGES = 4096
MAX_PROMPTS = 1024

_Names = Annotated[str, Field(max_length=512)]


class Body(BaseModel):
    """A JSON object with known fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class LoadAdapterRequest(Body):
    """POST /v1/load_lora_adapter: the names are vLLM's."""

    lora_name: _Names
    lora_path: Annotated[str, Field(max_length=4096)]
    base_model_name: _Names | None = None


class UnloadAdapterRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: _Names


class StreamOptions(Body):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """Fields that all generating requests share. The names below `seed` are vLLM's."""

    model: _Names | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    llmc_sampler: dict[str, Any] | None = None  # {"name": …, and its options}: a sampler of a plugin
    # Which describe the request, and change nothing here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatMessage(BaseModel):
    """A message; what clients send back of an earlier answer besides these fields is left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    structured_outputs: StructuredOutputs | None = None


class StructuredOutputs(Body):
    """vLLM's constraints that OpenAI's API lacks: exactly one of them."""

    json_schema: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = Field(None, max_length=1024)


class ResponsesRequest(Body):
    """POST /v1/responses: what the `openai` package's helper methods send, without stored conversations."""

    model: _Names | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: list[str] | None = Field(None, max_length=0)


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: _Names | None = None
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class RerankRequest(Body):
    """POST /v1/rerank, as Jina, Cohere and vLLM have it."""

    model: _Names | None = None
    query: str
    documents: list[str] = Field(min_length=1, max_length=MAX_PROMPTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages as the chat template renders them."""

    model: _Names | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: _Names | None = None
    tokens: list[int]


MAX_QUESTION = 20_000
"""Characters of a question to documents."""
MAX_PASSAGES = 100

_Mode = Literal["auto", "hybrid", "rrf", "graph", "global", "keyword", "dense"]


class RagSearchRequest(Body):
    """POST /v1/rag/search."""

    knowledge: _Names | None = None
    query: str = Field(min_length=1, max_length=MAX_QUESTION)
    top: int = Field(5, ge=1, le=MAX_PASSAGES)
    mode: _Mode = "auto"
    explain: bool = False
    per_document: int = Field(1, ge=1, le=MAX_PASSAGES)


class RagAnswerRequest(Body):
    """POST /v1/rag/answer."""

    knowledge: _Names | None = None
    question: str = Field(min_length=1, max_length=MAX_QUESTION)
    model: _Names | None = None
    stream: bool = False
    top: int = Field(5, ge=1, le=20)
    mode: _Mode = "auto"
    iterative: bool = False
    max_tokens: int | None = Field(None, ge=1, le=4096)


ChatRequest.model_rebuild()
CompletionRequest.model_rebuild()

FIELDS = frozenset(
    name
    for body in (
        ChatRequest, CompletionRequest, ResponsesRequest, EmbeddingRequest, RerankRequest, TokenizeRequest,
        DetokenizeRequest, RagSearchRequest, RagAnswerRequest,
    )
    for name in body.model_fields
)  # fmt: skip
"""Names of all fields of requests."""
