"""transformers in bfloat16, measured on request from a process of its own.

`llmc bench --against-transformers` starts it: torch's threads then share nothing with ours, and the runtime's
process stays without torch. One JSON line in, `{"do": "prefill" | "decode", "tokens": N}`; one out,
`{"seconds": S}` (of the prompt, or of one token).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

from ..ir.errors import LlmcError


class Peer:
    """The process, as its parent sees it; a context manager."""

    def __init__(self, source: str, threads: int) -> None:
        # -P: nothing is imported from the current directory.
        command = [sys.executable, "-P", "-m", "llmc.cli.peer", source, str(threads)]
        # Not a pipe: one that nobody reads would fill and stop the process.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._answer()  # the model is loaded

    def seconds(self, what: str, tokens: int) -> float:
        """Seconds of a prompt of `tokens` tokens ("prefill"), or of one of `tokens` tokens after it
        ("decode").
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no reason given"]
            self._errors.close()
            raise LlmcError(
                f"transformers could not be measured: {last[0]}", remedy="pip install 'llmc[compile]'"
            )
        return json.loads(line)

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.communicate()  # end of its input ends it
        self._errors.close()


def load_transformers(source: str, dtype: str) -> Any:
    """The transformers model of a source, whole in memory, in "bfloat16" or "float32"; GGUF is dequantized.

    transformers itself reads GGUF files only with a further package (accelerate); our lazy weights carry
    the names of its parameters already.
    """
    import torch

    from ..frontend.source import open_source

    opened = open_source(source)
    model: Any = opened.build_model()
    kind = getattr(torch, dtype)
    state = {
        name: torch.from_numpy(tensor.read().astype("float32")).to(kind)
        for name, tensor in opened.weights.items()
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


class _Transformers:
    """A model as its users run it on a CPU: bfloat16, SDPA, greedy decoding with a KV cache."""

    def __init__(self, source: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model: Any = load_transformers(source, "bfloat16")
        self._vocab: int = self._model.config.get_text_config().vocab_size

    def prefill(self, tokens: int) -> tuple[float, Any, Any]:
        """(seconds, cache, the next token [1, 1]) of a random prompt."""
        torch = self._torch
        ids = torch.randint(self._vocab, (1, tokens))
        began = time.perf_counter()
        with torch.inference_mode():
            result = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = result.logits[:, -1:].argmax(-1)
        return time.perf_counter() - began, result.past_key_values, token

    def decode(self, tokens: int) -> float:
        """Seconds of one token, over `tokens` of them after a prompt of 16."""
        _, cache, token = self.prefill(16)
        began = time.perf_counter()
        with self._torch.inference_mode():
            for _ in range(tokens):
                result = self._model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = result.past_key_values, result.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - began) / tokens


def _serve(source: str, threads: int) -> None:
    model = _Transformers(source, threads)
    model.prefill(64)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        seconds = (
            model.prefill(order["tokens"])[0] if order["do"] == "prefill" else model.decode(order["tokens"])
        )
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
