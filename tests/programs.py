"""Runs programs of this repository as real processes that start in a tenth of a second instead of five.

    done = programs.run("-m", "megatron_llamapro", "inspect", "--checkpoint", folder)
    assert done.returncode == 0, done.stderr

They are forked from a server that has torch and megatron.core loaded. Otherwise they are like programs of a shell,
with their own arguments, environment, folder, output, signals, exit code and process group. Use `run` for a program
that ends by itself, and `Program` to signal or watch one. Tests of the start itself, such as imports, use `subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_llamapro.testing.distributed import fork_server


class Program:
    """A running `python *arguments`: a file name, or -m and a module name. Its output goes to the files given."""

    def __init__(
        self,
        *arguments: object,
        output: Path,
        errors: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        place = (cwd or Path.cwd(), dict(os.environ if env is None else env), output, errors or output)
        self._process = fork_server().Process(target=_run, args=([*map(str, arguments)], *place))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number if one killed the program, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: if it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        self._process.kill()


def run(
    *arguments: object, timeout: float = 200, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Return the same as `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`.

    Raises:
        subprocess.TimeoutExpired: if it still runs after `timeout` seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        program = Program(*arguments, output=output, errors=errors, cwd=cwd, env=env)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        return subprocess.CompletedProcess([*arguments], code, output.read_text(), errors.read_text())


def _run(arguments: list[str], cwd: Path, env: dict[str, str], output: Path, errors: Path) -> None:
    """Turn the forked process into the program."""
    import torch

    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # undo "forkserver": the program chooses its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _redirect(output, errors)
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    sys.path[0:0] = [str(cwd) if is_module else str(Path(arguments[0]).resolve().parent)]
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


def _redirect(output: Path, errors: Path) -> None:
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for path in (output, errors)]
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
