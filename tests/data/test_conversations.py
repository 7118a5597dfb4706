"""Samples of whole conversations: loss on answers only, nothing cut, and every conversation once per pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.schema import BlendEntry, DataConfig
from megatron_llamapro.data.conversations import Conversations, packed
from megatron_llamapro.data.dataset import (
    build_train_dataset,
    build_valid_datasets,
    conversation_sets,
)
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.sampling import check_same_order, data_order_fingerprint
from megatron_llamapro.data.token_files import check_token_files, content_digest, open_token_file, paths_of
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.testing.distributed import run_distributed

SEQ_LENGTH = 100
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def conversation(number: int) -> list[dict[str, str]]:
    """Return a conversation of 6 to 105 tokens, unique to its number: `<s>u<number>a<answer></s>`."""
    return [
        {"role": "user", "content": f"{number:02}"},
        {"role": "assistant", "content": chr(97 + number % 26) * (number % 100)},
    ]


@pytest.fixture(scope="module")
def make_chat(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return the prefix of a pair with the conversations of the given numbers."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "template.jinja").write_text(TEMPLATE)

    def make(name: str, numbers: range) -> str:
        lines = [json.dumps({"messages": conversation(number)}) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        preprocess(
            [folder / f"{name}.jsonl"],
            folder / name,
            tokenizer=tokenizer_folder,
            chat=True,
            chat_template=folder / "template.jinja",
            overwrite=True,
        )
        return str(folder / name)

    return make


@pytest.fixture(scope="module")
def chat(make_chat: Callable[..., str]) -> str:
    return make_chat("chat", range(100))  # 96 to 99 are longer than SEQ_LENGTH + 1


@pytest.fixture
def build(chat: str, tokenizer_folder: Path, tmp_path: Path) -> Callable:
    def make(*, packing: bool = False, num_samples: int = 96, seed: int = 1):
        return build_train_dataset(
            DataConfig(train=(BlendEntry(chat),), seq_length=SEQ_LENGTH, format="chat", packing=packing),
            num_samples=num_samples,
            seed=seed,
            tokenizer=load_tokenizer(tokenizer_folder),
            vocab_size=131,
            cache_dir=tmp_path / "cache",
        )

    return make


def parts(sample: dict[str, torch.Tensor], tokenizer) -> list[tuple[str, str]]:
    """Return the conversations of a sample: the text, and its part with loss."""
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert all(len(sample[name]) == SEQ_LENGTH for name in ("tokens", "labels", "loss_mask", "position_ids"))
    stream = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    has_loss = [False, *(sample["loss_mask"] == 1).tolist()]
    starts = [place for place, token in enumerate(stream) if token == 1]
    found = []
    for start, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        text = tokenizer.decode(stream[start:end])
        answer = tokenizer.decode([stream[place] for place in range(start, end) if has_loss[place]])
        found.append((text.partition("</s>")[0], answer))
    return found


def expected(numbers: range) -> Counter:
    contents = [(turns[0]["content"], turns[1]["content"]) for turns in map(conversation, numbers)]
    return Counter((f"<s>u{question}a{answer}", f"{answer}</s>") for question, answer in contents)


@pytest.mark.parametrize("packing", [False, True])
def test_one_pass_has_every_conversation_once(packing: bool, build: Callable, tokenizer_folder: Path) -> None:
    """Each is whole, with loss on its answer and the end of the answer. Those that do not fit are left out. A second
    pass has them again."""
    tokenizer = load_tokenizer(tokenizer_folder)
    num_samples = len(build(packing=packing, num_samples=1))
    dataset = build(packing=packing, num_samples=2 * num_samples)
    passes = [
        [parts(dataset[index], tokenizer) for index in range(start, start + num_samples)] for start in (0, num_samples)
    ]
    for one in passes:
        assert Counter(part for sample in one for part in sample) == expected(range(96))
    assert passes[0] != passes[1]
    assert packing == any(len(sample) > 1 for sample in passes[0])


def test_the_same_seed_gives_the_same_samples(build: Callable) -> None:
    def tokens(**options) -> torch.Tensor:
        dataset = build(**options)
        return torch.stack([dataset[index]["tokens"] for index in range(50)])

    for packing in (False, True):
        assert torch.equal(tokens(packing=packing), tokens(packing=packing))
        assert not torch.equal(tokens(packing=packing), tokens(packing=packing, seed=2))


@pytest.mark.parametrize("packing", [False, True])
def test_a_held_out_set_has_every_conversation_once(packing: bool, chat: str, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    data = DataConfig(
        train=(BlendEntry(chat),), valid={"v": chat}, seq_length=SEQ_LENGTH, format="chat", packing=packing
    )
    held_out = build_valid_datasets(data, vocab_size=131, eod=2)["v"]
    found = [part for index in range(len(held_out)) for part in parts(held_out[index], tokenizer)]
    assert Counter(found) == expected(range(96))
    assert packing or found == list(expected(range(96)))  # in the order of the file
    with pytest.raises(IndexError):
        held_out.dataset[len(held_out)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_packing_uses_everything_once_within_capacity(lengths: list[int]) -> None:
    """No two rows would fit into one."""
    rows = packed(numpy.array(lengths), 40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert filled[-1] <= 40
    assert len(filled) < 2 or filled[0] + filled[1] > 40


def test_packing_leaves_hardly_a_gap() -> None:
    """Realistic conversations of a few hundred tokens, some long."""
    lengths = numpy.random.default_rng(0).lognormal(6, 0.8, size=20_000).astype(int).clip(10, 4097)
    rows = packed(lengths, 4097)
    assert lengths.sum() / (4097 * len(rows)) > 0.999


def test_files_of_the_wrong_format_or_length_are_refused(chat: str, pair: Path) -> None:
    def check(prefix: object, data_format: str) -> None:
        check_token_files(
            DataConfig(train=(BlendEntry(str(prefix)),), seq_length=8, format=data_format), vocab_size=131
        )

    with pytest.raises(DataError, match=r"holds conversations: set data\.format to chat"):
        check(chat, "text")
    with pytest.raises(DataError, match="holds text: preprocess conversations with --chat"):
        check(pair, "chat")
    with pytest.raises(DataError, match=r"none of its 100 conversations fits into data\.seq_length 3"):
        Conversations(open_token_file(chat, data_format="chat"), name=chat, seq_length=3, padding=2)


def test_another_marking_of_answers_is_another_order(chat: str, make_chat: Callable[..., str]) -> None:
    """The hash of the tokens does not show which of them are answers."""
    prefix = make_chat("again", range(100))
    assert content_digest(prefix) == content_digest(chat)
    index = paths_of(prefix)[1]
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    assert content_digest(prefix) != content_digest(chat)
    assert len(open_token_file(prefix, data_format="chat")) == 200


def test_runs_on_text_resume_from_older_checkpoints(pair: Path, chat: str) -> None:
    """Checkpoints written before conversations were supported do not record a format."""

    def order(prefix: object, **settings) -> dict[str, object]:
        data = DataConfig(train=(BlendEntry(str(prefix)),), seq_length=8, **settings)
        return data_order_fingerprint(data, num_samples=10, seed=1)

    stored = {name: value for name, value in order(pair).items() if name not in ("format", "packing")}
    check_same_order(stored, order(pair))
    with pytest.raises(DataError, match=r"another data.packing \(False\), now \(True\)"):
        check_same_order(order(chat, format="chat"), order(chat, format="chat", packing=True))


def test_the_summary_describes_one_pass(build: Callable) -> None:
    [alone], [several] = (conversation_sets(build(packing=packing)) for packing in (False, True))
    text = "96 conversations, 4 longer than data.seq_length left out; one pass is 96 samples, 53% full"
    assert text in alone.summary
    samples = len(build(packing=True, num_samples=1))
    assert samples < 56 and f"conversations, 4 longer than data.seq_length left out; one pass is {samples} samples" in (
        several.summary
    )


def blend_worker(prefixes: tuple[str, str], tokenizer_folder: Path, cache: Path) -> tuple[list, list[str]]:
    """Return set and conversation of every sample, and the lines about the sets."""
    tokenizer = load_tokenizer(tokenizer_folder)
    dataset = build_train_dataset(
        DataConfig(train=tuple(map(BlendEntry, prefixes)), seq_length=SEQ_LENGTH, format="chat"),
        num_samples=60,
        seed=1,
        tokenizer=tokenizer,
        vocab_size=131,
        cache_dir=cache,
    )
    found = [(int(dataset[index]["dataset_id"]), *parts(dataset[index], tokenizer)) for index in range(60)]
    return found, [part.summary for part in conversation_sets(dataset)]


def test_conversation_sets_are_blended(
    chat: str, make_chat: Callable[..., str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Equal weights: the small set repeats to give as many samples as the large one. All ranks agree."""
    prefixes = (chat, make_chat("small", range(3)))
    first, second = run_distributed(blend_worker, 2, prefixes, tokenizer_folder, tmp_path / "cache")
    assert first == second
    samples, summaries = first
    assert Counter(number for number, _ in samples) == {0: 30, 1: 30}
    assert {part for number, part in samples if number == 1} == set(expected(range(3)))
    assert [summary.partition(":")[0] for summary in summaries] == list(prefixes)
