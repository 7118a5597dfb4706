"""TensorBoard and Weights & Biases, the real packages. A missing requirement is reported at once, and a failure during
the run does not end it."""

from __future__ import annotations

import http.server
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_llamapro.training.trackers import TensorBoardWriter

STEP = {"kind": "train", "iteration": 7, "loss": 1.5, "grad_norm": math.nan, "learning_rate": 1e-3}
BLOCK = {"kind": "block", "iteration": 7, "layer": 4, "contribution": 0.1, "grad_norm": 0.5, "distance": 0.0}
HELD_OUT = {"kind": "eval", "iteration": 7, "name": "cpp", "loss": 1.75, "tokens": 10}


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    writer = TensorBoardWriter(str(tmp_path), resumed_at=0)
    skip = {"kind": "skip", "iteration": 7, "skipped_steps": 3}
    for record in ({"kind": "run", "iteration": 0}, STEP, HELD_OUT, {**BLOCK, "output_norm": 0.02}, skip):
        writer.write(record)
    writer.close(failed=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("block 4/output_norm")[0].value == pytest.approx(0.02)
    assert events.Scalars("train/loss")[0].value == 1.5 and events.Scalars("eval/cpp")[0].step == 7
    assert math.isnan(events.Scalars("train/grad_norm")[0].value)
    assert events.Scalars("train/skipped_steps")[0].value == 3


def pretrain(folder: Path, *options: str, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run the front door with an empty run, because trackers are checked first."""
    command = [sys.executable, *(["-S"] if site else []), "-m", "megatron_llamapro.pretrain"]
    run = ["--model.checkpoint=none", "--data.train=[{prefix: none}]", "--data.seq_length=8"]
    training = [f"--training.{name}=1" for name in ("train_iters", "micro_batch_size", "global_batch_size")]
    keyless = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    keyless |= {"HOME": str(folder), "PYTHONPATH": str(site or "")}
    return subprocess.run(
        [*command, *run, *training, f"--checkpoint.save={folder / 'save'}", *options],
        env={**keyless, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


def said_in_one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers requests but accepts no key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_does_not_answer_is_reported(tmp_path: Path) -> None:
    done = pretrain(tmp_path, "--logging.wandb_project=pro", WANDB_BASE_URL="http://127.0.0.1:9")
    assert said_in_one_line(done).startswith(
        "error: logging.wandb_project (pro): http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused): "
    )


@pytest.mark.parametrize(
    ("key", "reason"), [({}, "No API key configured"), ({"WANDB_API_KEY": 40 * "a"}, "Failed to authenticate with")]
)
def test_a_missing_or_wrong_key_is_reported(key: dict, reason: str, server: str, tmp_path: Path) -> None:
    done = pretrain(tmp_path, "--logging.wandb_project=pro", WANDB_BASE_URL=server, **key)
    line = said_in_one_line(done)
    assert line.startswith(f"error: logging.wandb_project (pro): {reason}")
    assert "run `wandb login`, or set WANDB_API_KEY; else leave it out, or set WANDB_MODE=offline" in line


@pytest.mark.parametrize(("option", "package"), [("wandb_project", "wandb"), ("tensorboard_dir", "tensorboard")])
def test_a_missing_package_is_reported(option: str, package: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for path in Path(pytest.__file__).parents[1].iterdir():
        if path.name != package:
            (site / path.name).symlink_to(path)
    line = said_in_one_line(pretrain(tmp_path, f"--logging.{option}=x", site=site))
    assert line.startswith(f"error: logging.{option}") and f"needs the {package} package: pip install {package}" in line


# Write records of ten steps to a tracker that stops working at the fifth.
BROKEN = """
import os, resource, signal, sys, time
from pathlib import Path
import psutil
from megatron_llamapro.config.io import parse_run_config
from megatron_llamapro.training.trackers import Guarded, TensorBoardWriter, WandbWriter

def full_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

def killed_service():
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    psutil.wait_procs(children)

if sys.argv[1] == "tensorboard":
    tracker, fail = TensorBoardWriter("events", resumed_at=0), full_disk
else:
    config = parse_run_config(sys.argv[2:])
    tracker, fail = WandbWriter(config, folder=Path("."), run_id="one", plain_config={}), killed_service
with Guarded(tracker) as guarded:
    for step in range(10):
        if step == 5:
            fail()
        guarded.write({"kind": "train", "iteration": step, "loss": 1.0})
        time.sleep(0.1)  # TensorBoard writes in a thread, and says at the next step what failed
print("trained on")
"""


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_failing_tracker_does_not_end_the_run(tracker: str, tmp_path: Path) -> None:
    """TensorBoard's disk is full. The wandb service gets the SIGTERM that a scheduler sends to the whole job."""
    run = ["--model.checkpoint=x", "--data.train=[{prefix: x}]", "--data.seq_length=8", "--logging.wandb_project=pro"]
    training = [f"--training.{name}=1" for name in ("train_iters", "micro_batch_size", "global_batch_size")]
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, tracker, *run, *training],
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "trained on", done.stderr
    # TensorBoard's thread may be printing its traceback, so the warning need not begin a line.
    assert done.stderr.count("warning: ") == 1 == done.stderr.count("the run continues without it"), done.stderr
    assert tracker == "tensorboard" or "Traceback" not in done.stderr, done.stderr
