"""Tokenizers for megatron.core's datasets: sentencepiece `.model` (Llama 2) and `tokenizer.json` (Llama 3).

Neither adds begin-of-text or end-of-text itself. Preprocessing ends every document with `eod`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.config.files import check_fetched, hint_inside, hint_where_nothing_is

JSON_NAME, MODEL_NAME = "tokenizer.json", "tokenizer.model"

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* 0\n")  # a token in base64, and its id
_OTHER_FILES = ("tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")
_WANTED = "give a tokenizer file, or a folder with one"
_MAKE_JSON = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW) of transformers"


class _Backend(Protocol):
    """The interface that both libraries' tokenizers get."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, token: str) -> int | None: ...

    def token_bytes(self) -> list[int]: ...


class Tokenizer:
    """Text to token ids and back.

    `vocab_size` is the number of ids, `eod` the id that ends a document. There is no padding id (`pad` is -1): if
    documents contained it, megatron.core would leave those tokens out of the loss.
    """

    pad = -1

    def __init__(self, backend: _Backend, *, eod: int, path: Path) -> None:
        self._backend = backend
        self.path = path
        """The file that defines the tokenizer."""
        self.vocab_size = backend.vocab_size
        self.eod = eod
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        """SHA-256 of that file."""
        self.unique_identifiers = {"class": type(self).__name__, "digest": self.digest, "eod": eod}
        """Part of the key of megatron.core's index cache."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without extra special tokens."""
        return self._backend.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text`, and for each id its first character and the one past its end. Special tokens in
        `text` get their own ids.

        Raises:
            DataError: the tokenizer is a sentencepiece model, which reads special tokens in a text as plain letters.
        """
        if not isinstance(self._backend, _JsonBackend):
            raise DataError(
                f"{self.path} cannot recognise special tokens in a conversation: convert it to a {JSON_NAME} "
                f"({_MAKE_JSON}), and give that"
            )
        return self._backend.encode_with_offsets(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return self._backend.decode(ids)

    def token_bytes(self) -> list[int]:
        """Return the number of UTF-8 bytes of text that each id stands for. Special tokens stand for none.

        A sentencepiece tokenizer puts a space before every text, which counts too.
        """
        return self._backend.token_bytes()

    @property
    def bos(self) -> int | None:
        """The id that starts a document, found as `eod` is by default, or None. Preprocessing does not write it."""
        return next(iter(_special_ids(self._backend, self.path, "bos")), None)

    @property
    def all_ends(self) -> frozenset[int]:
        """`eod`, and every end-of-sequence id that the files of the model beside the tokenizer name."""
        return frozenset({self.eod, *_ids_of_the_model(self._backend, self.path, "eos")})


class _JsonBackend:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            beside = path.with_name(JSON_NAME)
            instead = f": give {beside}" if path != beside and beside.is_file() else ""
            raise DataError(f"{path} is not a tokenizer: {error}{instead}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_bytes(self) -> list[int]:
        definition = json.loads(self._tokenizer.to_str())
        steps = json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
        length = len if '"ByteLevel"' in steps else _piece_bytes  # each of its characters is a byte
        sizes = [0] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[index] = length(token)
        for added in definition["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes


class _SentencePieceBackend:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            is_tiktoken = _TIKTOKEN_LINE.match(path.read_bytes()[:1000])
            reason = f"it is tiktoken's, as in Meta's original/: give the model's {JSON_NAME}" if is_tiktoken else error
            raise DataError(f"{path} is not a sentencepiece model: {reason}") from None
        self.vocab_size = self._processor.vocab_size()
        self.special_ids = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id()}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return None if self._processor.id_to_piece(found) != token else found

    def token_bytes(self) -> list[int]:
        pieces = self._processor
        is_text = [not (pieces.is_control(index) or pieces.is_unknown(index)) for index in range(self.vocab_size)]
        return [_piece_bytes(pieces.id_to_piece(index)) if text else 0 for index, text in enumerate(is_text)]


_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def _piece_bytes(piece: str) -> int:
    """Return the bytes of text of one of sentencepiece's pieces, which write a space as ▁."""
    return 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())


def load_tokenizer(path: Path, *, eod_token: str | None = None) -> Tokenizer:
    """Load the tokenizer in `path`: a tokenizer.json, a .model file, or a folder with one (tokenizer.json first).

    `eod_token` names the token that ends a document; without it, the tokenizer's end-of-sequence token.

    Raises:
        DataError: there is no tokenizer, it is damaged, or its end-of-sequence token is unknown.
    """
    file = tokenizer_file(Path(path))
    check_fetched(file, error=DataError)
    is_json = file.suffix == ".json"
    backend = _JsonBackend(file) if is_json else _SentencePieceBackend(file)
    eod = _named_token(backend, eod_token, file) if eod_token else _end_of_sequence(backend, file)
    return Tokenizer(backend, eod=eod, path=file)


def tokenizer_file(path: Path) -> Path:
    """Return the file that `load_tokenizer` reads. Raise `DataError` if there is none."""
    if path.is_dir():
        for name in (JSON_NAME, MODEL_NAME):
            if (path / name).is_file():
                return path / name
        raise DataError(f"{path} has no {JSON_NAME} and no {MODEL_NAME}: {_instead(path)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist: {hint_where_nothing_is(path) or _WANTED}")
    if path.suffix not in (".json", ".model"):
        raise DataError(f"{path} is not a known tokenizer: give a {JSON_NAME} or a sentencepiece .model file")
    return path


def _instead(folder: Path) -> str:
    """Say what to give instead of a folder without either tokenizer."""
    others = [name for name in _OTHER_FILES if (folder / name).is_file()]
    if others:
        return f"it has {others[0]}: convert that to a {JSON_NAME} ({_MAKE_JSON}), and give the result"
    return hint_inside(folder, JSON_NAME) or _WANTED


def _named_token(backend: _Backend, token: str, file: Path) -> int:
    found = backend.token_id(token)
    if found is None:
        raise DataError(f"{file} has no token {token!r}")
    return found


def _end_of_sequence(backend: _Backend, file: Path) -> int:
    ids = _special_ids(backend, file, "eos")
    if not ids:
        raise DataError(
            f"{file}: no end-of-sequence token is known (no eos_token in tokenizer_config.json beside it): name one "
            "with --eod_token"
        )
    return ids[0]


def _special_ids(backend: _Backend, file: Path, kind: str) -> list[int]:
    """Return the ids that start ("bos") or end ("eos") a sequence, the first one first: sentencepiece's own, or those
    in the files beside tokenizer.json."""
    if isinstance(backend, _SentencePieceBackend) and backend.special_ids[kind] >= 0:
        return [backend.special_ids[kind]]
    files = ["tokenizer_config.json", "special_tokens_map.json"]
    if "added_tokens_decoder" not in _json(file.with_name(files[0])):
        files.reverse()  # as in transformers: without that table, the older file wins
    for name in files:
        token = _json(file.with_name(name)).get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return [_named_token(backend, token, file)]
    return _ids_of_the_model(backend, file, kind)


def _ids_of_the_model(backend: _Backend, file: Path, kind: str) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _json(file.with_name(name)).get(f"{kind}_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ids and type(ids[0]) is int and 0 <= ids[0] < backend.vocab_size:
            return [token for token in ids if type(token) is int and 0 <= token < backend.vocab_size]
    return []


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    check_fetched(path, error=DataError)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
