"""The OpenAPI description against the server, by schemathesis: nothing it allows or forbids breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .server_harness import RunningServer, fake_llm, serving

schemathesis = pytest.importorskip("schemathesis")

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(fake_llm(context=64)) as running:
        yield running


@pytest.mark.parametrize("path", PATHS)
def test_no_generated_request_breaks_the_server(server: RunningServer, path: str):
    from hypothesis import HealthCheck, Phase, given, settings

    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = description[path]["POST"]
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
        assert answer.status_code in (200, 400, 404, 415), answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    check()
    assert statuses
    assert server.get("/health")[0] == 200
    assert server.idle()
