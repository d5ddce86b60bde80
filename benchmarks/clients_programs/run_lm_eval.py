"""lm-eval's `local-completions` on a file of multiple choice. argv: URL, model, folder of a tokenizer, JSONL
file, limit; prints acc and acc_norm as one JSON object.
"""

import json
import sys
import tempfile
from pathlib import Path

_TASK = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def main() -> None:
    url, model, tokenizer, file, limit = sys.argv[1:6]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "choices.yaml").write_text(_TASK.format(file=file))
        options = f"model={model},base_url={url}/v1/completions,tokenizer={tokenizer},num_concurrent=4"
        found = simple_evaluate(
            model="local-completions",
            model_args=options,
            tasks=["choices"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            limit=int(limit),
            batch_size=4,
        )
    scores = found["results"]["choices"]
    print(json.dumps({"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"]}))


if __name__ == "__main__":
    main()
