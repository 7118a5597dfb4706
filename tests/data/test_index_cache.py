"""The order of the samples on disk is complete or unused. After a kill, a cut file or a full disk, the next start has
the samples of an undisturbed one."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from megatron_llamapro.config.errors import DataError, LlamaProError, RunError
from megatron_llamapro.config.schema import BlendEntry, DataConfig
from megatron_llamapro.data import index_cache
from megatron_llamapro.data.dataset import build_train_dataset
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.testing.distributed import run_apart, run_distributed

SAMPLES = 40
Sources = tuple[tuple[BlendEntry, ...], Path]


def built(sources: Sources, cache: Path) -> torch.Tensor:
    """Return the tokens of all samples."""
    entries, tokenizer = sources
    dataset = build_train_dataset(
        DataConfig(train=entries, seq_length=32),
        num_samples=SAMPLES,
        seed=1,
        tokenizer=load_tokenizer(tokenizer),
        vocab_size=131,
        cache_dir=cache,
    )
    return torch.stack([dataset[index]["tokens"] for index in range(SAMPLES)])


@pytest.fixture
def sources(pair: Path, tokenizer_folder: Path) -> Sources:
    return (BlendEntry(str(pair)),), tokenizer_folder


@pytest.fixture
def undisturbed(sources: Sources, tmp_path: Path) -> torch.Tensor:
    return built(sources, tmp_path / "undisturbed")


def order(cache: Path) -> Path:
    [folder] = cache.glob("order-*")
    return folder


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": lambda path: path.unlink(),
    "a pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.".ljust(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_built_again(
    damage: str, sources: Sources, undisturbed: torch.Tensor, tmp_path: Path
) -> None:
    whole = {path.name: path.read_bytes() for path in order(tmp_path / "undisturbed").iterdir()}
    assert len(whole) == 5  # three indices, a description, and the list of them
    for name in whole:
        if damage == "a pickle" and not name.endswith(".npy"):
            continue
        DAMAGES[damage](order(tmp_path / "undisturbed") / name)
        assert torch.equal(built(sources, tmp_path / "undisturbed"), undisturbed)
        assert {path.name: path.read_bytes() for path in order(tmp_path / "undisturbed").iterdir()} == whole
        assert [path.name for path in (tmp_path / "undisturbed").iterdir()] == [order(tmp_path / "undisturbed").name]


def killed_at(step: int, sources: Sources, cache: Path) -> None:
    """Build, and be killed at the `step`th write or move of a file, which is then half done."""
    steps = iter(range(100))

    def dies(real: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            if next(steps) == step:
                if real is numpy.save:
                    Path(str(args[0])).write_bytes(b"\x93NUMPY half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    numpy.save = dies(numpy.save)
    index_cache.sync = dies(index_cache.sync)
    index_cache._move_into_place = dies(index_cache._move_into_place)
    built(sources, cache)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 8, 9, 10])
def test_a_kill_leaves_no_partial_order(step: int, sources: Sources, undisturbed: torch.Tensor, tmp_path: Path) -> None:
    """At each index, at the first and the last sync of a file, and before and after the rename."""
    cache = tmp_path / "cache"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_apart(killed_at, step, sources, cache)
    assert bool(list(cache.glob("order-*"))) == (step == 10)
    [draft] = cache.glob(".order-*") if step < 10 else [None]
    assert torch.equal(built(sources, cache), undisturbed)
    if draft is not None:
        assert draft.exists()  # it might belong to another run
        long_ago = draft.stat().st_mtime - 2 * 24 * 60 * 60
        os.utime(draft, (long_ago, long_ago))
        order(cache).rename(tmp_path / "moved")
        built(sources, cache)
    assert [path.name for path in cache.iterdir()] == [order(cache).name]


def on_a_full_disk(sources: Sources, cache: Path) -> str:
    """Build while no file may be larger than a part of the sample index; return the error of the first rank or of
    all."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, resource.RLIM_INFINITY))
    try:
        built(sources, cache)
    except LlamaProError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert type(error) is RunError
        return str(error)
    return "built"


def test_a_full_disk_is_one_line_on_every_rank(sources: Sources, undisturbed: torch.Tensor, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    messages = [run_apart(on_a_full_disk, sources, cache), *run_distributed(on_a_full_disk, 2, sources, cache)]
    for message in messages:
        assert message.startswith(f"the order of the samples was not written to {cache}: "), message
        assert "make room, or set data.cache_dir" in message and "\n" not in message
    assert list(cache.iterdir()) == []
    assert torch.equal(built(sources, cache), undisturbed)


def test_all_ranks_read_what_rank_0_rebuilds(sources: Sources, pair: Path, tmp_path: Path) -> None:
    """A blend, whose own index is cached too."""
    blend = ((BlendEntry(str(pair), 3.0), BlendEntry(str(pair), 1.0)), sources[1])
    first, second = run_distributed(built, 2, blend, tmp_path / "cache")
    assert torch.equal(first, second)
    for path in order(tmp_path / "cache").glob("*index.npy"):
        os.truncate(path, 0)
    again = run_distributed(built, 2, blend, tmp_path / "cache")
    assert torch.equal(again[0], first) and torch.equal(again[1], first)


def test_another_runs_order_is_kept(sources: Sources, undisturbed: torch.Tensor, tmp_path: Path) -> None:
    """Two starts build the same order at once: the one that finishes second finds the other's."""
    folder = order(tmp_path / "undisturbed")
    before = folder.stat().st_ino
    with index_cache.new_order(folder) as draft:
        (draft / "x.npy").write_bytes(b"another")
    assert folder.stat().st_ino == before and torch.equal(built(sources, tmp_path / "undisturbed"), undisturbed)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_impossible_cache_folder_is_refused(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be created or written to: Not a directory: set data\.cache_dir"):
        built(sources, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "No space left on device: make room"),
        (OSError("100 requested and 50 written"), RunError, "the disk may be full, or a quota reached: make room"),
        (OSError(errno.EROFS, "Read-only file system"), DataError, "Read-only file system: set data.cache_dir"),
        (PermissionError(errno.EACCES, "Permission denied"), DataError, "Permission denied: set data.cache_dir"),
    ],
)
def test_a_users_mistake_and_a_failing_machine_are_different_errors(
    error: OSError, kind: type, text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text), index_cache.naming_the_cache(tmp_path):
        raise error
