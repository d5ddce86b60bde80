"""The OpenAI-compatible server: `create_app(models, settings)` is an ASGI app, `run.run` serves it.

app.py          paths             middleware.py   keys, hosts, sizes
chat.py completions.py responses.py embeddings.py tokens.py   one file a family of endpoints
schema.py       bodies            wire.py         pieces of answers     streams.py   server-sent events
service.py      models, and a request's way through its engine          metrics.py   what Prometheus reads
static/         the web page
"""

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
