"""Log-likelihoods against lm-evaluation-harness itself, where it is installed (pip install lm_eval; it brings
datasets and much else, so that `dev` leaves it out).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llmc.cli.eval import rolling_windows
from llmc.cli.main import main
from llmc.cli.mcq import Question, Task, log_likelihoods, prepare
from llmc.cli.scoring import score
from llmc.runtime.loader import load

from .models import BOS, tiny_model

QUESTIONS = [
    Question("Question: What is wet?\nAnswer:", ("the river", "fire", "a boat that carried grain"), 0, "f:1"),
    Question("Two spaces at the end  ", ("one", "two, three"), 0, "f:2"),
    Question(f"{BOS}It begins with BOS", ("x", "Была зима"), 0, "f:3"),
    Question("One, two, three, four, five. " * 40, ("six", "six and seven, which is a long one"), 0, "f:4"),
]
TEXT = "The river was wide and slow, and the boats that went down it carried grain, cloth and letters. " * 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_log_likelihoods_are_the_harness_own(tmp_path: Path, tiny_folder: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: the oracle of this test")
    import transformers
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    folder: Path = tiny_folder("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    harness = HFLM(pretrained=tiny_model("llama"), tokenizer=tokenizer, max_length=256, device="cpu")

    def ask(kind: str, *arguments: str) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    pairs = [(question.context, f" {choice}") for question in QUESTIONS for choice in question.choices]
    wanted = [value for value, _ in harness.loglikelihood([ask("loglikelihood", *pair) for pair in pairs])]
    (rolled,) = harness.loglikelihood_rolling([ask("loglikelihood_rolling", TEXT)])

    artifact = tmp_path / "a.llmc"
    assert main(["compile", str(folder), "-o", str(artifact), "--target", "onnx-cpu"]) == 0
    (tmp_path / "text.txt").write_text(TEXT)
    with load(artifact, kv_tokens=2048, threads=1) as llm:
        (prepared,) = prepare(llm, [Task("f", QUESTIONS)])
        found = [value for sums in log_likelihoods(llm, prepared) for value in sums]
        windows, firsts = rolling_windows([llm], tmp_path / "text.txt", window=256)
        total = score(windows, llm.iter_logits, vocab_size=llm.executor.vocab_size, firsts=firsts)
    assert len(windows) > 1
    assert found == pytest.approx(wanted, abs=1e-3)
    assert -total.nll == pytest.approx(rolled, rel=1e-5)
