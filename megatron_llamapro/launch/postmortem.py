"""Which rank of a job died first, and of what, in one line; read from what torchrun wrote on every node.

python -m megatron_llamapro.launch.postmortem LOGS      LOGS holds NODE.log of every node

Exit code 2 where the program refused its input, and 65 where the run diverged: starting it again would change nothing.
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

_MOST_BYTES = 4 * 2**20  # of a log, from its end

# torchrun's report of each failed rank (torch.distributed.elastic.multiprocessing.errors).
_FAILURE = re.compile(
    r"time +: (?P<time>\S+)\s+host +: \S+\s+rank +: (?P<rank>\d+) \(local_rank: (?P<local_rank>\d+)\)\s+"
    r"exitcode +: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)"
)

# A rank that still ran when another of its node had failed: torchrun ends it, and then reports it as the others. It
# ends by the signal, or as one that was told to stop; with another code, it was ending by itself already.
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (?P<pid>\d+) closing signal")
_AS_TOLD = (0, -signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)

# Ends that all ranks agree on, and of which one speaks for all.
_AGREED = {USAGE_ERROR: "the run was refused", DIVERGED: "the run diverged"}

_RANK = r"^\[[A-Za-z_]+(?P<local_rank>\d+)\]:"  # before every line of a rank

# What a rank says before it ends: our own words, or a traceback's last line, before which torch writes the rank again.
_LAST_WORDS = re.compile(
    _RANK + r"(?:\[rank\d+\]: ?)?"
    r"(?P<text>(?:error|hang): .*|[A-Za-z_][\w.]*(?:Error|Exception)(?:: (?!sys\.meta_path is None).*)?)$",
    re.MULTILINE,
)

# What it says where it ends because another did: gloo, the store, and NCCL, in Python or from its watchdog's thread.
_LOST_ANOTHER = re.compile(
    _RANK + r".*(?:Connection (?:closed|reset) by peer|Connection was likely closed|Broken pipe|Socket closed|"
    r"Remote peer closed|Timed out waiting \d+ ?ms|remote process exited|ncclRemoteError|NCCL communicator was aborted|"
    r"caught collective operation timeout)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Failure:
    """One rank's end, its last words, and whether it ended because it had lost another."""

    time: str
    node: str
    rank: int
    code: int
    words: str
    follows: bool
    ended: bool
    """Whether torchrun sent it the signal to end while it was ending by itself."""

    @property
    def how(self) -> str:
        """Its exit code in words."""
        if self.code >= 0:
            return f"exit code {self.code}"
        known = {each.value: each.name for each in signal.Signals}
        name = known.get(-self.code, f"signal {-self.code}")
        hint = " (out of memory? see the node's kernel log)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"


def failures(node: str, log: str) -> Iterator[Failure]:
    """Every failure that a node's torchrun reported, but for those of its own making."""
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
    """By what others follow: first a rank that ended a hang, whose end may abort others; one that does not say that it
    lost another; one that had ended when torchrun looked; one that was killed from outside; one that a signal ended,
    after which it says nothing; one that says something, since one rank may speak for all; then by time, of which
    torchrun knows the second."""
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
    """The line, and the exit code, of the logs of nodes by their names."""
    found = sorted((failure for node, log in logs.items() for failure in failures(node, log)), key=order)
    if not found:
        return "no node says that a rank died: a node was lost, or the job was stopped from outside", 0
    first = found[0]
    codes = {first.code, *(failure.code for failure in found if not failure.ended)}
    if codes == {first.code} and first.code in _AGREED and (said := _said_for_all(found)):
        return f"{_AGREED[first.code]}: {said}", first.code
    said = f": {first.words.removeprefix('error: ')}" if first.words and first.code > 0 else ""
    return f"rank {first.rank} on {first.node} died first, at {first.time.replace('_', ' ')}: {first.how}{said}", 0


def _said_for_all(found: Iterable[Failure]) -> str | None:
    """What one rank says for all."""
    said = (failure.words.removeprefix("error: ") for failure in found if failure.words.startswith("error: "))
    return next(said, None)


def main() -> int:
    """Read the folder that is named, print the line."""
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
