"""Errors of any command: one line, the right exit code."""

import errno
import subprocess
import sys

import pytest

from megatron_llamapro.config.command import CommandParser, in_one_line, run_command
from megatron_llamapro.config.errors import CheckpointError, DivergedError, RunError


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CheckpointError("a\n b"), 2, "error: a b\n"),
        (DivergedError("the loss is nan"), 65, "error: the loss is nan\n"),
        (RunError("the disk is full"), 75, "error: the disk is full\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            2,
            "error: /x/y: No space left on device\n",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "error: Broken pipe\n"),  # not the output's
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyboardInterrupt("go on"), 130, "error: interrupted: go on\n"),
    ],
)
def test_one_line_and_exit_code(error: BaseException, code: int, text: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(raising(error))
    assert end.value.code == code
    assert capfd.readouterr().err == text


def test_results_become_exit_codes() -> None:
    for result, code in ((None, 0), (0, 0), (1, 1)):
        with pytest.raises(SystemExit) as end:
            run_command(lambda result=result: result)
        assert end.value.code == code


@pytest.mark.parametrize("lines", [1, 100_000])
def test_nobody_reads_the_output(lines: int) -> None:
    """As with `| head`: no error, also where it is found out at the end."""
    program = (
        "from megatron_llamapro.config.command import run_command\n"
        f"run_command(lambda: [print('x') for _ in range({lines})] and None)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_usage_error_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        CommandParser(prog="tool").parse_args(["--nothing"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_an_option_that_a_command_does_not_have(capsys: pytest.CaptureFixture) -> None:
    """The command says its own name, and its nearest option."""
    parser = CommandParser(prog="tool")
    command = parser.add_subparsers(required=True).add_parser("make")
    command.add_argument("--num_added_blocks")
    for argument, text in (
        ("--num_added_block=2", "--num_added_block=2: did you mean --num_added_blocks? (see tool make --help)"),
        ("--frobnicate", "--frobnicate (see tool make --help)"),
        ("extra", "extra (see tool make --help)"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["make", argument])
        assert end.value.code == 2
        assert capsys.readouterr().err == f"error: unrecognized arguments: {text}\n"


def test_in_one_line() -> None:
    assert in_one_line(ValueError("x\ny")) == "x y"


HEAVY = ("torch", "megatron.core", "numpy", "transformers")
LIGHT = ("config.io", "config.checks", "config.command", "expansion.plan", "pipeline.cost", "pipeline.layout")


def test_light_modules_import_nothing_heavy() -> None:
    """`--help`, planning and configuration start at once: torch alone would cost two seconds."""
    imports = "; ".join(f"import megatron_llamapro.{module}" for module in LIGHT)
    program = f"import sys; {imports}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
