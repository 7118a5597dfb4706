"""Errors of any command: one line and the right exit code."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llamapro.commands.options import add_change_options, read_change_options
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
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "error: Broken pipe\n"),  # not from the output
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyboardInterrupt("go on"), 130, "error: interrupted: go on\n"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    error: BaseException, code: int, text: str, capfd: pytest.CaptureFixture
) -> None:
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
def test_output_that_nobody_reads_is_not_an_error(lines: int) -> None:
    """For example `| head`. The broken pipe may also surface only at the end."""
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


def test_an_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture) -> None:
    """The message has the command's own name."""
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


OPTIONS = {
    "--path=~/x": ("path", Path.home() / "x"),
    "--path=": "argument --path: '': it is empty: name a file or folder",
    "--path=~nobody-has-this-name/x": "no home folder is known for ~nobody-has-this-name",
    "--path=$HOME/x": "variables such as $HOME are not replaced",
    "--count=-3": ("count", -3),
    "--count=1e3": "argument --count: '1e3' is not a whole number",
    "--count=٣": "is not a whole number",
    f"--count={'9' * 5000}": "…' is not a whole number",
    "--rate=2e-4": ("rate", 2e-4),
    "--rate=nan": "argument --rate: 'nan': it must be finite",
    "--rate=-inf": "it must be finite",
    "--rate=1e300": "it must be finite",
    "--rate=fast": "argument --rate: 'fast' is not a number",
}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[:20])
def test_options_are_parsed_by_type(option: str, capsys: pytest.CaptureFixture) -> None:
    """Commands and sub-commands behave the same."""
    for words in ([], ["make"]):
        parser = taking = CommandParser(prog="tool")
        if words:
            taking = parser.add_subparsers().add_parser("make")
        for name, kind in (("--path", Path), ("--count", int), ("--rate", float)):
            taking.add_argument(name, type=kind)
        expected = OPTIONS[option]
        if isinstance(expected, tuple):
            assert getattr(parser.parse_args([*words, option]), expected[0]) == expected[1]
            continue
        with pytest.raises(SystemExit):
            parser.parse_args([*words, option])
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def test_either_name_of_a_dtype_is_accepted(capsys: pytest.CaptureFixture) -> None:
    parser = CommandParser(prog="tool")
    add_change_options(parser)
    for word, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")):
        assert parser.parse_args(["--dtype", word]).dtype == dtype
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read_change_options(parser, parser.parse_args(["--init=random", "--init_seed=-1", "--num_added_blocks=1"]))
    assert "--init_seed is -1: it cannot be negative" in capsys.readouterr().err


def test_a_misspelt_option_of_the_command_suggests_its_own(capsys: pytest.CaptureFixture) -> None:
    """Other options go to a second parser, which does not know the command's own."""
    parser = CommandParser(prog="tool")
    parser.add_argument("--efficiency", type=float)
    parser.add_argument("--hf_config")
    rest = ["--config", "run.yaml", "--optimizer.lr", "1", "--data={a: b}"]
    with pytest.raises(SystemExit):
        parser.parse_own_args([*rest, "--efficency", "0.5"])
    assert "--efficency: did you mean --efficiency?" in capsys.readouterr().err
    assert parser.parse_own_args(rest)[1] == rest


def test_line_breaks_in_a_message_are_replaced() -> None:
    assert in_one_line(ValueError("x\ny")) == "x y"


HEAVY = ("torch", "megatron.core", "numpy", "transformers")
LIGHT = ("config.io", "config.checks", "config.command", "expansion.plan", "planning.flops", "config.pipeline_stages")


def test_light_modules_import_nothing_heavy() -> None:
    """`--help`, planning and configuration start at once: torch alone takes two seconds."""
    imports = "; ".join(f"import megatron_llamapro.{module}" for module in LIGHT)
    program = f"import sys; {imports}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
