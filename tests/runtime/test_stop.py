"""What each signal does before and in training: every cell of the table in runtime/stop.py, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

PROGRAM = """
import sys, time
from megatron_llamapro.runtime.stop import StopRequest

stop = StopRequest()
stop.kept = lambda: "step 3 is kept"
if sys.argv[1] != "starting":
    stop.begin(saves=sys.argv[1] == "saving")
print("ready", flush=True)
until = time.monotonic() + 1
while not stop.requested and time.monotonic() < until:
    time.sleep(0.01)
heard = stop.requested
time.sleep(float(sys.argv[2]))  # the step, and the save
stop.close()
print("went on" if not heard else "ended", flush=True)
time.sleep(0.5)
sys.exit(130 if stop.interrupted else 0)
"""
INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
SAVES = "interrupted: the current step is saved, then the run stops; Ctrl-C again stops at once\n"
SAVES_NOTHING = "interrupted: the current step is the last, and nothing is saved; Ctrl-C again stops at once\n"
AT_ONCE = "error: interrupted at once, unsaved steps are lost; step 3 is kept\n"
BEFORE = "before the first step; step 3 is kept\n"


def run(
    phase: str, *signals: signal.Signals | float, ignored: Sequence[signal.Signals] = (), **variables: str
) -> tuple[int, str, str]:
    """Exit code and output of a program that is sent these signals, with pauses."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    step_seconds = 2.0 if any(isinstance(each, float) for each in signals) else 0.1
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase, str(step_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, **variables},
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
    )
    assert process.stdout.readline() == "ready\n"
    for each in signals:
        process.send_signal(each) if isinstance(each, signal.Signals) else time.sleep(each)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (INT, 130, f"error: interrupted {BEFORE}"),
        (TERM, 143, f"error: stopped by SIGTERM {BEFORE}"),
        (HUP, 129, f"error: stopped by SIGHUP {BEFORE}"),
    ],
)
def test_before_the_first_step_it_ends_at_once(number: signal.Signals, code: int, line: str) -> None:
    assert run("starting", number) == (code, "", line)


def test_slurms_warning_is_remembered() -> None:
    assert run("starting", USR1) == (0, "ended\n", "")


@pytest.mark.parametrize(
    ("signals", "code", "out", "errors"),
    [
        ((TERM,), 0, "ended\n", ""),
        ((USR1,), 0, "ended\n", ""),
        ((HUP,), 0, "ended\n", ""),
        ((TERM, 0.7, TERM, USR1), 0, "ended\n", ""),
        ((INT,), 130, "ended\n", SAVES),
        ((INT, 0.1, INT), 130, "ended\n", SAVES),  # one key, heard twice
        ((INT, 0.7, INT), 130, "", SAVES + AT_ONCE),
        ((INT, 0.7, TERM), 130, "", SAVES + AT_ONCE),
        ((TERM, 0.7, INT), 130, "ended\n", SAVES),
    ],
    ids=str,
)
def test_while_it_trains(signals: tuple, code: int, out: str, errors: str) -> None:
    assert run("saving", *signals) == (code, out, errors)


def test_without_checkpoints_it_says_so() -> None:
    assert run("saving nothing", INT) == (130, "ended\n", SAVES_NOTHING)


def test_one_process_of_a_node_says_it() -> None:
    assert run("saving", INT, 0.7, INT, LOCAL_RANK="1") == (130, "", "")


@pytest.mark.parametrize("number", [HUP, INT])
def test_what_nohup_ignores_is_ignored(number: signal.Signals) -> None:
    assert run("saving", number, ignored=[number]) == (0, "went on\n", "")


def test_torchrun_hears_what_nohup_ignores_and_so_do_its_ranks() -> None:
    """torchrun sets its handlers over it, passes the signal on, and kills 30 seconds later."""
    assert run("saving", INT, ignored=[INT], TORCHELASTIC_RUN_ID="x") == (130, "ended\n", SAVES)


@pytest.mark.parametrize("number", [TERM, USR1, HUP])
def test_its_end_is_not_disturbed(number: signal.Signals) -> None:
    """A signal that comes when all is saved, as when torchrun ends the neighbours of a rank, changes no exit code."""
    code, out, _ = run("saving", TERM, 2.2, number)
    assert (code, out) == (0, "ended\n")


CHILD = """
import multiprocessing, os, signal, time
from megatron_llamapro.runtime.stop import StopRequest

stop = StopRequest()
stop.begin(saves=True)
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1.0,))
child.start()
time.sleep(0.2)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    os.kill(child.pid, number)
child.join()
print(child.exitcode, stop.requested)
"""


def test_what_is_forked_from_a_run_goes_on_and_asks_it_nothing() -> None:
    """As the process that writes a checkpoint beside training."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 False\n", "")
