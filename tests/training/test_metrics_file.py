"""The metrics file: every step once, however the run was interrupted, and no other run's records lost."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import DataError
from megatron_llamapro.training.metrics_file import JsonlWriter, move_aside, read_records


def step(number: int, **figures: object) -> dict:
    return {"kind": "train", "iteration": number, "loss": 1.5, **figures}


def start(path: Path, *, resumed_at: int = 0, run_id: str = "one", until: int = 0) -> None:
    """Start a run that trains to step `until`."""
    writer = JsonlWriter(path, resumed_at=resumed_at, run_id=run_id)
    writer.write({"kind": "run", "iteration": resumed_at})
    for number in range(resumed_at + 1, until + 1):
        writer.write(step(number))


def steps(path: Path) -> list[int]:
    return [record["iteration"] for record in read_records(path) if record["kind"] == "train"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a" / "metrics.jsonl"


@pytest.mark.parametrize("cut", ['{"kind": "tra', '{"kind": "train", "iteration": 3', "\0\0\0", "\xff", ""])
def test_a_resumed_run_has_every_step_once(cut: str, path: Path) -> None:
    start(path, until=5)
    with path.open("ab") as file:
        file.write(cut.encode("latin-1"))  # killed while writing
    assert steps(path) == [1, 2, 3, 4, 5]  # as seen by a reader before the resume
    start(path, resumed_at=3, until=4)
    assert steps(path) == [1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_lost_only_its_line_break_is_kept(path: Path) -> None:
    start(path, until=3)
    path.write_bytes(path.read_bytes().rstrip())
    start(path, resumed_at=3, until=4)
    assert steps(path) == [1, 2, 3, 4]


def test_a_new_run_moves_earlier_records_aside(path: Path, capsys: pytest.CaptureFixture) -> None:
    records = []
    for until in (3, 2, 1):
        start(path, until=until)
        records.append(path.read_bytes())
    assert [path.with_name(name).read_bytes() for name in ("metrics.1.jsonl", "metrics.2.jsonl", path.name)] == records
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path} held the records of an earlier run: moved to {path.with_name('metrics.1.jsonl')}"


def test_a_resumed_run_keeps_another_runs_record(path: Path) -> None:
    """Two runs have the same logging.metrics_file; the second resumes from its own step 1."""
    start(path, run_id="one", until=5)
    start(path, run_id="two", resumed_at=1, until=2)
    assert steps(path) == [2] and steps(path.with_name("metrics.1.jsonl")) == [1, 2, 3, 4, 5]


def test_a_file_that_is_not_a_record_is_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("my notes")
    start(path, resumed_at=2, until=3)
    assert path.with_name("metrics.1.jsonl").read_text() == "my notes"


def test_the_record_of_an_earlier_version_is_continued(path: Path) -> None:
    """It names no run."""
    path.parent.mkdir()
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"kind": "run", "iteration": 0}, step(1), step(2))))
    start(path, resumed_at=1, until=2)
    assert steps(path) == [1, 2] and len(list(path.parent.iterdir())) == 1


def test_figures_that_are_not_finite_are_null(path: Path) -> None:
    JsonlWriter(path, resumed_at=0).write(step(1, loss=math.nan, grad_norm=-math.inf, nested={"a": [math.inf, 1.0]}))

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    [record] = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert (record["loss"], record["grad_norm"], record["nested"]) == (None, None, {"a": [None, 1.0]})


def test_names_of_moved_files_do_not_collide(tmp_path: Path) -> None:
    (tmp_path / "m.1.jsonl").touch()
    (tmp_path / "m.jsonl").touch()
    assert move_aside(tmp_path / "m.jsonl") == tmp_path / "m.2.jsonl"


# A process that for a while may write files of at most 400 bytes, as on a full disk.
FULL = """
import resource, signal, sys
from pathlib import Path
from megatron_llamapro.training.metrics_file import JsonlWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = JsonlWriter(Path(sys.argv[1]), resumed_at=0, run_id="one")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for number in range(1, 41):
    if number in (5, 25):
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    if number == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write({"kind": "train", "iteration": number, "loss": 1.5})
writer.close()
"""


def test_a_full_disk_stops_neither_training_nor_the_record(path: Path) -> None:
    """The disk is full from step 5 to 19, and again from step 25 on: one warning each time, and only whole lines at any
    moment."""
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert done.returncode == 0
    whole = path.read_text()
    assert whole.endswith("\n") and steps(path) == list(range(1, 25))
    first, again, second, lacks = done.stderr.splitlines()
    assert (
        first
        == second
        == f"warning: {path} cannot be written: File too large: the run continues, and retries at every record"
    )
    assert again.endswith("can be written again; no record is missing")
    assert lacks.endswith("could not be written: records missing at its end: 16")


@pytest.mark.parametrize(
    ("content", "line"),
    [("x", 1), ("[]\n", 1), ('{"kind": "run"}\nx\n', 2), ('{"kind": "run"}\nx\n{"kind": "run"}\n', 2)],
)
def test_a_file_that_is_not_a_record_is_named(content: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(content)
    with pytest.raises(DataError, match=f"m, line {line}: not a metrics record"):
        read_records(tmp_path / "m")
