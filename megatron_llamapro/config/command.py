"""What every command has in common: one-line errors, exit codes, `--debug`. Imports neither torch nor megatron.

Exit codes: 0 done, 1 a check said no (verify), 2 the user's input (one `error: …` line), 70 a run hung and was
ended (runtime/watchdog.py), 75 a run failed on its way (one line too), 130 interrupted, 141 nobody reads the output any
more, 143 terminated (these three as a shell has them).
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from megatron_llamapro.config.errors import ConfigError, LlamaProError, RunError

USAGE_ERROR = 2
HUNG = 70
TRY_AGAIN = os.EX_TEMPFAIL  # 75
INTERRUPTED = 130
OUTPUT_CLOSED = 141
TERMINATED = 143

_MOST = 1e30  # of an option: sums and quotients of them stay finite


class CommandParser(argparse.ArgumentParser):
    """`ArgumentParser` whose usage errors are one `error: …` line and exit code 2."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        # On a command and on its sub-commands; these must not reset what was given before them.
        default = argparse.SUPPRESS if " " in kwargs.get("prog", "") else False
        self.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """What is not known is an error here already, so that a sub-command says which options it has."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest_option(unknown)}")
        return namespace, unknown

    def parse_own_args(self) -> tuple[argparse.Namespace, list[str]]:
        """The command line's options that are this parser's, and the others, which another one reads."""
        return super().parse_known_args()

    def _nearest_option(self, unknown: Sequence[str]) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        options = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
        nearest = difflib.get_close_matches(options[0], known, n=1) if options else []
        return f": did you mean {nearest[0]}?" if nearest else ""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise `ConfigError` where one of these options, all numbers, is given and not above 0, or not finite."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 1 / _MOST:
            raise ConfigError(f"--{name} is {value:g}: it must be above 0")
        if value is not None and value > _MOST:
            raise ConfigError(f"--{name} is {value:g}: it must be finite")


class Terminated(KeyboardInterrupt):
    """SIGTERM came: an interrupt that is called by its name."""


def end_when_terminated() -> None:
    """Have SIGTERM unwind this program as Ctrl-C does, so that it removes what it began to write."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the removing short
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def in_one_line(error: BaseException) -> str:
    """What an error says; an `OSError` says which file and what the system answered."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split())


def exit_code_of(error: BaseException) -> int:
    """Of a program that ends with an error that it says in one line."""
    return TRY_AGAIN if isinstance(error, RunError) else USAGE_ERROR


def _nobody_reads_the_output() -> bool:
    """As when it goes to `head`, which has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a program: user errors become one line and exit code 2, a `RunError` one line and 75.

    What a `KeyboardInterrupt` carries is printed with it. Errors that are not the user's (bugs) keep their traceback.
    `--debug` on the command line, or `LLAMAPRO_DEBUG=1`, keeps all of them.
    """
    debug = "--debug" in sys.argv[1:] or os.environ.get("LLAMAPRO_DEBUG") == "1"
    try:
        code = main() or 0
        sys.stdout.flush()
        raise SystemExit(code)
    except (LlamaProError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_the_output():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(OUTPUT_CLOSED) from None
        if debug:
            traceback.print_exc()
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        raise SystemExit(exit_code_of(error)) from None
    except KeyboardInterrupt as interrupt:
        word, code = ("terminated", TERMINATED) if isinstance(interrupt, Terminated) else ("interrupted", INTERRUPTED)
        print(": ".join((f"error: {word}", *map(str, interrupt.args))), file=sys.stderr)
        raise SystemExit(code) from None
