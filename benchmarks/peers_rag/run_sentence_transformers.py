"""sentence-transformers: vectors of all passages in float32, as its documentation says to make them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import Answer, Order, Watch, serve  # pyright: ignore[reportMissingImports]


def run(order: Order) -> Answer:
    import torch  # pyright: ignore[reportMissingImports]
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(order.threads)
    model = SentenceTransformer(order.model, device="cpu")
    model.encode(["a first text, so that nothing is loaded later"])
    watch = Watch()
    texts = [f"{title}\n{text}" if title else text for title, text in order.passages]
    vectors = model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
    note = f"encode() of {len(vectors)} passages in float32, batches of 32, sorted by length (its defaults)"
    return Answer(index_seconds=watch.seconds, index_cpu_seconds=watch.cpu_seconds, note=note)


if __name__ == "__main__":
    serve(run, ("sentence-transformers", "transformers", "torch"))
