"""Common to all commands: one-line errors, exit codes, `--debug`. Imports neither torch nor megatron.

Exit codes:
    0: done, or a run was told to stop and has saved.
    1: a check failed (verify, dry-run).
    2: the user's input is wrong; one `error: …` line says what to change.
    65: a run diverged (training/step.py); one line too.
    70: a run hung and was ended (runtime/watchdog.py).
    75: a run failed and a restart may succeed; one line too.
    129, 143: SIGHUP or SIGTERM ended a run before its first step.
    130: interrupted by Ctrl-C, even if a run has saved.
    141: the reader of the output has closed it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_llamapro.config.errors import ConfigError, DivergedError, LlamaProError, RunError
from megatron_llamapro.config.files import write_atomically
from megatron_llamapro.config.values import LARGEST_FLOAT, expand_user

USAGE_ERROR = 2
DIVERGED = os.EX_DATAERR  # 65
HUNG = 70
TRY_AGAIN = os.EX_TEMPFAIL  # 75
INTERRUPTED = 130
OUTPUT_CLOSED = 141
TERMINATED = 143


def _path(text: str) -> Path:
    try:
        return Path(expand_user(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[-+]?\d{1,15}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a number") from None
    if not abs(value) <= LARGEST_FLOAT:  # NaN neither
        raise argparse.ArgumentTypeError(f"{_short(text)}: it must be finite")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


# How every command reads options of these types: `~` is the home folder, and numbers must be finite.
_TYPES: dict[type, Callable] = {Path: _path, int: _whole_number, float: _number}


_RUN_OPTIONS = ("--config", "--print_config")  # and names with a dot: options of a run's configuration


class CommandParser(argparse.ArgumentParser):
    """`ArgumentParser` whose usage errors are one `error: …` line and exit code 2."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        for kind, read in _TYPES.items():
            self.register("type", kind, read)
        # `run_command` looks for it anywhere on the command line.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Reject unknown options here, so that sub-commands can suggest theirs."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest_option(unknown)}")
        return namespace, unknown

    def parse_own_args(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return this parser's options, and the other words, which another parser reads. A word that nearly matches one
        of this parser's options is an error."""
        namespace, others = super().parse_known_args(args)
        for word in others:
            name = word.partition("=")[0]
            is_a_runs = name in _RUN_OPTIONS or "." in name
            if not is_a_runs and (nearest := self._nearest_option([word], cutoff=0.8)):
                self.error(f"unrecognized arguments: {word}{nearest}")
        return namespace, others

    def _nearest_option(self, unknown: Sequence[str], *, cutoff: float = 0.6) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        options = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
        nearest = difflib.get_close_matches(options[0], known, n=1, cutoff=cutoff) if options else []
        return f": did you mean {nearest[0]}?" if nearest else ""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise `ConfigError` if one of these numeric options is given and is not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 1 / LARGEST_FLOAT:
            raise ConfigError(f"--{name} is {value:g}: it must be above 0")


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: an interrupt that is reported as `terminated`."""


def end_when_terminated() -> None:
    """Make SIGTERM unwind this program as Ctrl-C does, so that it removes unfinished files."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the removal
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def in_one_line(error: BaseException) -> str:
    """Return an error's message in one line; for an `OSError`, the file and the system's message."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        text = (
            f"the module {error.name} is not installed in this Python ({sys.executable}): activate the environment "
            "that this program is installed in, or install it (pip install -e . in its folder)"
        )
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split())


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a program that ends with this one-line error."""
    codes = {RunError: TRY_AGAIN, DivergedError: DIVERGED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), USAGE_ERROR)


def _output_is_closed() -> bool:
    """Return whether the reader of the output has closed it, e.g. `head`, which stops reading early."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def is_first_rank() -> bool:
    """Return whether this process reports for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_node() -> bool:
    """Return whether this process reports for all ranks of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _is_silent(error: BaseException) -> bool:
    """Return whether another rank reports this error."""
    if not isinstance(error, LlamaProError):
        return False
    if error.on_all_ranks:
        return not is_first_rank()
    return error.on_all_of_node and not is_first_of_node()


def end_at_once(code: int, line: str) -> NoReturn:
    """End this process and its forks, from any of its threads, with a last line from the first rank of its node."""
    import multiprocessing

    tell_torchrun(line)
    if is_first_of_node():
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a program: user errors become one line and exit code 2 (`exit_code_of` has the others).

    The arguments of a `KeyboardInterrupt` are printed with it. Errors that are not the user's (bugs) keep their
    traceback. With `--debug` on the command line, or `LLAMAPRO_DEBUG=1`, all errors do. torchrun is told of both kinds.
    """
    debug = "--debug" in sys.argv[1:] or os.environ.get("LLAMAPRO_DEBUG") == "1"
    try:
        code = main() or 0
        sys.stdout.flush()
        raise SystemExit(code)
    except (LlamaProError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(OUTPUT_CLOSED) from None
        if debug:
            traceback.print_exc()
        line = f"error: {in_one_line(error)}"
        tell_torchrun(line)
        if not _is_silent(error):
            print(line, file=sys.stderr)
        raise SystemExit(exit_code_of(error)) from None
    except KeyboardInterrupt as interrupt:
        word, code = ("terminated", TERMINATED) if isinstance(interrupt, Terminated) else ("interrupted", INTERRUPTED)
        print(": ".join((f"error: {word}", *map(str, interrupt.args))), file=sys.stderr)
        raise SystemExit(code) from None
    except Exception as bug:
        tell_torchrun(in_one_line(bug), details=traceback.format_exc())
        raise


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def tell_torchrun(message: str, *, details: str | None = None) -> None:
    """Write torchrun's error file, if it asks for one. It shows `details` (a traceback) instead of the message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": details or message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):  # the printed line says the same
        write_atomically(Path(path), json.dumps({"message": {"message": message, "extraInfo": extra}}))
