"""For any content of a jsonl file: either the tokens of the tokenizer itself for Python's json reading, or one line.

The line names the file and its first bad line. `FUZZ_EXAMPLES=5000 make fuzz` tries more.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fuzzing import fuzz_settings
from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.encoding import LineChunk
from megatron_llamapro.data.preprocess import preprocess
from megatron_llamapro.data.workers import EncoderOptions

EOD = 2
LONGEST = 2000  # characters of a message

LETTERS = st.characters(codec=None) | st.sampled_from('\0\n\r\t"\\\u2028\ufeff\ufffd\ud800\udc00é😀<s></s>')
TEXTS = st.text(LETTERS, max_size=20)
NUMBERS = st.sampled_from([0, -1, 1.5, 1e308, 10**30, 2**63, float("nan"), float("inf"), -float("inf")])
VALUES = st.recursive(
    NUMBERS | st.none() | st.booleans() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
RECORDS = st.dictionaries(st.sampled_from(["text", "id", "", "text "]) | TEXTS, VALUES, max_size=3)
DOCUMENTS = st.builds(lambda record, text: {**record, "text": text}, RECORDS, TEXTS)
MARK, DEEP, MANY = b"\xef\xbb\xbf", 100_000, b"7" * 5000
ODD_LINES = st.sampled_from(
    [
        *(b"", b" ", b"\r", b"{}", b"[]", b"[", b"{", b"NaN", b"null", b'"text"', b"\xff\xfe", MARK, b"\0" * 9),
        *(b"[" * DEEP, b'{"a":' * DEEP, b'{"text": "a", "n": ' + MANY + b"}", b'{"text": ' + MANY + b"}"),
        *(b'{"text": "a"}{"text": "b"}', b'{"text": "a"},', b'{"text": "a", "text": "b"}', b'{"text": "\xed\xa0\x80"}'),
        *(MARK + b'{"text": "a"}', b"{'text': 'a'}", b'{"text": "a\tb"}', b'{"text": "\\ud83d\\ude00 \\ude00"}'),
        *(gzip.compress(b'{"text": "a"}'), '{"text": "a"}'.encode("utf-16")),
    ]
)


@st.composite
def lines(draw: st.DrawFn, good: st.SearchStrategy[dict]) -> bytes:
    """Draw one line, valid or not."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(ODD_LINES)
    line = json.dumps(draw(RECORDS if kind == 1 else good), ensure_ascii=draw(st.booleans()))
    data = bytearray(line.encode(errors="surrogatepass"))
    if kind == 2:
        for _ in range(draw(st.integers(1, 3))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    if kind == 3:
        del data[draw(st.integers(0, len(data))) :]
    if kind == 4:
        place = draw(st.integers(0, len(data)))
        data[place:place] = draw(st.binary(max_size=4))
    return bytes(data)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    whole = draw(st.sampled_from([b"\n", b"\n", b"\r\n"])).join(draw(st.lists(lines(DOCUMENTS), max_size=5)))
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return gzip.compress(whole)
    if kind == 1:
        return whole.decode(errors="replace").encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32"])))
    if kind == 2:
        return json.dumps([draw(DOCUMENTS)], indent=draw(st.sampled_from([None, 1]))).encode()
    return whole + draw(st.sampled_from([b"", b"\n"]))


def reference(line: bytes, key: str) -> object:
    """Return Python's reading of a key.

    Raises:
    ValueError: if there is none.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError from None
    if not isinstance(record, dict) or key not in record:
        raise ValueError
    return record[key]


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD, as a UTF-16 decoder does."""
    return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")


def expected(content: bytes, tokenizer: Tokenizer) -> tuple[list[list[int]], int | None]:
    """Return the tokens of the documents before the first bad line, and that line's number."""
    documents = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = reference(line, "text")
        except ValueError:
            return documents, number
        if not isinstance(text, str):
            return documents, number
        ids = tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
        documents += [[*ids, EOD]] if ids else []
    return documents, None


@fuzz_settings(60)
@given(content=files())
def test_any_file_gives_its_tokens_or_one_line(content: bytes, tokenizer_folder: Path) -> None:
    """Down to the token files, read by megatron.core's reader."""
    documents, wrong = expected(content, Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        try:
            done = preprocess([path], Path(folder) / "out", tokenizer=tokenizer_folder)
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < LONGEST and str(error).startswith(str(path))
            assert [found.name for found in Path(folder).iterdir()] == ["a.jsonl"]
            if wrong is None:
                assert not documents and "nothing to write" in str(error)
            else:  # a bad line, or another kind of file
                place = re.match(re.escape(str(path)) + ", line ([0-9]+): ", str(error))
                assert int(place[1]) == wrong if place else ": give text" in str(error)
            return
        assert wrong is None and done.info.num_documents == len(documents)
        pair = IndexedDataset(str(Path(folder) / "out"))
        assert [pair[index].tolist() for index in range(len(pair))] == documents
        assert (Path(folder) / "out.bin").read_bytes() == numpy.concatenate(documents).astype(numpy.uint16).tobytes()


ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "robot", "a\nb", "\ud800", ""])
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), ROLES | VALUES),
        **dict.fromkeys(("content", "value"), TEXTS | VALUES),
        "weight": st.sampled_from([0, 1, True, 2, "1", float("nan"), [1] * 1000]),
        "tool_calls": VALUES,
        "name": TEXTS,
    },
)
GOOD_MESSAGES = st.builds(
    lambda role, content, others: {**others, "role": role, "content": content},
    st.sampled_from(["user", "assistant", "assistant", "system"]),
    TEXTS,
    st.fixed_dictionaries({}, optional={"name": TEXTS, "weight": st.sampled_from([0, 1])}),
)
CONVERSATIONS = st.builds(
    lambda record, messages: {**record, "messages": messages},
    RECORDS,
    st.lists(GOOD_MESSAGES | GOOD_MESSAGES | GOOD_MESSAGES | MESSAGES, max_size=4) | VALUES,
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.name %}{{ m.name }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_options(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EncoderOptions:
    path = tmp_path_factory.mktemp("fuzz") / "template.jinja"
    path.write_text(TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    return EncoderOptions(tokenizer_folder, chat=True, chat_template=path)


@pytest.fixture(scope="module")
def chat_encoder(chat_options: EncoderOptions):
    return chat_options.make()


@pytest.fixture(scope="module")
def transformers_tokenizer(tokenizer_folder: Path):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@fuzz_settings(100)
@given(line=lines(CONVERSATIONS))
def test_any_conversation_gives_transformers_tokens_or_one_line(
    line: bytes, chat_encoder, transformers_tokenizer
) -> None:
    """The tokens are those of transformers' own `apply_chat_template`."""
    try:
        encoded = chat_encoder(LineChunk(Path("a.jsonl"), 7, (line,)))
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < LONGEST and str(error).startswith("a.jsonl, line 7: ")
        assert line.strip()
        return
    if not encoded.documents:
        return
    messages = json.loads(without_surrogates_in_json(line))["messages"]
    told = [{**message, "role": message.get("role", message.get("from"))} for message in messages]
    for message in told:
        message["role"] = {"human": "user", "gpt": "assistant"}.get(message["role"], message["role"])
        message["content"] = message.get("content", message.get("value"))
    ids = transformers_tokenizer.apply_chat_template(told, chat_template=TEMPLATE, tokenize=True, return_dict=False)
    assert encoded.tokens.tolist() == ids
    answers = [m["content"] for i, m in enumerate(told) if m["role"] == "assistant" and i and m.get("weight", 1) == 1]
    has_loss = [answer for _, answer in encoded.documents[0]]
    assert any(has_loss) and answers


def without_surrogates_in_json(line: bytes) -> str:
    """Join escaped surrogate pairs and replace lone surrogates, in every text of a line."""
    return without_surrogates(json.dumps(json.loads(line.decode("utf-8-sig")), ensure_ascii=False))
