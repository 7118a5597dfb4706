"""Targets are complete or as they were, whatever happens on the way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llamapro.checkpoint.convert import Options, expand_hf, hf_to_megatron, legacy, megatron_to_hf
from megatron_llamapro.checkpoint.formats.folders import latest_checkpoint, resolve_megatron_checkpoint
from megatron_llamapro.checkpoint.inspection import inspect
from megatron_llamapro.checkpoint.proof.verify import verify
from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.staging import staged
from megatron_llamapro.expansion.round import Expansion

Tiny = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_target_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with (
        pytest.raises(CheckpointError, match=r"exists and is not empty: .*--overwrite"),
        staged(target, overwrite=False),
    ):
        pass
    assert contents(target) == {"mine.txt": b"precious"}
    assert names(tmp_path) == ["target"]


def test_an_empty_target_is_taken(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with staged(tmp_path / "target", overwrite=False) as folder:
        (folder / "new.txt").write_text("new")
    assert contents(tmp_path / "target") == {"new.txt": b"new"}


def test_overwriting_replaces_the_whole_target_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with staged(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert contents(target) == {"old.txt": b"old"}
    assert contents(target) == {"new.txt": b"new"}
    assert names(tmp_path) == ["target"]


def test_a_failure_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), staged(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        raise RuntimeError
    assert contents(target) == {"old.txt": b"old"}
    assert names(tmp_path) == ["target"]


def test_a_target_whose_writer_was_killed_between_the_renames_comes_back(tmp_path: Path) -> None:
    """It was to be replaced: whoever writes next finds it in its place again, and needs --overwrite as before."""
    target = tmp_path / "target"
    for overwrite in (False, True):
        (tmp_path / ".target.replaced").mkdir()
        (tmp_path / ".target.replaced" / "old.txt").write_text("old")
        (tmp_path / ".target.partial").mkdir()
        if not overwrite:
            with pytest.raises(CheckpointError, match="exists and is not empty"), staged(target, overwrite=False):
                pass
            assert contents(target) == {"old.txt": b"old"}
            assert names(tmp_path) == ["target"]
            shutil.rmtree(target)
            continue
        with staged(target, overwrite=True) as folder:
            assert contents(target) == {"old.txt": b"old"}
            (folder / "new.txt").write_text("new")
        assert contents(target) == {"new.txt": b"new"}
        assert names(tmp_path) == ["target"]


def test_killed_while_it_replaces_a_target_one_of_the_two_is_there(tiny_llama: Tiny, tmp_path: Path) -> None:
    """SIGKILL behind every rename: the old checkpoint or the new one, whole, by the next run at the latest."""
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


def test_what_is_in_the_way_of_the_draft_is_left_alone(tmp_path: Path) -> None:
    """A link to somebody's folder would have been emptied."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("mine")
    draft = tmp_path / ".target.partial"
    draft.symlink_to("precious")
    for _ in range(2):
        with (
            pytest.raises(CheckpointError, match=r"\.target\.partial is in the way"),
            staged(tmp_path / "target", overwrite=True),
        ):
            pass
        assert contents(tmp_path / "precious") == {"data": b"mine"}
        draft.unlink()
        draft.write_text("a file")
    assert names(tmp_path) == [".target.partial", "precious"]


@pytest.mark.parametrize("target", ["/", "..", "somewhere/.."])
def test_a_target_without_a_name(
    target: str, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="give the name of a folder to write"):
        hf_to_megatron(tiny_llama(), Path(target), options=Options(overwrite=True))
    assert names(tmp_path) == []


def test_a_file_in_the_targets_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("a file")
    with pytest.raises(CheckpointError, match="is not a folder"), staged(tmp_path / "target", overwrite=True):
        pass


def test_a_link_in_the_targets_place_is_refused(tmp_path: Path) -> None:
    """To a folder or to nothing: renaming would put the checkpoint in the link's place, not in the folder's."""
    (tmp_path / "folder").mkdir()
    for points_to in ("folder", "nothing"):
        (tmp_path / "target").symlink_to(points_to)
        with (
            pytest.raises(CheckpointError, match="target is a link: give the folder itself"),
            staged(tmp_path / "target", overwrite=True),
        ):
            pass
        (tmp_path / "target").unlink()


@pytest.mark.parametrize("place", [".", "inside", ".."], ids=["the source", "in the source", "around the source"])
def test_a_target_that_overlaps_its_source_is_refused(place: str, damaged: Tiny) -> None:
    source = damaged()
    before = contents(source)
    with pytest.raises(CheckpointError, match="overlap"):
        hf_to_megatron(source, source / place, options=Options(overwrite=True))
    assert contents(source) == before


def test_a_link_to_the_source_is_seen_through(damaged: Tiny, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(damaged())
    with pytest.raises(CheckpointError, match="overlap"):
        hf_to_megatron(tmp_path / "damaged", tmp_path / "link", options=Options(overwrite=True))


def test_two_writers_to_one_target(tmp_path: Path) -> None:
    with staged(tmp_path / "target", overwrite=False) as folder:
        (folder / "first.txt").write_text("first")
        with (
            pytest.raises(CheckpointError, match="another process is writing"),
            staged(tmp_path / "target", overwrite=True),
        ):
            pass
    assert contents(tmp_path / "target") == {"first.txt": b"first"}
    assert names(tmp_path) == ["target"]


def test_many_writers_to_one_target_never_mix(tmp_path: Path) -> None:
    """One wins or several in turn; the folder is always one writer's, whole."""
    outcomes: list[str] = []

    def write(number: int) -> None:
        try:
            with staged(tmp_path / "target", overwrite=True) as folder:
                for part in range(5):
                    (folder / f"{part}.txt").write_text(str(number))
            outcomes.append("written")
        except CheckpointError as refusal:
            outcomes.append(str(refusal))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert "written" in outcomes
    assert all(outcome == "written" or "another process is writing" in outcome for outcome in outcomes)
    found = contents(tmp_path / "target")
    assert sorted(found) == [f"{part}.txt" for part in range(5)]
    assert len(set(found.values())) == 1


KILLED_AT_RENAME = """
import os, signal
from pathlib import Path
from megatron_llamapro.checkpoint import folder
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
def test_killed_in_the_middle_the_target_is_absent_and_the_next_run_succeeds(
    format_name: str, tiny_llama: Tiny, tmp_path: Path
) -> None:
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
def test_a_full_disk_is_one_line_and_nothing_is_left(format_name: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    """Files that may not grow any further stand in for the disk."""
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
def test_a_folder_that_is_read_only(target: str, tiny_llama: Tiny, tmp_path: Path) -> None:
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


def test_two_programs_to_one_target(tiny_llama: Tiny, tmp_path: Path) -> None:
    """The second is refused while the first writes, which then goes on as if nothing had been."""
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


def training_run(folder: Path, source: Path, *iterations: int) -> Path:
    """A training run's folder, with checkpoints that were not trained."""
    for iteration in iterations:
        hf_to_megatron(source, folder / f"iter_{iteration:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{iterations[-1]}\n")
    return folder


def test_a_training_runs_folder_stands_for_its_newest_checkpoint(tiny_llama: Tiny, tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", tiny_llama(), 10, 20)
    assert resolve_megatron_checkpoint(run) == latest_checkpoint(run) == run / "iter_0000020"
    assert resolve_megatron_checkpoint(run / "iter_0000010") == run / "iter_0000010"
    megatron_to_hf(run, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_a_release_stands_for_itself(tiny_llama: Tiny, tmp_path: Path) -> None:
    """The folder that Megatron-LM takes: docs/other_tools.md."""
    hf_to_megatron(tiny_llama(), tmp_path / "it" / "release")
    (tmp_path / "it" / "latest_checkpointed_iteration.txt").write_text("release")
    assert resolve_megatron_checkpoint(tmp_path / "it") == tmp_path / "it" / "release"
    assert inspect(tmp_path / "it").shape.num_layers == 4
    megatron_to_hf(tmp_path / "it", tmp_path / "back")
    assert all(check.ok for check in verify(tiny_llama(), tmp_path / "back", quick=True))


def test_a_legacy_checkpoint_is_not_what_training_takes(tiny_llama: Tiny, tmp_path: Path) -> None:
    hf_to_megatron(tiny_llama(), tmp_path / "it", kind=legacy())
    for folder in (tmp_path / "it", tmp_path / "it" / "release"):
        with pytest.raises(CheckpointError, match=r"release is a legacy checkpoint.*megatron-to-megatron"):
            resolve_megatron_checkpoint(folder)


BAD_LATEST = {"text": "soon", "negative": "-1", "empty": "", "digits of another script": "٣", "not there": "30"}


@pytest.mark.parametrize("text", BAD_LATEST.values(), ids=BAD_LATEST.keys())
def test_a_latest_file_that_names_nothing(text: str, tiny_llama: Tiny, tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", tiny_llama(), 10)
    (run / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt"):
        resolve_megatron_checkpoint(run)


def test_what_is_no_megatron_checkpoint(tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a Megatron checkpoint: it has no metadata\.json"):
        resolve_megatron_checkpoint(tiny_llama())
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        resolve_megatron_checkpoint(tmp_path / "nowhere")


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, damaged: Tiny, tmp_path: Path) -> None:
    """A tokenizer.json that is somebody's private key would be published with the export."""
    source = damaged()
    outside = tmp_path / "outside"
    (source / name).rename(outside)
    link(source, name, outside)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        hf_to_megatron(source, tmp_path / "it")
    assert names(tmp_path) == ["damaged", "outside"]


def test_a_link_in_a_loop(damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    link(source, "model.safetensors", source / "other")
    link(source, "other", source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be opened") as refusal:
        hf_to_megatron(source, tmp_path / "it")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pipe_is_not_waited_for(name: str, damaged: Tiny, tmp_path: Path) -> None:
    source = damaged()
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        hf_to_megatron(source, tmp_path / "it")
