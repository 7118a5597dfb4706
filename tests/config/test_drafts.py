"""A target folder is complete or unchanged, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from megatron_llamapro.config.drafts import staged
from megatron_llamapro.config.errors import CheckpointError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    """Return every name in a folder, hidden files too."""
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


def test_an_empty_target_is_used(tmp_path: Path) -> None:
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


def test_a_target_is_restored_if_its_writer_was_killed_between_the_renames(tmp_path: Path) -> None:
    """The target was being replaced. The next writer finds it back in place, and still needs --overwrite."""
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


def test_a_link_or_file_in_place_of_the_draft_is_left_alone(tmp_path: Path) -> None:
    """Otherwise a link to a user's folder would empty that folder."""
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


def test_a_file_in_place_of_the_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("a file")
    with pytest.raises(CheckpointError, match="is not a folder"), staged(tmp_path / "target", overwrite=True):
        pass


def test_a_link_in_place_of_the_target_is_refused(tmp_path: Path) -> None:
    """A link to a folder or to nothing: renaming would replace the link, not fill the folder."""
    (tmp_path / "folder").mkdir()
    for points_to in ("folder", "nothing"):
        (tmp_path / "target").symlink_to(points_to)
        with (
            pytest.raises(CheckpointError, match="target is a link: give the folder itself"),
            staged(tmp_path / "target", overwrite=True),
        ):
            pass
        (tmp_path / "target").unlink()


def test_a_second_writer_to_a_target_is_refused(tmp_path: Path) -> None:
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
    """One or several win in turn; the folder always holds one writer's files, complete."""
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
