"""Every example runs, by itself, on a CPU and without a network."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@each
def test_example_runs(example, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("an example needs no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.random.fork_rng():
        runpy.run_path(str(example), run_name="__main__")


@pytest.mark.slow
@each
def test_example_runs_in_a_process_of_its_own(example, tmp_path):
    """With what it imports itself, and nothing more."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(Path(saccade.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
