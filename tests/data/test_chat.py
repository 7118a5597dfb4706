"""Which tokens of a conversation are an answer: those that transformers marks, for the usual kinds of chat
templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.token_files import open_token_file, paths_of, read_info
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.data.workers import EncoderOptions

EXAMPLE = Path("examples/llama2_7b_pro_instruct/chat_template.jinja")

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Is a bee an insect?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "Why <s> so?"},
    {"role": "assistant", "content": " Six legs. "},
]
# `generation` surrounds the assistant's text; only transformers' own marking reads it.
MARKED = {
    "headers": "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}",
    "instructions in brackets, no generation prompt": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}",
}
# A prompt that ends with a space; byte-level tokenizers join the space to the next word.
MARKED["a space before the answer"] = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def unmarked(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture
def encoder(tokenizer_folder: Path, tmp_path: Path) -> Callable:
    def make(template: str, tokenizer: Path = tokenizer_folder):
        (tmp_path / "template.jinja").write_text(template)
        return EncoderOptions(tokenizer, chat=True, chat_template=tmp_path / "template.jinja").make()

    return make


@pytest.fixture(scope="module")
def byte_level(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer whose words include the space before them, as in GPT-2, Llama 3 and Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("byte level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([message["content"] for message in MESSAGES] * 9 + [" Yes, it is."] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["characters", "byte level"])
@pytest.mark.parametrize("name", MARKED)
def test_answers_are_those_that_transformers_marks(
    name: str, kind: str, encoder: Callable, tokenizer_folder: Path, byte_level: Path
) -> None:
    from transformers import AutoTokenizer

    folder = byte_level if kind == "byte level" else tokenizer_folder
    marked = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, chat_template=MARKED[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    segments = encoder(unmarked(MARKED[name]), folder).segments(MESSAGES, "here")
    assert [token for segment in segments for token in segment.ids] == marked["input_ids"]
    mask = [int(segment.is_answer) for segment in segments for _ in segment.ids]
    assert mask == marked["assistant_masks"] and 0 < sum(mask) < len(mask)


def test_the_examples_template_marks_the_end_of_a_turn(encoder: Callable) -> None:
    """The end of the turn belongs to the answer; otherwise a model never learns to stop."""
    made = encoder(EXAMPLE.read_text())
    segments = made.segments(MESSAGES, "here")
    answers = [made.tokenizer.decode(segment.ids) for segment in segments if segment.is_answer]
    assert answers == ["Yes, it is.</s>", "Six legs.</s>"]
    assert segments[0].ids[0] == 1 and not segments[-1].ids.count(1)  # <s> once, at the start


def test_the_default_of_several_templates_is_used(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Tokenizers with tool calls have several."""
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": EXAMPLE.read_text()},
        {"name": "tool_use", "template": ""},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert EncoderOptions(tmp_path, chat=True).make().template.text == EXAMPLE.read_text()


def test_greetings_and_messages_of_weight_0_are_not_answers(encoder: Callable) -> None:
    """A greeting has no message before it; weight 0 is OpenAI's mark for "do not learn"."""
    made = encoder(EXAMPLE.read_text())
    greeting = {"role": "assistant", "content": "Hello."}
    unlearned = {"role": "assistant", "content": "Or so.", "weight": 0}
    segments = made.segments([greeting, *MESSAGES[1:], unlearned], "here")
    answers = [made.tokenizer.decode(segment.ids) for segment in segments if segment.is_answer]
    assert answers == ["Yes, it is.</s>", "Six legs.</s>"]
    assert made.segments([greeting], "here") == [] == made.segments([MESSAGES[1], unlearned], "here")
    silent = encoder("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    assert silent.segments(MESSAGES, "here") == []


def test_other_fields_of_a_message_reach_the_template(encoder: Callable) -> None:
    made = encoder(
        "{% for m in messages %}{{ m.name + ':' + m.content }}{% if m.role == 'critic' %}{% endif %}{% endfor %}"
    )
    messages = [{"role": "critic", "content": "x", "name": "A"}, {"role": "assistant", "content": "y", "name": "B"}]
    assert [made.tokenizer.decode(segment.ids) for segment in made.segments(messages, "here")] == ["A:x", "B:y"]


def test_sharegpt_names_are_understood(encoder: Callable) -> None:
    """ShareGPT has other names for the same fields and roles."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    renamed = [{"from": names[message["role"]], "value": message["content"]} for message in MESSAGES]
    made = encoder(EXAMPLE.read_text())
    assert made.segments(renamed, "here") == made.segments(MESSAGES, "here")


BAD = {
    "no list": ("hello", "not a list of messages"),
    "empty": ([], "not a list of messages"),
    "no message": (["hello"], "message 1: messages are"),
    "no text": ([{"role": "user", "content": [{"type": "text"}]}], "message 1: messages are"),
    "another name": (
        [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}],
        "message 2 has the role 'bot'",
    ),
    "a tool": ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "message 1 has tool_calls"),
    "weight": ([{"role": "assistant", "content": "x", "weight": 0.5}], "message 1 has the weight 0.5"),
    "no role": ([{"content": "x"}], "message 1: messages are"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_refused(name: str, encoder: Callable) -> None:
    value, message = BAD[name]
    with pytest.raises(DataError, match=rf"here.*{message}"):
        encoder(EXAMPLE.read_text()).segments(value, "here")


def test_a_template_that_changes_earlier_text_is_refused(encoder: Callable) -> None:
    """Some templates drop the reasoning of earlier turns, so the model would later see another prompt than in
    training."""
    last_only = "{% for m in messages %}{{ m.role + ':' }}{{ m.content if loop.last else '-' }}{% endfor %}"
    with pytest.raises(DataError, match="here: message 3 changes text that the chat template wrote before it"):
        encoder(last_only).segments(MESSAGES, "here")


def test_an_error_of_the_template_is_reported(encoder: Callable) -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(DataError, match="here: the chat template refuses it: no system role"):
        encoder(no_system).segments(MESSAGES, "here")
    for broken in ("{% for %}", "{{ 1 / 0 }}"):
        with pytest.raises(DataError, match="here: the chat template refuses it"):
            encoder(broken).segments(MESSAGES, "here")


def test_missing_templates_and_special_tokens_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no chat template: give one with --chat_template"):
        EncoderOptions(tokenizer_folder, chat=True).make()
    with pytest.raises(DataError, match="cannot be read as a chat template"):
        EncoderOptions(tokenizer_folder, chat=True, chat_template=tmp_path / "none").make()
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"writes bos_token, but .*tokenizer_config.json has none: add it to that file"):
        EncoderOptions(tmp_path, eod_token="</s>", chat=True, chat_template=EXAMPLE).make()
    (tmp_path / "tokenizer.json").rename(tmp_path / "my.json")
    with pytest.raises(
        DataError, match=r"my.json: conversations need a folder whose tokenizer is named tokenizer.json"
    ):
        EncoderOptions(tmp_path / "my.json", eod_token="</s>", chat=True, chat_template=EXAMPLE).make()
    with pytest.raises(DataError, match="give --chat too"):
        EncoderOptions(tokenizer_folder, chat_template=EXAMPLE).make()


def test_a_conversation_is_a_document_and_a_turn_a_sequence(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Read by megatron.core's own reader; the mode of a sequence is 1 in answers."""
    conversations = [MESSAGES, MESSAGES[:2], MESSAGES[1:3]]  # the second has no answer
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    (tmp_path / "chat.jsonl").write_text(lines)
    done = [
        preprocess(
            [tmp_path / "chat.jsonl"],
            tmp_path / f"chat-{num_workers}",
            tokenizer=tokenizer_folder,
            chat=True,
            chat_template=EXAMPLE,
            num_workers=num_workers,
        )
        for num_workers in (1, 2)
    ]
    assert done[0] == done[1] and done[0].num_empty == 1
    first, second = ([path.read_bytes() for path in paths_of(tmp_path / f"chat-{n}")] for n in (1, 2))
    assert first == second
    tokenizer = load_tokenizer(tokenizer_folder)
    pair = open_token_file(tmp_path / "chat-1", data_format="chat")
    turns = [pair[number] for number in range(len(pair))]
    assert pair.document_indices.tolist() == [0, 4, 6] and [int(mode) for _, mode in turns] == [0, 1, 0, 1, 0, 1]
    texts = [tokenizer.decode(ids) for ids, _ in turns]
    assert texts[1] == texts[5] == "Yes, it is.</s>"
    info = read_info(tmp_path / "chat-1")
    assert info is not None and info.num_documents == 2
    assert info.num_answer_tokens == sum(len(tokenizer.encode(text[:-4])) + 1 for text in texts[1::2])
    assert "2 conversations, 1 without an answer left out" in done[0].summary
