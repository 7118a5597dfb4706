"""Training on conversations: the losses equal those of transformers with loss on answers only, at any layout and after
a stop.

The first loss and gradient norm agree within 1e-5: another order of summation. Later losses agree within 1e-4: Adam's
first updates have the size of the learning rate even for tiny gradients, so their last bits count.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import workers
from gradients import parallel
from megatron_llamapro.config.schema import BlendEntry, DataConfig, OptimizerConfig, RunConfig
from megatron_llamapro.testing.distributed import run_distributed

STEPS, LR, WEIGHT_DECAY = 4, 1e-2, 0.1
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Very different lengths: a mean of the samples' means would differ from the mean over all answers.
CONVERSATIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (("1+1?", "2"), ("Count.", "one, two, three, four"), ("a", "b"), ("Write much.", "No."))
]
LAYOUTS = {
    "one process": (1, parallel()),
    "dp2": (2, parallel()),
    "tp2 pp2 sequence parallel": (4, parallel(tp=2, pp=2, sp=True)),
}


@pytest.fixture(scope="module")
def chat(models: Callable, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the prefix of the conversations' token files, one step's samples."""
    from megatron_llamapro.data.preprocess import preprocess

    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in CONVERSATIONS))
    (folder / "template.jinja").write_text(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    options = {"chat": True, "chat_template": folder / "template.jinja", "tokenizer": models().original_hf}
    preprocess([folder / "chat.jsonl"], folder / "chat", **options)
    return str(folder / "chat")


@pytest.fixture
def instruct(run_config: Callable, chat: str) -> Callable[..., RunConfig]:
    def make(*, packing: bool = False, **fields: object) -> RunConfig:
        fields = {"train_iters": STEPS, "global_batch_size": 4, "trainable": ("everything",), **fields}
        data = DataConfig(train=(BlendEntry(chat),), seq_length=64, format="chat", packing=packing)
        optimizer = OptimizerConfig(lr=LR, lr_decay_style="constant", lr_warmup_fraction=0.0, weight_decay=WEIGHT_DECAY)
        return dataclasses.replace(run_config(**fields), data=data, optimizer=optimizer)

    return make


@pytest.fixture(scope="module")
def reference(models: Callable) -> list[tuple[float, float]]:
    return transformers_training(models().expanded_hf)


def transformers_training(folder: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of every step, by transformers and torch alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoded = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            talk, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for talk in CONVERSATIONS
    ]
    num_answer_tokens = sum(sum(talk["assistant_masks"]) for talk in encoded)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    figures = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for talk in encoded:  # one by one, so that nothing is padded
            tokens, answers = torch.tensor([talk["input_ids"]]), torch.tensor([talk["assistant_masks"]])
            labels = tokens.masked_fill(answers == 0, -100)
            loss = model(input_ids=tokens, labels=labels, num_items_in_batch=num_answer_tokens).loss
            loss.backward()
            total += loss.item()
        figures.append((total, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.step()
    return figures


def check(result: list, reference: list[tuple[float, float]]) -> None:
    assert [step for step, *_ in result] == [*range(1, STEPS + 1)]
    assert result[0][1:3] == pytest.approx(reference[0], rel=1e-5)
    assert [loss for _, loss, *_ in result] == pytest.approx([loss for loss, _ in reference], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_those_of_transformers(layout: str, instruct: Callable, reference: list) -> None:
    world_size, config = LAYOUTS[layout]
    check(run_distributed(workers.train, world_size, instruct(parallel=config))[0].figures, reference)
    assert reference[-1][0] < 0.8 * reference[0][0]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stopped_run_resumes_with_the_same_losses(packing: bool, instruct: Callable) -> None:
    """In the middle of a pass, at another layout."""
    settings = {"packing": packing, "global_batch_size": 1 if packing else 2}
    whole = run_distributed(workers.train, 1, instruct(**settings, save="whole"))[0].figures
    stopped = run_distributed(workers.train, 1, instruct(**settings), 2)[0].figures
    rest = run_distributed(workers.train, 2, instruct(**settings, parallel=parallel(pp=2)))[0].figures
    assert stopped == whole[:3]
    assert rest == [(4, pytest.approx(whole[3][1], rel=1e-5), pytest.approx(whole[3][2], rel=1e-5), LR)]
