"""A killed run that is resumed ends bit-identical, on CPU, to one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT


def start(folder, arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(ROOT / "rlt.py"),
        *arguments,
        "--stages",
        "rl",
        "--updates",
        "24",
        "--save_every",
        "5",
    ]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def end_of(folder):
    stage = folder / "out" / "rlt-text-s0" / "rl"
    state = torch.load(stage / "checkpoint.pt", weights_only=True)
    return (stage / "metrics.jsonl").read_text(), state


def hit(folder, arguments, number, at_step):
    """Start the script and send it a signal when its metrics have reached a step; returns the exit code."""
    process, file = start(folder, arguments), folder / "out" / "rlt-text-s0" / "rl" / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < at_step):
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert file.read_text().count("\n") < 24, "the signal came after the end"
    return code


@pytest.fixture
def unbroken(tmp_path, text_files):
    assert start(tmp_path, text_files).wait(timeout=120) == 0
    expected = end_of(tmp_path)
    (tmp_path / "out").rename(tmp_path / "unbroken")
    return expected


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:  # the clock's, not the run's
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_run_that_was_stopped_and_resumed_is_bit_identical(number, code, tmp_path, text_files, unbroken):
    at_step = random.Random(number).randrange(2, 20)
    assert hit(tmp_path, text_files, number, at_step) == code, f"stopped at step {at_step}"
    if number != signal.SIGKILL:  # these end the step and save it
        metrics, state = end_of(tmp_path)
        assert state["step"] == len(metrics.splitlines()) >= at_step
    assert start(tmp_path, [*text_files, "--resume"]).wait(timeout=120) == 0
    metrics, state = end_of(tmp_path)
    assert metrics == unbroken[0], f"stopped at step {at_step}"
    assert_equal(state, unbroken[1])
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == list(range(24))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_worker_processes_end_their_step_and_save(number, code, tmp_path):
    """A grid in two processes: the signal goes where a terminal or a scheduler sends it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    grid = tmp_path / "grid.py"
    grid.write_text(GRID)
    command = [sys.executable, str(grid), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    files = [tmp_path / "out" / "grid-demo-s0" / name / "metrics.jsonl" for name in "ab"]
    while process.poll() is None and not all(f.exists() and f.read_text().count("\n") > 2 for f in files):
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors[-800:]
    for file in files:
        state = torch.load(file.with_name("checkpoint.pt"), weights_only=True)
        assert state["step"] == file.read_text().count("\n"), "the step was ended and saved"


GRID = """
import sys, time
from dataclasses import dataclass
import common

@dataclass
class Config(common.Config):
    pass

def work(name, run):
    for step in run.steps(10_000):
        time.sleep(0.05)
        run.log(step, x=1.0)
    return {}

if __name__ == "__main__":
    with common.Run(Config(out=sys.argv[1], workers=2, log_every=1)) as run:
        run.jobs(["a", "b"], work)
"""
