"""lm-evaluation-harness: on a local task with its Hugging Face model, the export scores the same as the original."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
from folders import folders, proved
from lm_eval.tasks import TaskManager

_TASK = "local_choice"
_QUESTIONS = (
    ("A cat says", ["meow", "woof"], 0),
    ("A dog says", ["meow", "woof"], 1),
    ("Two and two is", ["four", "five"], 0),
)
_YAML = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def write_task(folder: Path) -> None:
    """Write three questions and the task's description."""
    rows = ({"question": question, "choices": choices, "answer": answer} for question, choices, answer in _QUESTIONS)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{_TASK}.yaml").write_text(_YAML.format(task=_TASK, data=folder / "questions.jsonl"))


def likelihoods(model: Path, folder: Path) -> list[float]:
    """Return the log-likelihood of every choice of every question."""
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[_TASK],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=1,
        log_samples=True,
    )
    return [choice[0] for sample in found["samples"][_TASK] for choice in sample["filtered_resps"]]


def main() -> None:
    """Score both models, and compare."""
    args = folders(__doc__)
    write_task(args.work_dir)
    original, expanded = (likelihoods(model, args.work_dir) for model in (args.original, args.expanded))
    assert original == expanded, (original, expanded)
    proved(f"a multiple-choice task: the {len(expanded)} log-likelihoods of the original, bit for bit")


if __name__ == "__main__":
    main()
