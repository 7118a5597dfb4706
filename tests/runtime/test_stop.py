"""The effect of each signal before and during training: every cell of the table in runtime/stop.py, in real
processes."""

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
    """Return exit code and output of a program that receives these signals, with pauses."""
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
def test_a_signal_before_the_first_step_ends_the_program_at_once(number: signal.Signals, code: int, line: str) -> None:
    assert run("starting", number) == (code, "", line)


def test_slurms_warning_before_the_first_step_is_remembered() -> None:
    assert run("starting", USR1) == (0, "ended\n", "")


@pytest.mark.parametrize(
    ("signals", "code", "out", "errors"),
    [
        ((TERM,), 0, "ended\n", ""),
        ((USR1,), 0, "ended\n", ""),
        ((HUP,), 0, "ended\n", ""),
        ((TERM, 0.7, TERM, USR1), 0, "ended\n", ""),
        ((INT,), 130, "ended\n", SAVES),
        ((INT, 0.1, INT), 130, "ended\n", SAVES),  # one key press, delivered twice
        ((INT, 0.7, INT), 130, "", SAVES + AT_ONCE),
        ((INT, 0.7, TERM), 130, "", SAVES + AT_ONCE),
        ((TERM, 0.7, INT), 130, "ended\n", SAVES),
    ],
    ids=str,
)
def test_a_signal_while_training_saves_and_a_second_ends(signals: tuple, code: int, out: str, errors: str) -> None:
    assert run("saving", *signals) == (code, out, errors)


def test_without_checkpoints_it_says_so() -> None:
    assert run("saving nothing", INT) == (130, "ended\n", SAVES_NOTHING)


def test_one_process_per_node_reports_the_signal() -> None:
    assert run("saving", INT, 0.7, INT, LOCAL_RANK="1") == (130, "", "")


@pytest.mark.parametrize("number", [HUP, INT])
def test_a_signal_that_nohup_ignores_is_ignored(number: signal.Signals) -> None:
    assert run("saving", number, ignored=[number]) == (0, "went on\n", "")


def test_torchrun_and_its_ranks_hear_signals_that_nohup_ignores() -> None:
    """torchrun installs its own handlers, passes the signal on, and kills 30 seconds later."""
    assert run("saving", INT, ignored=[INT], TORCHELASTIC_RUN_ID="x") == (130, "ended\n", SAVES)


@pytest.mark.parametrize("number", [TERM, USR1, HUP])
def test_a_signal_at_the_end_changes_no_exit_code(number: signal.Signals) -> None:
    """For example when everything is saved and torchrun ends the neighbours of a rank."""
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


def test_a_fork_of_a_run_ignores_its_signals() -> None:
    """For example the process that writes a checkpoint beside training."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 False\n", "")
