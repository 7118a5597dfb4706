"""Finds which rank of a job died first, and why, and says so in one line. Reads torchrun's log of every node.

python -m megatron_llamapro.launch.postmortem LOGS      LOGS holds NODE.log of every node

The exit code is 2 if the program refused its input and 65 if the run diverged. In both cases a restart would not help.
Needs no torch.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llamapro.config.command import DIVERGED, HUNG, USAGE_ERROR

_MOST_BYTES = 4 * 2**20  # read at the end of each log

# torchrun's report of each failed rank (torch.distributed.elastic.multiprocessing.errors).
_FAILURE = re.compile(
    r"time +: (?P<time>\S+)\s+host +: \S+\s+rank +: (?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\)\s+"
    r"exitcode +: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)"
)

# A rank that still runs when another rank of its node has failed. torchrun ends it and then reports it like a failure.
# Such a rank ends by the signal, or as if told to stop. With another exit code it was already ending by itself.
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (?P<pid>\d+) closing signal")
_AS_TOLD = (0, -signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)

# Failures that all ranks agree on. One rank reports them for all.
_AGREED = {USAGE_ERROR: "the run was refused", DIVERGED: "the run diverged"}

_RANK = r"^\[[A-Za-z_]+(?P<local_rank>\d+)\]:"  # starts every line of a rank

# A rank's last words: our own message, or the last line of a traceback, which torch prefixes with the rank once more.
_LAST_WORDS = re.compile(
    _RANK + r"(?:\[rank\d+\]: ?)?"
    r"(?P<text>(?:error|hang): .*|[A-Za-z_][\w.]*(?:Error|Exception)(?:: (?!sys\.meta_path is None).*)?)$",
    re.MULTILINE,
)

# Messages of a rank that ends because another one did: from gloo, the store, or NCCL (Python or its watchdog thread).
_LOST_ANOTHER = re.compile(
    _RANK + r".*(?:Connection (?:closed|reset) by peer|Connection was likely closed|Broken pipe|Socket closed|"
    r"Remote peer closed|Timed out waiting \d+ ?ms|remote process exited|ncclRemoteError|NCCL communicator was aborted|"
    r"caught collective operation timeout)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Failure:
    """How one rank ended. `words` are its last words; `follows` says whether it ended because it lost another rank."""

    time: str
    node: str
    rank: int
    code: int
    words: str
    follows: bool
    ended: bool
    """Whether torchrun sent it the signal to end while it was already ending by itself."""

    @property
    def how(self) -> str:
        """The exit code in words."""
        if self.code >= 0:
            return f"exit code {self.code}"
        known = {each.value: each.name for each in signal.Signals}
        name = known.get(-self.code, f"signal {-self.code}")
        hint = " (out of memory? see the node's kernel log)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"


def failures(node: str, log: str) -> Iterator[Failure]:
    """Yield every failure that a node's torchrun reported, except ranks that torchrun itself ended."""
    ended = {match["pid"] for match in _ENDED_BY_TORCHRUN.finditer(log)}
    words = {match["local_rank"]: match for match in _LAST_WORDS.finditer(log)}
    lost = {match["local_rank"]: match.start() for match in _LOST_ANOTHER.finditer(log)}
    for found in _FAILURE.finditer(log):
        said, code = words.get(found["local_rank"]), int(found["code"])
        if found["pid"] in ended and code in _AS_TOLD:
            continue
        yield Failure(
            time=found["time"],
            node=node,
            rank=int(found["rank"]),
            code=code,
            words=said["text"] if said else "",
            follows=code != -signal.SIGKILL and lost.get(found["local_rank"], -1) >= (said.start() if said else 0),
            ended=found["pid"] in ended,
        )


def order(failure: Failure) -> tuple:
    """Return a sort key that puts causes before consequences:

    1. a rank that ended a hang, since its end may abort others;
    2. a rank that does not say that it lost another;
    3. a rank that had ended when torchrun looked;
    4. a rank that was killed from outside (SIGKILL);
    5. a rank that another signal ended, since it leaves no words;
    6. a rank that left words, since one rank may speak for all;
    7. the earlier rank: torchrun knows the time to the second.
    """
    return (
        failure.code != HUNG,
        failure.follows,
        failure.ended,
        failure.code != -signal.SIGKILL,
        failure.code > 0,
        not failure.words,
        failure.time,
        failure.rank,
    )


def describe(logs: Mapping[str, str]) -> tuple[str, int]:
    """Return the line and the exit code for the nodes' logs, by node name."""
    found = sorted((failure for node, log in logs.items() for failure in failures(node, log)), key=order)
    if not found:
        return "no node reported a dead rank: a node was lost, or the job was stopped from outside", 0
    first = found[0]
    codes = {first.code, *(failure.code for failure in found if not failure.ended)}
    if codes == {first.code} and first.code in _AGREED and (said := _said_for_all(found)):
        return f"{_AGREED[first.code]}: {said}", first.code
    said = f": {first.words.removeprefix('error: ')}" if first.words and first.code > 0 else ""
    return f"rank {first.rank} on {first.node} died first, at {first.time.replace('_', ' ')}: {first.how}{said}", 0


def _said_for_all(found: Iterable[Failure]) -> str | None:
    """Return the error that one rank reports for all."""
    said = (failure.words.removeprefix("error: ") for failure in found if failure.words.startswith("error: "))
    return next(said, None)


def main() -> int:
    """Read the folder named on the command line and print the line."""
    folder = Path(sys.argv[1])
    line, code = describe({path.stem: _end_of(path) for path in sorted(folder.glob("*.log"))})
    print(line)
    return code


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST_BYTES))
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    raise SystemExit(main())
