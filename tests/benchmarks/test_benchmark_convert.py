"""The converter benchmark on a tiny model: its byte counts equal the files on disk. No test looks at a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from conversion_table import file_system
from convert import check_room
from measure import ProgramError, bytes_in, descendants, forget_files, run_measured
from megatron_llamapro.config.errors import ConfigError
from random_llama import SHAPES, LlamaShape, write_random_llama

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert.py"
TINY = SHAPES["tiny"]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_report_agrees_with_the_files_written(tmp_path: Path) -> None:
    ended = run("--tiny", "--work_dir", tmp_path / "work", "--json", tmp_path / "runs.json")
    assert ended.returncode == 0, ended.stderr
    measured = json.loads((tmp_path / "runs.json").read_text())
    runs = {name: found for name, [found] in measured["runs"].items()}
    assert list(runs) == ["hf_to_megatron", "floor", "copy_of_source", "megatron_to_hf"]
    assert all(found["seconds"] > 0 and found["failure"] is None for found in runs.values())
    written = {name: found["written_bytes"] for name, found in runs.items()}
    assert written["floor"] == written["hf_to_megatron"]
    assert measured["source_bytes"] < written["copy_of_source"] < 1.1 * measured["source_bytes"]
    for name in ("hf_to_megatron", "megatron_to_hf"):
        assert measured["expanded_bytes"] < written[name] < 1.1 * measured["expanded_bytes"]
    rows = re.findall(r"^\| (\w.*?) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", ended.stdout, re.MULTILINE)
    assert len(rows) == len(runs)
    assert [ratio for title, _, _, ratio in rows if "the floor" in title] == ["1.00"]
    assert list((tmp_path / "work").iterdir()) == []


def test_random_checkpoints_are_finite_and_all_tensors_differ(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "llama", TINY, max_shard_bytes=2**20)
    shards = sorted((tmp_path / "llama").glob("*.safetensors"))
    assert len(shards) > 2
    seen = {}
    for path in shards:
        assert path.stat().st_size < 1.1 * 2**20
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).float().numpy()
                assert np.isfinite(tensor).all()
                seen[name] = tensor
    assert {name: array.shape for name, array in seen.items()} == TINY.tensors()
    assert len({array.tobytes() for array in seen.values()}) == len(seen)


def test_random_checkpoints_are_complete_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_random_llama(tmp_path / "llama", TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype="auto")
    assert model.num_parameters() == TINY.num_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tinyllama", 1_100_048_384), ("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320)],
)
def test_shapes_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    assert SHAPES[name].num_parameters == parameters


def test_memory_and_written_bytes_of_a_program_are_measured(tmp_path: Path) -> None:
    code = "import sys, time; held = bytes([7]) * 10**8; open(sys.argv[1], 'wb').write(held[:1000]); time.sleep(1)"
    command = [sys.executable, "-c", code, tmp_path / "file"]
    done = run_measured(command, written=tmp_path, log=tmp_path.with_suffix(".log"))
    assert done.peak_anonymous_bytes > 10**8
    assert bytes_in(tmp_path) == 1000


def test_disk_reads_and_writes_of_a_program_are_measured(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'wb').write(bytes(10**7))"
    written = run_measured([sys.executable, "-c", code, tmp_path / "file"], written=tmp_path, log=tmp_path / "log")
    forget_files(tmp_path)
    read = run_measured(["cat", tmp_path / "file"], written=tmp_path, log=Path("/dev/null"))
    on_disk = 0 if file_system(tmp_path) == "tmpfs" else 10**7
    assert on_disk <= written.disk_write_bytes <= on_disk + 10**6
    assert on_disk <= read.disk_read_bytes <= on_disk + 10**7


def test_a_failing_program_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="exit code 3: no such thing"):
        run_measured(["sh", "-c", "echo no such thing; exit 3"], written=tmp_path, log=tmp_path / "log")


def test_a_model_too_large_for_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    too_large = LlamaShape(2**20, 2**22, 80, 64, 8, 32000, 4096)
    with pytest.raises(ConfigError, match=r"GB free, but this model needs .*choose a smaller --model"):
        check_room(tmp_path, too_large)


def test_usage_errors_are_one_line() -> None:
    ended = run("--runs", 0)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: --runs 0: it must be at least 1") and ended.stderr.count("\n") == 1


def test_an_ended_program_has_no_descendants() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    assert descendants(ended.pid) == [ended.pid]
