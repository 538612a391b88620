"""What the processes of the local runtime begin with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
from pathlib import Path
from rookery.runtimes.forks import SERVER
from rookery.runtimes.local import Local
from rookery.runtimes.words import Graph

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
runtime = Local(lambda *row: None)
runtime._prepare(Graph(0))
runtime._quiet.set()
limits = Path(f"/proc/{SERVER._forkserver_pid}/limits").read_text().splitlines()
print(next(line for line in limits if line.startswith("Max open files")).split()[3], hard)
"""


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="there are no limits to be read in /proc")
def test_roles_may_open_as_many_files_as_there_can_be() -> None:
    """Each tensor of a box keeps one open, and roles have what the server that they are forks of began with."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    soft, hard = done.stdout.split()
    assert soft == hard
