"""A conversion's target is complete or unchanged: after a kill, on a full disk, without write permission."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.convert import Options, expand_hf, hf_to_megatron
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.expansion.round import Expansion

Tiny = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    """Return every name in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_kill_while_replacing_a_target_leaves_one_of_the_two(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Send SIGKILL after every rename. The old or the new checkpoint is complete, by the next run at the latest."""
    for seed in (0, 1):
        hf_to_megatron(tiny_llama(seed=seed), tmp_path / str(seed))
    for number in range(2):
        target = tmp_path / f"it{number}"
        hf_to_megatron(tiny_llama(), target)
        program = KILLED_AT_RENAME.format(number=number, source=str(tiny_llama(seed=1)), target=str(target))
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            hf_to_megatron(tiny_llama(seed=2), target)
        assert contents(target) == contents(tmp_path / str(number))


@pytest.mark.parametrize("target", ["/", "..", "somewhere/.."])
def test_a_target_without_a_name_is_refused(
    target: str, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="give the name of a folder to write"):
        hf_to_megatron(tiny_llama(), Path(target), options=Options(overwrite=True))
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", [".", "inside", ".."], ids=["the source", "in the source", "around the source"])
def test_a_target_that_overlaps_its_source_is_refused(place: str, damaged: Tiny) -> None:
    source = damaged()
    before = contents(source)
    with pytest.raises(CheckpointError, match="overlap"):
        hf_to_megatron(source, source / place, options=Options(overwrite=True))
    assert contents(source) == before


def test_a_target_behind_a_link_to_the_source_is_refused(damaged: Tiny, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(damaged())
    with pytest.raises(CheckpointError, match="overlap"):
        hf_to_megatron(tmp_path / "damaged", tmp_path / "link", options=Options(overwrite=True))


KILLED_AT_RENAME = """
import os, signal
from pathlib import Path
from megatron_llamapro.checkpoint.convert import Options, hf_to_megatron
rename, seen = Path.rename, []
def killed(self, target):
    rename(self, target)
    seen.append(target)
    if len(seen) > {number}:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
hf_to_megatron(Path({source!r}), Path({target!r}), options=Options(overwrite=True))
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron
convert = {"hf": expand_hf, "megatron": hf_to_megatron}[sys.argv[3]]
written = 0
def progress(num_bytes):
    global written
    written += num_bytes
    if written > int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
from megatron_llamapro.checkpoint.convert import Options
from megatron_llamapro.expansion.round import Expansion
convert(Path(sys.argv[1]), Path(sys.argv[2]), expansion=Expansion.at(4), options=Options(progress=progress))
"""


@pytest.mark.parametrize("format_name", ["hf", "megatron"])
def test_a_kill_leaves_no_target_and_the_next_run_succeeds(format_name: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    arguments = [str(tiny_llama()), str(tmp_path / "target"), format_name, "300000"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path) == [".target.partial"]
    convert = {"hf": expand_hf, "megatron": hf_to_megatron}[format_name]
    convert(tiny_llama(), tmp_path / "target", expansion=Expansion.at(4))
    assert names(tmp_path) == ["target"]


FULL_DISK = """
import resource, sys
sys.argv[0] = "tools/expand_checkpoint.py"
from megatron_llamapro.checkpoint.convert import expand_hf, hf_to_megatron  # before files may not grow any more
from pathlib import Path
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from megatron_llamapro.config.command import run_command
from megatron_llamapro.expansion.round import Expansion
convert = {"hf": expand_hf, "megatron": hf_to_megatron}[sys.argv[3]]
run_command(lambda: convert(Path(sys.argv[1]), Path(sys.argv[2]), expansion=Expansion.at(4)) and 0)
"""


@pytest.mark.parametrize("format_name", ["hf", "megatron"])
def test_a_full_disk_is_one_line_and_leaves_nothing(format_name: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    """A file-size limit stands in for the disk."""
    arguments = [str(tiny_llama()), str(tmp_path / "target"), format_name]
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert re.search(r"/\.target\.partial/(model\.safetensors|__0_0\.distcp): File too large", ended.stderr)
    assert names(tmp_path) == []


def test_a_target_that_cannot_be_written_is_left_alone(tiny_llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        hf_to_megatron(tiny_llama(), tmp_path / "file" / "target")


READ_ONLY = """
import ctypes, sys
from pathlib import Path
from megatron_llamapro.checkpoint.convert import Options, hf_to_megatron
from megatron_llamapro.config.command import run_command
# Permissions bind an administrator only without these capabilities (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH).
libc, header, sets = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~0b110
assert libc.capset(header, sets) == 0
run_command(lambda: hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), options=Options(overwrite=True)) and 0)
"""


@pytest.mark.parametrize("target", ["new", "old"])
def test_a_read_only_folder_is_refused_and_unchanged(target: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "folder" / "old").mkdir(parents=True)
    (tmp_path / "folder" / "old" / "data").write_text("mine")
    (tmp_path / "folder").chmod(0o555)
    command = [sys.executable, "-c", READ_ONLY, str(tiny_llama()), str(tmp_path / "folder" / target)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    (tmp_path / "folder").chmod(0o755)
    assert (ended.returncode, ended.stderr) == (2, f"error: {tmp_path}/folder/.{target}.partial: Permission denied\n")
    assert names(tmp_path / "folder") == ["old"]
    assert contents(tmp_path / "folder" / "old") == {"data": b"mine"}


WAITING = """
import sys
from pathlib import Path
from megatron_llamapro.checkpoint.convert import Options, hf_to_megatron
said = []
def wait(num_bytes):
    if not said:
        said.append("writing")
        print(*said, flush=True)
        sys.stdin.readline()
hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), options=Options(num_workers=1, progress=wait))
"""


def test_a_second_writer_to_a_target_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    """The first one is not disturbed."""
    command = [sys.executable, "-c", WAITING, str(tiny_llama()), str(tmp_path / "it")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "writing\n"
        for options in (Options(), Options(overwrite=True), Options(resume=True)):
            with pytest.raises(CheckpointError, match="another process is writing"):
                hf_to_megatron(tiny_llama(), tmp_path / "it", options=options)
        first.communicate("go on\n")
    assert first.returncode == 0
    assert names(tmp_path) == ["it"]
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "it", quick=True))
