"""A start reads each small file once, on one rank, and passes the content to the others."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import workers
from megatron_llamapro.config.io import dump_yaml
from megatron_llamapro.config.schema import BlendEntry, RunConfig
from megatron_llamapro.testing.distributed import run_distributed

START = {".metadata", "common.pt", "config.json", "llamapro.json", "tokenizer.json"}
RESUMED = {".metadata", "common.pt", "config.json", "llamapro.json", "llamapro_delta.json"}
DATA = {"a.idx", "a.json", "b.idx", "b.json"}

# Functions that may open a small file again, as file and function, with the reason.
EXCEPTED = {
    "megatron/core": "loads checkpoints and maps token files with its own readers, on every rank",
    "config/files.py check_fetched": "looks for a Git LFS pointer in a file that a library reads or that is copied",
    "checkpoint/side_files.py copy_side_files": "copies files into the run's base",
    "config/drafts.py sync": "syncs the copied files to the disk",
    "training/checkpoints/delta_parts.py make_base": "copies files into the run's base",
}

Open = tuple[str, str]
"""Path, and the function that opened it, named as in `EXCEPTED`."""


def watched_opens() -> list[Open]:
    """Return a list that grows by every file that this process opens to read, for as long as it lives."""
    opened: list[Open] = []

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and not isinstance(arguments[0], int) and not (arguments[2] or 0) & os.O_ACCMODE:
            opened.append((os.fsdecode(arguments[0]), _opener()))

    sys.addaudithook(note)
    return opened


def _opener() -> str:
    """Return the innermost function on the stack that is ours or megatron.core's."""
    frame = sys._getframe(2)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/megatron/core/" in path:
            return "megatron/core"
        if "/megatron_llamapro/" in path:
            return f"{path.rpartition('/megatron_llamapro/')[2]} {name}"
        frame = frame.f_back
    return "nobody"


def opens_of_a_start(config_file: Path) -> list[Open]:
    """Return the files that this rank opens before the first step."""
    from megatron_llamapro.pretrain import _read
    from megatron_llamapro.runtime.stop import StopRequest
    from megatron_llamapro.training.loop import _saver
    from megatron_llamapro.training.setup import set_up

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # as torchrun does; the process group already exists
    sys.argv = ["pretrain", "--config", str(config_file)]
    opened = watched_opens()
    config, start = _read(None, StopRequest())
    _saver(set_up(config, read_by_rank_0=start))
    return [*opened]


def reads_by_rank(config_file: Path, names: set[str]) -> list[Counter[str]]:
    """Return, for each of two ranks, how often it reads each file with one of the names; exceptions do not count."""
    return [
        Counter(path for path, opener in opened if Path(path).name in names and opener not in EXCEPTED)
        for opened in run_distributed(opens_of_a_start, 2, config_file)
    ]


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_small_files_are_read_once_on_one_rank(resumed: bool, run_config: Callable, tmp_path: Path) -> None:
    config = run_config(exit_interval=2)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    start, save = Path(config.model.checkpoint), Path(config.checkpoint.save)
    data = Path(config.data.train[0].prefix).parent
    expected = {*(start / name for name in START), *(data / name for name in DATA)}
    if resumed:
        run_distributed(workers.train, 2, config)
        expected |= {save / "latest_checkpointed_iteration.txt", *(save / "iter_0000002" / name for name in RESUMED)}
        expected |= {save / "base" / name for name in RESUMED - {"llamapro_delta.json"}}
    first, second = reads_by_rank(tmp_path / "run.yaml", {path.name for path in expected})
    assert first == dict.fromkeys(map(str, expected), 1)
    assert not second


def set_up_in(config: RunConfig, folders: tuple[Path, Path]) -> str:
    """Return the error message of set-up, with each of two ranks in its own folder."""
    os.chdir(folders[torch.distributed.get_rank()])
    return workers.set_up_errors([config])[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rm -r other/model", "CheckpointError: model does not exist on this rank: put it where every rank"),
        ("rm other/a.bin", "DataError: a.bin does not exist on this rank: put it where every rank can read it"),
        ("echo >> other/a.idx", "bytes, but {idx_bytes} on the first rank: copy it again"),
    ],
)
def test_a_rank_with_other_files_ends_all_ranks(change: str, said: str, run_config: Callable, tmp_path: Path) -> None:
    """Each rank's node has its own copies; one copy is wrong."""
    given = run_config()
    for name in ("first", "other"):
        shutil.copytree(given.model.checkpoint, tmp_path / name / "model")
        for ending in ("bin", "idx"):
            shutil.copyfile(f"{given.data.train[0].prefix}.{ending}", tmp_path / name / f"a.{ending}")
    subprocess.run(change, shell=True, check=True, cwd=tmp_path)
    config = dataclasses.replace(
        given,
        model=dataclasses.replace(given.model, checkpoint="model"),
        data=dataclasses.replace(given.data, train=(BlendEntry("a"),), valid={}),
    )
    first, second = run_distributed(set_up_in, 2, config, (tmp_path / "first", tmp_path / "other"))
    assert first == second
    assert said.format(idx_bytes=(tmp_path / "first" / "a.idx").stat().st_size) in first and "(on rank 1)" in first
