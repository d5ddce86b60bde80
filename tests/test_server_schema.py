"""The OpenAPI description against the server, by schemathesis: nothing it allows or forbids breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.server import ServerSettings

from .server_harness import RunningServer, fake_llm, serving

schemathesis = pytest.importorskip("schemathesis")

OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/embeddings",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/rag/knowledge",
    "GET /v1/rag/documents",
    "POST /v1/rag/documents",
    "GET /v1/rag/documents/{id}",
    "DELETE /v1/rag/documents/{id}",
    "POST /v1/rag/search",
    "POST /v1/rag/answer",
    "GET /v1/rag/graph",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    place = tmp_path_factory.mktemp("documents") / "notes.kb"
    settings = ServerSettings(documents_writable=True)
    with KnowledgeBase.open(place, embedder="none", create=True) as base:
        base.add_bytes("ada.md", b"# Ada\n\nAda was born in London.")
        with serving(fake_llm(context=64), settings, {"notes": base}) as running:
            yield running


@pytest.mark.parametrize("named", OPERATIONS)
def test_no_generated_request_breaks_the_server(server: RunningServer, named: str):
    from hypothesis import HealthCheck, Phase, given, settings

    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    method, path = named.split(" ")
    operation = description[path][method]
    statuses: set[int] = set()

    @settings(
        max_examples=60,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case) -> None:
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 201, 400, 404, 409, 415), answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    check()
    assert statuses
    assert server.get("/health")[0] == 200
    assert server.idle()
