"""Checkpoint folders on disk: written beside their place and renamed into it, resolved, and their small files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_llamapro.config.errors import CheckpointError
from megatron_llamapro.config.files import file_inside, naming, read_small
from megatron_llamapro.config.hints import broken_link, hint_where_nothing_is

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What that file holds, and the folder beside it is called, where a checkpoint is not one of a run's."""
TORCH_DIST_MARK = "metadata.json"
"""Written last by whoever writes torch_dist, so that its presence means a complete checkpoint."""
INDEX_NAME = ".metadata"
"""Of torch_dist: where its tensors lie."""
_HUGGING_FACE = ("*.safetensors", "pytorch_model*.bin")


def iteration_folder(save: Path, iteration: int) -> Path:
    """Folder of the checkpoint after `iteration` steps."""
    return save / f"iter_{iteration:07d}"


def latest_checkpoint(save: Path) -> Path | None:
    """The newest complete checkpoint of a training run's folder (or its release), or None where there is none yet.

    Raises:
        CheckpointError: the file that names it is damaged, or names a folder that is not there.
    """
    latest = file_inside(save, LATEST)
    if latest is None:
        return None
    text = read_small(latest).decode(errors="replace").strip()
    is_step = text.isascii() and text.isdigit() and len(text) < 20
    if not is_step and text != RELEASE:
        raise CheckpointError(
            f"{latest} holds '{text[:40]}', not a step number: write the number of a folder beside it"
        )
    folder = iteration_folder(save, int(text)) if is_step else save / RELEASE
    if not folder.is_dir():
        raise CheckpointError(f"{latest} names {folder.name}, which is not there: write the number of one that is")
    return folder


def resolve_megatron_checkpoint(path: Path) -> Path:
    """The folder that holds the tensors: `path` itself, or the newest checkpoint of a training run's folder.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    if not path.is_dir():
        hint = hint_where_nothing_is(path) or "give the folder of a Megatron checkpoint"
        raise CheckpointError(f"{path} is not a folder: {hint}")
    folder = path if is_torch_dist(path) else latest_checkpoint(path)
    if any((folder or path).glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder or path} is a legacy checkpoint, for one division of ranks: convert it with "
            "tools/convert_checkpoint.py megatron-to-megatron"
        )
    if folder is None or not is_torch_dist(folder):
        raise CheckpointError(
            f"{folder or path} is not a Megatron checkpoint: it has no {TORCH_DIST_MARK} of one "
            "(tools/convert_checkpoint.py hf-to-megatron writes one)"
        )
    return folder


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder holds a complete checkpoint in torch_dist format. Others call a file metadata.json too, so
    beside Hugging Face's weights it says nothing."""
    if not (folder / TORCH_DIST_MARK).is_file():
        return False
    return (folder / INDEX_NAME).exists() or not any(any(folder.glob(pattern)) for pattern in _HUGGING_FACE)


def draft_of(target: Path) -> Path:
    """The folder beside a target in which it is written.

    Raises:
        CheckpointError: `target` has no name that another folder could stand beside.
    """
    target = Path(target).absolute()
    if target.name in ("", ".."):
        raise CheckpointError(f"{target} cannot be a target: give the name of a folder to write")
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def staged(
    target: Path, *, overwrite: bool, resume: bool = False, sources: tuple[Path, ...] = (), journal: str | None = None
) -> Iterator[Path]:
    """A folder to write into, beside `target`; when the block ends well it is synced and becomes `target`, without the
    file `journal`, which is kept until then, since a large checkpoint takes minutes to sync.

    If the block fails, `target` is as it was and what was written is gone; after a kill or an interrupt, and where an
    earlier run was to be gone on with (`resume`), it is still there: the next writer to the same target clears it, or
    goes on with it. A target that was about to be replaced when its writer was killed comes back then.

    Raises:
        CheckpointError: `target` exists and is not empty (unless `overwrite`), is one of `sources` or holds or lies in
            one, or another process is writing to it.
    """
    target = Path(target).absolute()
    draft = draft_of(target)
    _check_target(target, overwrite=overwrite, sources=sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(draft, target):
        try:
            _restore(target)
            _check_target(target, overwrite=overwrite, sources=sources)
            if not resume:
                clear(draft)
            yield draft
            sync_tree(draft)
            if journal is not None:
                (draft / journal).unlink()
                sync(draft)
            _check_target(target, overwrite=overwrite, sources=sources)
            _move_into_place(draft, target)
        except Exception:
            if not resume:
                shutil.rmtree(draft, ignore_errors=True)
            raise


def _check_target(target: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    real = Path(os.path.realpath(target))  # `resolve` raises where links are a loop
    for source in sources:
        inside = Path(source).resolve()
        if real == inside or real in inside.parents or inside in real.parents:
            raise CheckpointError(f"the target {target} and the source {source} overlap: choose another target")
    if target.is_symlink():
        raise CheckpointError(f"{target} is a link: give the folder itself")
    if (broken := broken_link(target)) is not None:
        raise CheckpointError(f"{target} cannot be a target: {broken}")
    if target.is_dir():
        if not overwrite and any(target.iterdir()):
            raise CheckpointError(f"{target} exists and is not empty: choose another target, or give --overwrite")
    elif target.exists():
        raise CheckpointError(f"{target} exists and is not a folder: choose another target")


@contextlib.contextmanager
def locked(draft: Path, target: Path) -> Iterator[None]:
    """Make the draft folder and hold its lock, which the kernel frees when this process ends, however it ends.

    Raises:
        CheckpointError: another process holds it, or something else is in its place.
    """
    busy = CheckpointError(f"another process is writing {target}: wait for it, or choose another target")
    if draft.is_symlink() or draft.is_file():
        raise CheckpointError(f"{draft} is in the way, and no folder of this program's: remove it, then try again")
    try:
        draft.mkdir(exist_ok=True)
    except FileExistsError:  # its owner was done with it just now
        raise busy from None
    try:
        descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:  # likewise
        raise busy from None
    try:
        if not _lock(descriptor) or not _is_still(descriptor, draft):
            raise busy
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open folder is the one at `path`: its last owner may have renamed or removed it in between."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def clear(folder: Path, *, but: Collection[str] = ()) -> None:
    """Remove everything in a folder, `but` files and folders of these names."""
    for path in folder.iterdir():
        if path.name in but:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore(target: Path) -> None:
    """Take back the first of the two renames below, where a kill has come in between."""
    if _replaced(target).is_dir() and not target.exists():
        _replaced(target).rename(target)


def _move_into_place(draft: Path, target: Path) -> None:
    """Two renames; should the second fail, the first is taken back."""
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    had_target = target.exists()
    if had_target:
        target.rename(replaced)
    try:
        draft.rename(target)
    except OSError:
        if had_target:
            replaced.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder.

    Raises:
        OSError: it cannot; the error names the file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
