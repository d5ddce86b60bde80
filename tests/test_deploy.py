"""What `docs/deploy.md` tells people to use: images, dashboards, proxies, units, Ray Serve."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from llmc.cli.serve import command as serve
from llmc.runtime.server import ServerSettings
from llmc.runtime.server.metrics import Metrics

from .conftest import ROOT
from .server_harness import RunningServer, fake_llm, serving, wait_until

yaml = pytest.importorskip("yaml")
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/llmc.json").read_text())


def exported() -> set[str]:
    """Every name that /metrics knows: counters end in _total, histograms have buckets."""
    metrics = Metrics()
    metrics.watch({})
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", metrics.page().decode(), re.MULTILINE))
    names = {name for name, kind in kinds.items() if kind in ("counter", "gauge")}
    return names | {
        f"{name}_{part}"
        for name, kind in kinds.items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }


# Prometheus and Grafana -------------------------------------------------------------------------------------


def test_the_dashboard_asks_for_what_the_server_exports() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\b(?:vllm|llmc):\w+", query)}
    assert len(asked) >= 12
    assert asked <= exported()


def test_the_dashboard_holds_together() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            # Where every model shows, each series says which one it is.
            assert "model_name" in target["expr"] or "llmc:requests_refused" in target["expr"]
    (source,) = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {f"${{{source['name']}}}"}


def test_provisioning_names_what_compose_mounts() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    mounts = dict(one.split(":")[:2] for one in compose["services"]["grafana"]["volumes"])
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/llmc.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/llmc.json"
    for service in compose["services"].values():
        for source, *_ in (one.split(":") for one in service["volumes"]):
            assert not source.startswith("./deploy") or (ROOT / source).exists()
    data = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert data["datasources"][0]["url"] == "http://prometheus:9090"
    assert job["static_configs"] == [{"targets": ["llmc:8000"]}]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose["secrets"][secret] == {"environment": "LLMC_API_KEY"}


# The image --------------------------------------------------------------------------------------------------


def test_the_image_copies_every_folder_of_the_package_and_compose_builds_it() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    setup = (ROOT / "setup.py").read_text()
    folders = set(re.findall(r'"(\w+)"', setup[setup.index("FOLDERS") : setup.index(")")])) | {"llmc"}
    assert folders <= copied
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for name in copied if not name.startswith("--") and name != "/opt/llmc"} == allowed
    assert all((ROOT / name).exists() for name in allowed)
    stages = [line.split(" AS ")[1] for line in lines if line.startswith("FROM ")]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert compose["services"]["llmc"]["build"]["target"] in stages
    assert stages[-1] == "serve", "what is built without --target"


def test_nothing_runs_as_root_or_listens_to_everybody() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    assert docker.index("USER 10001") < docker.index("ENTRYPOINT")
    for service in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]


def _words(text: str) -> list[str]:
    return [word for word in text.split() if word.startswith("--")]


def test_the_options_that_deployments_pass_exist() -> None:
    options = {name for parameter in serve.params for name in parameter.opts}
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["llmc"]
    unit = (DEPLOY / "llmc.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    (image,) = re.findall(r"^CMD (\[\"serve.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    passed = {*_words(" ".join(compose["command"])), *_words(start), *_words(" ".join(json.loads(image)))}
    assert passed and passed <= options
    # What runs is finished before it is killed.
    drain = int(compose["command"][compose["command"].index("--drain-timeout") + 1])
    assert int(compose["stop_grace_period"].removesuffix("s")) > drain
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) > int(start.split("--drain-timeout ")[1].split()[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "llmc.service"
    unit.write_text((DEPLOY / "llmc.service").read_text().replace("/opt/llmc/bin/llmc", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0 and "llmc.service" not in done.stderr, done.stderr


# Proxies ----------------------------------------------------------------------------------------------------

HOST = "llm.example.org"


class Permits:
    """In the place of a gated executor's gate: lets so many steps through, then holds the engine."""

    def __init__(self, count: int) -> None:
        self._semaphore = threading.Semaphore(count)

    def wait(self, timeout: float) -> bool:
        return self._semaphore.acquire(timeout=timeout)

    def set(self) -> None:
        self._semaphore.release(10_000)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def nginx(folder: Path, server: RunningServer, port: int) -> list[str]:
    text = (DEPLOY / "nginx.conf").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    text = re.sub(r"^ *(listen \[::\]|ssl_).*\n", "", text, flags=re.MULTILINE)
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
    (folder / "nginx.conf").write_text(f"{main} http {{ access_log off; {paths} {text} }}")
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "log")]


def caddy(folder: Path, server: RunningServer, port: int) -> list[str]:
    text = (DEPLOY / "Caddyfile").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    text = text.replace(f"{HOST} {{", f"http://{HOST}:{port} {{")
    (folder / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https off\n}\n" + text)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    environment = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or _accepts(port))
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            yield
        finally:
            process.terminate()


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.parametrize("proxy", [nginx, caddy])
def test_a_proxy_sends_tokens_on_at_once_and_tells_when_a_client_goes(proxy: Any, tmp_path: Path) -> None:
    if shutil.which(proxy.__name__) is None:
        pytest.skip(f"no {proxy.__name__} here")
    llm = fake_llm()
    permits = Permits(4)
    llm.executor.gate = permits  # type: ignore[attr-defined]  (it is a gated one)
    port = free_port()
    with (
        serving(llm, ServerSettings(allowed_hosts=(HOST,))) as server,
        running(proxy(tmp_path, server, port), port, tmp_path),
    ):
        client = HTTPConnection("127.0.0.1", port, timeout=20)
        client.request("GET", "/metrics", headers={"Host": HOST})
        answer = client.getresponse()
        assert (answer.status, answer.read()[:0]) == (404, b"")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
        body |= {"stream": True, "ignore_eos": True}
        headers = {"Host": HOST, "Origin": f"http://{HOST}", "Content-Type": "application/json"}
        client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = client.getresponse()
        assert answer.status == 200, answer.read()
        # The engine stands still after four steps: what comes now was held back by nobody.
        seen = ""
        while '"content":"' not in seen.replace('"content":""', ""):
            line = answer.readline().decode()
            assert line, seen
            seen += line
        client.close()
        answer.close()
        # The engine still stands: it is the proxy that tells, not a failed write of further tokens.
        wait_until(
            lambda: 'finished_reason="abort",model_name="tiny"} 1.0' in server.service.metrics.page().decode()
        )
        permits.set()
        wait_until(server.idle)


# Ray Serve --------------------------------------------------------------------------------------------------


def _replicas(root: int) -> int:
    """Ray's replicas among the descendants of a process."""
    psutil = pytest.importorskip("psutil")
    found = psutil.Process(root).children(recursive=True)
    return sum(" ".join(one.cmdline()).startswith("ray::ServeReplica") for one in found if one.is_running())


@pytest.mark.slow
def test_two_replicas_of_ray_serve(tiny_folder: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'ray[serve]'")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two replicas need two CPUs")
    pytest.importorskip("torch")
    openai = pytest.importorskip("openai")
    import llmc

    llmc.compile(tiny_folder("llama"), tmp_path / "tiny.llmc", targets=["onnx-cpu"])
    port = free_port()
    words = [sys.executable, "-m", "examples.ray_serve", f"tiny={tmp_path}/tiny.llmc", f"--port={port}"]
    words += ["--replicas=2", "--kv-tokens=2048"]
    # Ray writes a key for its own cluster to the home folder.
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "LLMC_API_KEY": "k3y"}
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log) as process:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k3y", max_retries=0)
            wait_until(lambda: process.poll() is not None or _answers(client), 120)
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert _replicas(process.pid) == 2
            _ask(openai, client, port)
        finally:
            process.terminate()
            process.wait(60)


def _answers(client: Any) -> bool:
    try:
        return [model.id for model in client.models.list()] == ["tiny"]
    except Exception:  # noqa: BLE001  (whatever is wrong while it starts)
        return False


def _ask(openai: Any, client: Any, port: int) -> None:
    """Streamed and whole answers agree, keys are asked for, and both replicas have answered."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
    }
    asked |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens == 8
    with client.chat.completions.create(**asked, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").chat.completions.create(**asked)
    with pytest.raises(openai.NotFoundError, match="there are: tiny"):
        client.chat.completions.create(**{**asked, "model": "other"})

    def totals() -> set[str]:
        """Tokens that a replica has generated, by all the replicas that the proxy shows."""
        client.chat.completions.create(**asked)
        return {_total(port) for _ in range(10)}

    wait_until(lambda: len(totals()) > 1)


def _total(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics", headers={"Authorization": "Bearer k3y"})
    page = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r'^vllm:generation_tokens_total{model_name="tiny"} (\S+)$', page, re.MULTILINE)
    return found[1] if found else "0"
