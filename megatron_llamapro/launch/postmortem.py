"""Which rank of a job died first, and of what, in one line; read from what torchrun wrote on every node.

python -m megatron_llamapro.launch.postmortem LOGS      LOGS holds NODE.log of every node

Exit code 2 where the program refused its input: starting it again would change nothing. Needs no torch.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.command import HUNG, USAGE_ERROR

_MOST_BYTES = 4 * 2**20  # of a log, from its end

# torchrun's report of each failed rank (torch.distributed.elastic.multiprocessing.errors).
_FAILURE = re.compile(
    r"time +: (?P<time>\S+)\s+host +: (?P<host>\S+)\s+rank +: (?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\)\s+"
    r"exitcode +: (?P<code>-?\d+) "
)

_RANK = r"^\[[A-Za-z_]+(?P<local_rank>\d+)\]:"  # before every line of a rank

# What a rank says before it ends: our own words, or a traceback's last line, before which torch writes the rank again.
_LAST_WORDS = re.compile(
    _RANK + r"(?:\[rank\d+\]: ?)?(?P<text>(?:error|hang): .*|[A-Za-z_][\w.]*(?:Error|Exception)(?:: .*)?)$",
    re.MULTILINE,
)

# What it says where it ends because another did: gloo's words, then NCCL's, in Python or from its watchdog's thread.
_LOST_ANOTHER = (
    r".*(?:Connection (?:closed|reset) by peer|remote process exited|ncclRemoteError|NCCL communicator was aborted|"
    r"caught collective operation timeout)"
)
_LINE_OF_ONE_THAT_LOST_ANOTHER = re.compile(_RANK + _LOST_ANOTHER, re.MULTILINE)
_ENDED_BY_TORCHRUN = -signal.SIGTERM


@dataclass(frozen=True)
class Failure:
    """One rank's end, its last words, and whether it ended because it had lost another."""

    time: str
    host: str
    rank: int
    code: int
    words: str = ""
    follows: bool = False

    @property
    def how(self) -> str:
        """Its exit code in words."""
        if self.code >= 0:
            return f"exit code {self.code}"
        name = signal.Signals(-self.code).name
        hint = " (out of memory? see the node's kernel log)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"


def failures(log: str) -> Iterator[Failure]:
    """Every failure that a node's torchrun reported."""
    words = {match["local_rank"]: match["text"] for match in _LAST_WORDS.finditer(log)}
    lost_another = {match["local_rank"] for match in _LINE_OF_ONE_THAT_LOST_ANOTHER.finditer(log)}
    for found in _FAILURE.finditer(log):
        said = words.get(found["local_rank"], "").removeprefix("error: ")
        yield Failure(
            time=found["time"],
            host=found["host"].split(".")[0],
            rank=int(found["rank"]),
            code=int(found["code"]),
            words=said,
            follows=bool(re.match(_LOST_ANOTHER, said)) if said else found["local_rank"] in lost_another,
        )


def first_failure(found: Iterable[Failure]) -> Failure | None:
    """The one that the others followed: a rank that ended a hang, whose end may abort others; one that does not say
    that it lost another; one that was killed, since it says nothing; then by time, of which torchrun knows the
    second in which it looked."""
    candidates = [failure for failure in found if failure.code != _ENDED_BY_TORCHRUN]
    return min(
        candidates,
        key=lambda failure: (failure.code != HUNG, failure.follows, failure.code > 0, failure.time, failure.rank),
        default=None,
    )


def describe(logs: Iterable[str]) -> tuple[str, int]:
    """The line, and the exit code."""
    logs = list(logs)
    first = first_failure(failure for log in logs for failure in failures(log))
    if first is None:
        return "no node says that a rank died: a node was lost, or the job was stopped from outside", 0
    if first.code == USAGE_ERROR and (refusal := _refusal(logs)):
        return f"the run was refused: {refusal}", USAGE_ERROR
    said = f": {first.words}" if first.words and first.code > 0 else ""
    return f"rank {first.rank} on {first.host} died first, at {first.time.replace('_', ' ')}: {first.how}{said}", 0


def _refusal(logs: Iterable[str]) -> str | None:
    """What one rank says for all."""
    words = (match["text"] for log in logs for match in _LAST_WORDS.finditer(log))
    return next((text.removeprefix("error: ") for text in words if text.startswith("error: ")), None)


def main() -> int:
    """Read the folder that is named, print the line."""
    folder = Path(sys.argv[1])
    line, code = describe(_end_of(path) for path in sorted(folder.glob("*.log")))
    print(line)
    return code


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST_BYTES))
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    raise SystemExit(main())
