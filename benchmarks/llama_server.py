"""llama.cpp's server in a process of its own (package xllamacpp, which holds its code), as a peer to measure
beside.

    with llama_server(Path("model.gguf"), context=8192, slots=4) as url: …
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PROGRAM = """
import sys, threading
import xllamacpp
path, context, slots, threads = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel = context * slots, slots
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.use_jinja, params.n_gpu_layers, params.verbosity = True, 0, 0
params.hostnames, params.port = ["127.0.0.1"], 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def llama_server(model: Path, *, context: int, slots: int, threads: int = 2) -> Iterator[str]:
    """The address of a server of `model`: `slots` sequences of `context` tokens each."""
    command = [sys.executable, "-c", _PROGRAM, str(model), str(context), str(slots), str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
        if address is None:
            raise RuntimeError(f"llama.cpp's server did not start: exit code {process.wait()}")
        yield address
    finally:
        process.kill()
        process.wait()
