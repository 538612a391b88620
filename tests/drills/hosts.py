"""Hosts on one machine, for drills of a cluster: namespaces of network, mounts, names and processes on a bridge.

Each has its own address, hostname, shared memory and `/tmp/ray`, so that what goes from one to another crosses a link,
which can be cut, slowed and healed. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Hosts", "unavailable"]

SHARED = 400_000_000  # bytes of a host's object store
PATIENCE = 60.0  # seconds that `ray start` may take

# Ray notices a silent host after 65 s; so, after 5 to 15 s, even on a busy machine.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}


def unavailable() -> str:
    """Why there can be no hosts here; nothing if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces of networks need Linux and root"
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    probe = f"rkprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return made.stderr.strip()


class Hosts:
    """So many hosts, numbered from 0.

    Args:
        folder: for logs, the token, and what a head keeps of its cluster.
        cpus: that each says it has.
    """

    def __init__(self, folder: Path, count: int = 3, cpus: int = 2) -> None:
        self.folder, self.count, self.cpus = folder, count, cpus
        self.prefix = f"rk{os.getpid() % 10_000}"
        self.net = f"10.{77 + os.getpid() % 100}.0"
        self._holders: list[subprocess.Popen[bytes]] = []
        self._inits: list[int] = []  # the first process of each host
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = {**os.environ, **QUICK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.env |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

    def __enter__(self) -> Hosts:
        bridge = f"{self.prefix}br"
        _do("ip", "link", "add", bridge, "type", "bridge")
        _do("ip", "link", "set", bridge, "up")
        try:
            for host in range(self.count):
                self._make(host, bridge)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self, host: int, bridge: str) -> None:
        name, link = self._name(host), self._link(host)
        _do("ip", "netns", "add", name)
        _do("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _do("ip", "link", "set", link, "master", bridge, "up")
        _do("ip", "-n", name, "link", "set", "lo", "up")
        _do("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _do("ip", "-n", name, "link", "set", "eth0", "up")
        setup = (
            f"hostname {name}; mount -t tmpfs -o size=2g tmpfs /dev/shm; "
            "mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray; exec sleep infinity"
        )
        unshare = ["unshare", "-m", "-u", "-p", "--fork", "--mount-proc", "--propagation", "private", "sh", "-c", setup]
        holder = subprocess.Popen(["ip", "netns", "exec", name, *unshare])
        self._holders.append(holder)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.01)
        self._inits.append(int(found[0]))
        while Path(f"/proc/{found[0]}/comm").read_text().strip() != "sleep":  # until its mounts are there
            time.sleep(0.01)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for init in self._inits:
            _kill(init)  # and with it all processes of its namespace
        for holder in self._holders:
            holder.kill()
            holder.wait()
        for host in range(self.count):
            subprocess.run(["ip", "link", "del", self._link(host)], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._name(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.prefix}br"], capture_output=True)

    def _name(self, host: int) -> str:
        return f"{self.prefix}h{host}"

    def _link(self, host: int) -> str:
        return f"{self.prefix}v{host}"

    def address(self, host: int) -> str:
        return f"{self.net}.{10 + host}"

    @property
    def head(self) -> str:
        """Where the cluster is to be found."""
        return f"{self.address(0)}:6379"

    def within(self, host: int, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return ["nsenter", "-t", str(self._inits[host]), "-n", "-m", "-u", "-p", "--", *command]

    def start(self, host: int) -> float:
        """Begin Ray on a host, host 0 as the head; gives how many seconds that took."""
        ray = str(Path(sys.executable).with_name("ray"))
        where = ["--head", "--port=6379", "--include-dashboard=false"] if host == 0 else [f"--address={self.head}"]
        own = [f"--node-ip-address={self.address(host)}", f"--num-cpus={self.cpus}", "--disable-usage-stats"]
        own += [f"--object-store-memory={SHARED}", f'--resources={{"host{host}": 8}}']
        began = time.monotonic()
        with (self.folder / f"ray{host}.log").open("ab") as log:
            command = self.within(host, ray, "start", *where, *own)
            subprocess.run(command, env=self.env, stdout=log, stderr=log, check=True, timeout=PATIENCE)
        return time.monotonic() - began

    def cut(self, host: int) -> None:
        """No packet goes to the host, nor from it."""
        _do("ip", "link", "set", self._link(host), "down")

    def heal(self, host: int) -> None:
        _do("ip", "link", "set", self._link(host), "up")

    def slow(self, host: int, rate: str) -> None:
        """Let no more than so much through to the host, and from it: "100mbit"."""
        shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms"]
        _do("tc", "qdisc", "replace", "dev", self._link(host), *shape)
        _do("ip", "netns", "exec", self._name(host), "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def drain(self, host: int) -> None:
        """Tell Ray that the host is about to leave."""
        ray = str(Path(sys.executable).with_name("ray"))
        find = (
            f"import ray; ray.init({self.head!r}, log_to_driver=False); print(*[node['NodeID'] for node in ray.nodes() "
        )
        find += f"if node['Alive'] and node['NodeManagerAddress'] == {self.address(host)!r}])"
        found = subprocess.run(
            self.within(0, sys.executable, "-c", find), env=self.env, check=True, capture_output=True, text=True
        )
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a drill"]
        drain = [ray, "drain-node", "--address", self.head, "--node-id", found.stdout.strip(), *why]
        subprocess.run(self.within(0, *drain), env=self.env, check=True, capture_output=True, timeout=PATIENCE)

    def pids(self, host: int) -> list[int]:
        """All processes of a host, but for the one that holds it."""
        found = subprocess.run(["ip", "netns", "pids", self._name(host)], capture_output=True, text=True).stdout
        keep = {self._inits[host], self._holders[host].pid}
        return [int(pid) for pid in found.split() if int(pid) not in keep]

    def kill(self, host: int) -> None:
        """End all processes of a host, as a loss of power does."""
        for pid in self.pids(host):
            _kill(pid)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
