"""One model on many machines: Ray Serve keeps N replicas of llmc's server and spreads the requests over them.

    pip install 'llmc' 'ray[serve]'
    python -m examples.ray_serve chat=model.llmc --replicas 2

Without RAY_ADDRESS, Ray is started on this machine alone. On a cluster, run this on one of its machines;
every machine needs llmc, Ray and the artifact at the same path. Each replica is a process with a KV cache of
its own. `docs/deploy.md` says what to watch.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "llmc"
SEQUENCES, QUEUE = 64, 256
DRAIN_SECONDS = 45.0


def application(
    artifacts: Mapping[str, str],
    *,
    replicas: int = 2,
    threads: int = 1,
    kv_tokens: int | None = None,
    api_keys: Sequence[str] = (),
) -> serve.Application:
    """A Ray Serve application that answers at every path of llmc's server.

    Args:
        artifacts: the names that requests use → paths on the machines.
        replicas: how many; Ray places them where there are `threads` CPUs left for each.
        threads: to compute with, a replica.
        kv_tokens: size of a replica's KV cache. None takes it from the free memory, which is right for one
            replica a machine and too much for several.
        api_keys: of which requests must bring one.
    """
    names = dict(artifacts)
    keys = tuple(api_keys)

    def build() -> FastAPI:
        """Runs in each replica, since neither a model nor its threads can be sent there."""
        import llmc
        from llmc.runtime.server import ServerSettings, create_app

        options: dict[str, Any] = {"threads": threads, "kv_tokens": kv_tokens, "max_sequences": SEQUENCES}
        models = {
            name: llmc.load(path, max_waiting=SEQUENCES + QUEUE, **options) for name, path in names.items()
        }
        return create_app(models, ServerSettings(api_keys=keys))

    @serve.ingress(build)
    class Replica:
        """Ray asks `check_health` every ten seconds, and replaces a replica that raises."""

        app: FastAPI

        def check_health(self) -> None:
            models = self.app.state.service.models
            dead = [name for name, model in models.items() if not model.llm.engine.alive]
            if dead:
                raise RuntimeError(f"the engine of {', '.join(dead)} has stopped")

    return serve.deployment(
        Replica,
        name=NAME,
        num_replicas=replicas,
        # Ray's own default, 5, would leave most of a batch empty. What is beyond this waits in Ray's proxy.
        max_ongoing_requests=SEQUENCES + QUEUE,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={"num_cpus": threads},
    ).bind()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve artifacts with Ray Serve.")
    parser.add_argument("artifacts", nargs="+", metavar="NAME=ARTIFACT")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPUs of a replica")
    parser.add_argument("--kv-tokens", type=int, help="size of a replica's KV cache")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    artifacts = dict(one.split("=", 1) for one in given.artifacts)
    key = os.environ.get("LLMC_API_KEY")
    serve.start(http_options={"host": given.host, "port": given.port})
    app = application(
        {name: os.path.abspath(path) for name, path in artifacts.items()},
        replicas=given.replicas,
        threads=given.threads,
        kv_tokens=given.kv_tokens,
        api_keys=[key] if key else [],
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        serve.run(app, name=NAME, blocking=True)
    except KeyboardInterrupt:
        serve.delete(NAME)  # replicas finish what they answer first, for DRAIN_SECONDS at most


if __name__ == "__main__":
    main()
