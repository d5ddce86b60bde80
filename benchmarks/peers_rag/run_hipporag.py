"""HippoRAG 2's retrieval over triples from a file, with vectors from an address of OpenAI's API.

No language model is there. So triples are not extracted but read, in the file where HippoRAG keeps its own;
and its recognition memory, where a model picks among the five triples that are nearest to the question, keeps
all five. The rest is as published: triples by vector, synonyms by vector, personalised PageRank over entities
and passages.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import Answer, Order, Watch, serve  # pyright: ignore[reportMissingImports]

_LANGUAGE_MODEL = "none"
_UNUSED = {"vllm": ("SamplingParams", "LLM"), "gritlm": ("GritLM",), "boto3": (), "litellm": ()}
"""What it imports and does not use here: packages and the names that it takes of them."""


def _stand_in() -> None:
    for name, members in _UNUSED.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
        sys.modules[name] = module
    # The client of Cohere on AWS takes an error's class of botocore.
    botocore = types.ModuleType("botocore")
    exceptions = types.ModuleType("botocore.exceptions")
    exceptions.ClientError = type("ClientError", (Exception,), {})  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"botocore": botocore, "botocore.exceptions": exceptions}


def _keep_all(
    question: str, facts: list[Any], indices: list[int], len_after_rerank: int | None = None
) -> tuple[list[int], list[Any], dict[str, Any]]:
    return indices[:len_after_rerank], facts[:len_after_rerank], {}


def run(order: Order) -> Answer:
    os.chdir(order.folder)
    _stand_in()
    import torch  # pyright: ignore[reportMissingImports]
    from hipporag import HippoRAG  # pyright: ignore[reportMissingImports]
    from hipporag.utils.config_utils import BaseConfig  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(order.threads)
    passages = [f"{title}\n{text}" if title else text for title, text in order.passages]
    at = {passage: index for index, passage in reversed(list(enumerate(passages)))}
    found = order.extracted or [{"entities": [], "triples": []}] * len(passages)
    docs = {
        passage: {
            "passage": passage,
            "extracted_entities": extracted["entities"],
            "extracted_triples": extracted["triples"],
        }
        for passage, extracted in zip(passages, found, strict=True)
    }
    path = Path(order.folder) / f"openie_results_ner_{_LANGUAGE_MODEL}.json"
    path.write_text(json.dumps({"docs": list(docs.values())}), encoding="utf-8")

    config = BaseConfig(
        save_dir=order.folder,
        llm_name=_LANGUAGE_MODEL,
        llm_base_url="http://localhost:9/v1",  # nothing is there, and nothing asks
        embedding_model_name=order.model,
        embedding_base_url=order.url,
        embedding_batch_size=256,
        retrieval_top_k=order.top,
    )
    watch = Watch()
    hippo = HippoRAG(global_config=config)
    hippo.rerank_filter = _keep_all
    hippo.index(list(docs))
    hippo.prepare_retrieval_objects()
    answer = Answer(index_seconds=watch.seconds, index_cpu_seconds=watch.cpu_seconds)
    for question in order.questions:
        began = Watch()
        (solution,) = hippo.retrieve([question], num_to_retrieve=order.top)
        answer.add_time(began)
        answer.found.append([at[passage] for passage in solution.docs])
    answer.note = (
        "triples of GPT-3.5 from a file, no language model: all of the 5 nearest triples kept; "
        f"{hippo.graph.vcount()} nodes, {hippo.graph.ecount()} edges"
    )
    return answer


if __name__ == "__main__":
    serve(run, ("hipporag", "torch", "python-igraph"))
