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
        for key in a:
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
    at_step = random.randrange(2, 20)
    assert hit(tmp_path, text_files, number, at_step) == code, f"stopped at step {at_step}"
    if number != signal.SIGKILL:  # these end the step and save it
        metrics, state = end_of(tmp_path)
        assert state["step"] == len(metrics.splitlines()) >= at_step
    assert start(tmp_path, [*text_files, "--resume"]).wait(timeout=120) == 0
    metrics, state = end_of(tmp_path)
    assert metrics == unbroken[0], f"stopped at step {at_step}"
    assert_equal(state, unbroken[1])
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == list(range(24))
