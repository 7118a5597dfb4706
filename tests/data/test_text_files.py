"""A file that is not jsonl is identified, and the suggested command converts it to jsonl."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.data.text_files import check_text_files

LINES = [{"text": "a – b"}, {"text": "c"}]
TEXT = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as whole:
            whole.writestr("corpus.jsonl", TEXT)
    else:
        with tarfile.open(fileobj=file, mode="w") as whole:
            member = tarfile.TarInfo("corpus.jsonl")
            member.size = len(TEXT)
            whole.addfile(member, io.BytesIO(TEXT))
    return file.getvalue()


# Name, content, and the description of the file.
FILES: dict[str, tuple[str, bytes, str]] = {
    "gzip": ("corpus.jsonl.gz", gzip.compress(TEXT), "is compressed with gzip"),
    "gzip by another name": ("corpus.jsonl", gzip.compress(TEXT), "is compressed with gzip"),
    "bzip2": ("corpus.jsonl.bz2", bz2.compress(TEXT), "is compressed with bzip2"),
    "xz": ("corpus.jsonl.xz", lzma.compress(TEXT), "is compressed with xz"),
    "tar": ("corpus.tar", archive("tar"), "is a tar archive"),
    "UTF-16": ("corpus.jsonl", TEXT.decode().encode("utf-16"), "is UTF-16 text, not UTF-8"),
    "UTF-16, no mark": ("corpus.jsonl", TEXT.decode().encode("utf-16-le"), "is UTF-16 text, not UTF-8"),
    "UTF-16, large end first": ("corpus.jsonl", TEXT.decode().encode("utf-16-be"), "is UTF-16 text, not UTF-8"),
    "UTF-32": ("corpus.jsonl", TEXT.decode().encode("utf-32"), "is UTF-32 text, not UTF-8"),
}
# Their commands need programs that some machines lack.
NAMED: dict[str, tuple[str, bytes, str]] = {
    "zstd": ("a.jsonl.zst", bytes.fromhex("28b52ffd") + b"x", r"compressed with zstd: .*zstdcat '?\S+a.jsonl.zst'? > "),
    "lz4": ("a.jsonl.lz4", bytes.fromhex("04224d18") + b"x", "compressed with lz4: .*lz4cat"),
    "zip": ("a.zip", archive("zip"), "is a zip archive: .*unzip -p"),
    "parquet": ("a.parquet", b"PAR1xxxxPAR1", r'is a Parquet table: .*pandas.read_parquet\("\S+a.parquet"\)'),
    "arrow": ("a.arrow", b"\xff\xff\xff\xff\x08", r'is an Arrow table: .*Dataset.from_file\("\S+a.arrow"\)'),
    "a list": (
        "corpus.json",
        json.dumps(LINES).encode(),
        r"is a JSON list, .*jq -c '.\[\]' \S+corpus.json > \S+.jsonl",
    ),
    "a long list": ("corpus.json", json.dumps(LINES, indent=1).encode(), "is a JSON list, not one object a line"),
    "printed": ("a.json", json.dumps(LINES[0], indent=1).encode(), "is JSON over several lines.*jq -c . "),
    "with a mark": ("a.json", b"\xef\xbb\xbf\n[\n" + TEXT, "is a JSON list"),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer.*git lfs pull"),
    "an index": ("a.idx", b"MMIDIDX\0\0", "tokenized already"),
}


@pytest.mark.parametrize("kind", [*FILES, *NAMED])
def test_a_file_that_is_not_jsonl_is_identified(kind: str, tmp_path: Path) -> None:
    name, content, what = {**FILES, **NAMED}[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / name))} .*{what}") as error:
        check_text_files([tmp_path / name], jsonl=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", FILES)
def test_the_suggested_command_works(kind: str, tmp_path: Path) -> None:
    name, content, _ = FILES[kind]
    folder = tmp_path / "my texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        check_text_files([folder / name], jsonl=True)
    command = str(error.value).partition(", e.g. ")[2]
    assert shutil.which(command.split()[0])
    subprocess.run(["bash", "-c", command], check=True)
    [made] = [path for path in folder.iterdir() if path.name != name]
    check_text_files([made], jsonl=True)
    assert made.suffix == ".jsonl" and made.read_bytes().removeprefix(b"\xef\xbb\xbf") == TEXT


def test_the_suggested_command_replaces_no_file(tmp_path: Path) -> None:
    for name in ("corpus.jsonl.gz", "corpus.jsonl", "corpus.lines.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(TEXT))
    with pytest.raises(DataError, match=r"> \S+corpus\.lines\.2\.jsonl$"):
        check_text_files([tmp_path / "corpus.jsonl.gz"], jsonl=True)


GOOD: dict[str, bytes] = {
    "text": TEXT,
    "a mark": b"\xef\xbb\xbf" + TEXT,
    "carriage returns": TEXT.replace(b"\n", b"\r\n"),
    "blank lines": b"\n \n" + TEXT,
    "one long line": json.dumps({"text": "x" * 10_000}).encode(),
    "empty": b"",
}


@pytest.mark.parametrize("name", GOOD)
def test_jsonl_is_accepted(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(GOOD[name])
    check_text_files([tmp_path / "a.txt"], jsonl=True)


def test_plain_text_may_start_with_any_characters(tmp_path: Path) -> None:
    """A tokenizer trains on any text; only a .jsonl must be JSON."""
    (tmp_path / "a.txt").write_text("[1] a footnote\n")
    check_text_files([tmp_path / "a.txt"])


def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)

    os.mkfifo(tmp_path / "pipe")
    cases: dict[Path, str] = {
        tmp_path: "is a folder: give the files in it",
        tmp_path / "none": "does not exist",
        tmp_path / "pipe": "is not a regular file",
        loop: "does not exist",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            check_text_files([path], jsonl=True)
