"""Runs this package's runtime as another processor would, under qemu's user emulation: an x86-64 that knows
no more than AVX2, and an aarch64 with a Python of its own, which is fetched from Debian and PyPI once and
kept beside the models of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published_models import cache_folder

from .conftest import ROOT

FOLDER = cache_folder() / "aarch64"
_DEBIAN = ("python3.13-minimal", "libpython3.13-stdlib", "libc6", "libstdc++6")
_WHEELS = ("numpy==2.4.6", "ml-dtypes==0.6.0", "packaging==26.4")
_UNUSED = ("debconf", "tzdata", "netbase", "media-types", "readline-common", "openssl-provider")
PROGRAM = """
import json, sys
import numpy as np
from llmc.codegen.artifact import Artifact
from llmc.runtime.executor import StepInputs, open_executor

path, isa, prompt, count = json.load(sys.stdin)
executor = open_executor(Artifact.open(path, "size"), isa=isa, threads=2)
pages = -(-(len(prompt) + count) // executor.page_size)
executor.allocate_kv(pages + 1)
whole = lambda values: np.array(values, np.int32)

def step(tokens, start):
    places = range(start, start + len(tokens))
    slots = [executor.page_size + p for p in places]  # pages 1, 2, ...
    table = [list(range(1, pages + 1))]
    return executor.step(StepInputs(
        token_ids=whole(tokens), positions=whole(places), slot_mapping=whole(slots),
        query_start=whole([0, len(tokens)]), context_len=whole([start + len(tokens)]),
        block_table=whole(table), output_index=whole(range(len(tokens))),
    )).copy()

first = logits = step(prompt, 0)
tokens = []
for at in range(len(prompt), len(prompt) + count):
    tokens.append(int(logits[-1].argmax()))
    logits = step(tokens[-1:], at)
print(json.dumps({"isa": executor.isa, "tokens": tokens, "first": first.tolist(), "last": logits.tolist()}))
"""
"""Greedy tokens of a prompt, by the executor alone; logits of all its tokens, and of the last one generated.
No level given: the best of the processor.
"""


def greedy(
    command: Sequence[str], artifact: Path, isa: str | None, prompt: Sequence[int], count: int, **more: str
) -> dict[str, Any]:
    """What PROGRAM prints, run by a Python that is called by `command`; `more`: variables."""
    given = json.dumps([str(artifact), isa, list(prompt), count])
    done = subprocess.run(
        [*command, "-P", "-c", PROGRAM],  # -P: no folder of the checkout is a package of that Python
        input=given,
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **more},
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def emulator(machine: str) -> str:
    """The program that emulates a machine; skips the test where it is not installed."""
    found = shutil.which(f"qemu-{machine}")
    if found is None:
        pytest.skip(f"needs qemu-{machine} (Debian: apt-get install qemu-user)")
    return found


def native() -> list[str]:
    """The command of this Python."""
    return [sys.executable]


def haswell() -> list[str]:
    """The command of this Python on an x86-64 with AVX2 and nothing later."""
    return [emulator("x86_64"), "-cpu", "Haswell", sys.executable]


def aarch64(cpu: str) -> tuple[list[str], dict[str, str]]:
    """The command of a Python on an aarch64 of qemu's name `cpu`, and its variables. Skips the test where
    there is no emulator, or what it needs can be neither found nor fetched.
    """
    found = emulator("aarch64")
    ready = FOLDER / "ready"
    if not ready.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        try:
            _fetch(FOLDER)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no Python for aarch64: {error}")
        ready.touch()
    package = FOLDER / "package"
    shutil.rmtree(package, ignore_errors=True)
    _link_package(package / "llmc")
    root = FOLDER / "root"
    command = [found, "-cpu", cpu, "-L", str(root), str(root / "usr/bin/python3.13")]
    return command, {"PYTHONPATH": f"{FOLDER / 'site'}:{package}"}


def _link_package(folder: Path) -> None:
    """The package as an installation has it: `llmc`, and the top-level folders inside of it."""
    folder.mkdir(parents=True)
    inside = list((ROOT / "llmc").iterdir())
    top = {path.parent for path in ROOT.glob("[a-z]*/*.py")}
    outside = ("llmc", "tests", "benchmarks", "examples")
    for path in (*inside, *(path for path in top if path.name not in outside)):
        (folder / path.name).symlink_to(path)


def _fetch(folder: Path) -> None:
    """Debian's packages by apt with folders of its own, which need no rights and change nothing of the
    system; wheels by pip.
    """
    state, cache = folder / "apt/state", folder / "apt/cache"
    for path in (state / "lists/partial", cache / "archives/partial", folder / "site"):
        path.mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": cache,
    }
    apt = ["apt-get", "-q", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]
    _run(*apt, "update")
    _run(*apt, "install", "-y", "--download-only", "--no-install-recommends", *_DEBIAN)
    root = folder / "root"
    for archive in sorted((cache / "archives").glob("*.deb")):
        if not archive.name.startswith(_UNUSED):
            _run("dpkg-deb", "-x", str(archive), str(root))
    (root / "lib").symlink_to("usr/lib")
    shutil.rmtree(folder / "apt")
    platforms = [f"--platform=manylinux{name}_aarch64" for name in ("_2_28", "_2_17", "2014")]
    wanted = ["--python-version=3.13", "--implementation=cp", "--only-binary=:all:", "--no-deps"]
    _run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        f"--target={folder / 'site'}",
        *platforms,
        *wanted,
        *_WHEELS,
    )


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=900)
