"""A real SLURM cluster on one machine: every node has its own host name, address and processes.

A node is a network namespace on a bridge, plus a process namespace. Ending the latter ends everything in it, so killing
it is the loss of a node. Needs root, Debian's `slurm-wlm` and `munge`, and iproute2. All nodes share the file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_NETWORK, _BRIDGE = "10.77.0", "llamapro0"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
_LOCK = Path("/run/llamapro-test-cluster.lock")
_CGROUPS = Path("/sys/fs/cgroup/freezer")
_CONTROLLER = 254  # the last number of its address
_DAEMONS = ("slurmctld", "slurmd")  # the daemon of a step ends with its node
_OURS = "LLAMAPRO_TEST_CLUSTER"  # a variable of daemons started here

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
JobRequeue=1
MailProg=/bin/true
NodeName=n[1-{nodes}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why no cluster can be started here, or None."""
    missing = [name for name in _PROGRAMS if _program(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge, iproute2)"
    if os.geteuid() != 0:
        return "starting nodes in namespaces needs root"
    if _daemons(ours=False):
        return "this machine is part of a SLURM cluster already"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def _daemons(*, ours: bool) -> list[int]:
    """Return SLURM's daemons on this machine that a `Cluster` started, or those that it did not."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (path / "comm").read_text().strip() in _DAEMONS:
                is_ours = f"{_OURS}=1".encode() in (path / "environ").read_bytes().split(b"\0")
                if is_ours is ours:
                    found.append(int(path.name))
    return found


def _proctrack() -> str:
    """Return how SLURM tracks a step's processes: by cgroups, as clusters do, if available. Its signals then reach only
    the step's first process, otherwise all."""
    try:
        (_CGROUPS / "slurm").mkdir(exist_ok=True)
    except OSError:
        return "linuxproc"
    return "cgroup"


def _remove_cgroups() -> None:
    for path in sorted(_CGROUPS.glob("slurm*/**/"), reverse=True):
        with contextlib.suppress(OSError):  # a process in it is about to end
            path.rmdir()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """A cluster that runs inside its `with` block, with its state and logs in `state`."""

    def __init__(self, state: Path, *, num_nodes: int) -> None:
        self.state, self.num_nodes = Path(state).absolute(), num_nodes
        self.environment = {
            **os.environ,
            _OURS: "1",
            "SLURM_CONF": str(self.state / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }
        self._nodes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        self._lock = _LOCK.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # addresses and names are this machine's: one cluster at a time
        self._clear()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for node in list(self._nodes):
            self.kill_node(node)
        self._clear()
        self._lock.close()

    def _clear(self) -> None:
        """Remove everything left of a cluster, even after its process was killed."""
        for daemon in _daemons(ours=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGKILL)
        _remove_cgroups()
        for number in range(1, 10):
            self._remove_network(f"n{number}")
        subprocess.run(["ip", "link", "del", _BRIDGE], env=self.environment, capture_output=True)
        lines = Path("/etc/hosts").read_text().splitlines(keepends=True)
        Path("/etc/hosts").write_text("".join(line for line in lines if not line.startswith(f"{_NETWORK}.")))
        time.sleep(1.5)  # until the controller's port is free

    def _remove_network(self, node: str) -> None:
        for command in (["ip", "link", "del", f"llamapro-{node}"], ["ip", "netns", "del", f"llamapro-{node}"]):
            subprocess.run(command, env=self.environment, capture_output=True)

    def _start(self) -> None:
        for name in ("controller", "spool"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)
        settings = {
            "host": socket.gethostname().split(".")[0],
            "network": _NETWORK,
            "state": self.state,
            "proctrack": _proctrack(),
        }
        (self.state / "slurm.conf").write_text(_CONFIGURATION.format(nodes=self.num_nodes, **settings))
        (self.state / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n")
        names = "".join(f"{_NETWORK}.{number} n{number}\n" for number in range(1, self.num_nodes + 1))
        (self.state / "hosts").write_text(f"127.0.0.1 localhost\n{_NETWORK}.{_CONTROLLER} controller\n{names}")
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(names)
        self._start_munge()
        self.run("ip", "link", "add", _BRIDGE, "type", "bridge")
        self.run("ip", "addr", "add", f"{_NETWORK}.{_CONTROLLER}/24", "dev", _BRIDGE)
        self.run("ip", "link", "set", _BRIDGE, "up")
        self.run("slurmctld", "-c")
        for number in range(1, self.num_nodes + 1):
            self.boot_node(f"n{number}")
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Wait until all nodes are up and idle."""
        self.wait(lambda: self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * self.num_nodes, seconds=60)

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.chown(folder, "munge", "munge")
        Path("/run/munge").chmod(0o755)
        self.run("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--pid-file=/run/munge/munged.pid")

    def boot_node(self, node: str) -> None:
        """Start a node: n1, n2, …"""
        number = node.removeprefix("n")
        (self.state / "spool" / node).mkdir(exist_ok=True)
        space = f"llamapro-{node}"
        self.run("ip", "netns", "add", space)
        self.run("ip", "link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        self.run("ip", "link", "set", space, "master", _BRIDGE, "up")
        for command in ("link set lo up", "link set eth0 up", f"addr add {_NETWORK}.{number}/24 dev eth0"):
            self.run("ip", "-n", space, *command.split())
        inside = f"hostname {node}; mount --bind {self.state}/hosts /etc/hosts; slurmd -D -N {node}"
        spaces = ["unshare", "--fork", "--pid", "--kill-child", "--uts", "--mount", "--mount-proc"]
        with (self.state / f"boot-{node}.log").open("a") as log:
            self._nodes[node] = subprocess.Popen(
                [*spaces, "nsenter", f"--net=/run/netns/{space}", "bash", "-c", inside],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_node(self, node: str) -> None:
        """Lose a node at once, with everything that runs on it."""
        process = self._nodes.pop(node)
        process.kill()
        process.wait()
        self._remove_network(node)

    def run(self, *command: str) -> str:
        """Run a command on the controller's node and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Return the scheduler's record of a job: JobState, Restarts, NodeList, …"""
        text = self.run("scontrol", "show", "job", str(number), "--oneliner")
        return dict(field.partition("=")[::2] for field in text.split() if "=" in field)

    def start_now(self, number: int) -> None:
        """Start a pending job now."""
        with contextlib.suppress(RuntimeError):
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, until: Callable[[], bool], *, seconds: float, every: float = 0.25) -> None:
        """Wait until `until` is true, for at most `seconds`."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(f"it did not happen within {seconds:g} s")
            time.sleep(every)
