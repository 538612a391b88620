"""A short run begins at once: it imports nothing that takes long and that it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# What each costs on one core, beyond torch: 1.0 s (torch._dynamo, which tensordict and torch.optim take along), 0.1,
# 0.9 (EnvPool registers every family, and draws one with matplotlib) ...
SLOW = ("torch._dynamo", "tensordict", "envpool", "matplotlib", "tyro", "rich", "imageio", "sympy", "wandb", "mlflow")

RUN = """
import sys
import rookery
run = rookery.train("ppo", "CartPole-v1", steps=1, envs=64, unroll=2, quiet=True, run_dir=sys.argv[1])
assert run.summary["backend"] == "tensor"
print(*sys.modules)
"""


def test_training_on_plain_observations_imports_nothing_slow(tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "rookery.learner" in imported
    assert sorted(imported & set(SLOW)) == []
