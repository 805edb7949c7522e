"""Programs of two processes: the trees they make, and what a killed process leaves on disk.

The program is tests/support/sharded_job.py.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lowrank_jax as lowrank

JOB = Path(__file__).parents[1] / "support" / "sharded_job.py"


def start(processes, job, folder, *rest):
    """Start the job, each process with its output in a file; return the processes and the files."""
    env = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    env |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, files = [], []
    for own in range(processes):
        command = [sys.executable, JOB, port, processes, own, job, folder, *rest]
        files.append(folder.with_name(f"{folder.name}-{job}-{own}.txt"))
        with files[-1].open("w") as out:
            started.append(
                subprocess.Popen(
                    [*map(str, command)], env=env, stdout=out, stderr=subprocess.STDOUT
                )
            )
    return started, files


def read(file):
    """What one process has told until now."""
    lines = [line for line in file.read_text().splitlines() if line.startswith('["')]
    return dict(json.loads(line) for line in lines if line.endswith("]"))


def run(processes, job, folder, *rest):
    """What each process of the whole job tells."""
    started, files = start(processes, job, folder, *rest)
    try:
        codes = [process.wait(900) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * processes, [file.read_text()[-2000:] for file in files]
    return [read(file) for file in files]


def losses(told):
    return {int(name.split()[1]): value for name, value in told.items() if name.startswith("loss")}


def train_and_kill(folder, steps, rng):
    """Train on two processes; kill one at a random instant, then the other; return the losses."""
    started, files = start(2, "train", folder, steps)
    try:
        while not losses(read(files[0])) and started[0].poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        victim = rng.randrange(2)
        os.kill(started[victim].pid, signal.SIGKILL)
        time.sleep(rng.uniform(0, 1))  # the other one may be writing
    finally:
        for process in started:
            process.kill()
            process.wait()
    return losses(read(files[0]))


def test_trees_are_made_shard_by_shard_on_two_processes(tmp_path):
    run(1, "write", tmp_path)
    first, second = run(2, "laws", tmp_path)
    assert "model.safetensors" in first.pop("error")
    assert "process 0 could not write" in second.pop("error")
    for told in (first, second):
        assert told.pop("quantization_error") < 1e-6
        assert told.pop("fingerprint") is True
        assert len(told) == 10
        assert {name: problems for name, problems in told.items() if problems} == {}


def test_a_killed_process_leaves_a_checkpoint_for_another_mesh(tmp_path):
    steps, folder = 8, tmp_path / "checkpoint"
    wanted = losses(run(1, "train", tmp_path / "alone", steps)[0])
    found = train_and_kill(folder, steps, random.Random(0))
    done = lowrank.checkpoint.restore(folder).step if lowrank.checkpoint.exists(folder) else 0
    again = run(1, "train", folder, steps)[0]
    assert again["first"] == done
    found |= losses(again)
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        np.testing.assert_allclose(float.fromhex(found[step]), float.fromhex(loss), rtol=1e-5)
    assert float.fromhex(wanted[steps - 1]) < 0.9 * float.fromhex(wanted[0])


@pytest.mark.slow
def test_twenty_kills_change_no_bit_of_the_losses(tmp_path):
    steps, folder, rng = 300, tmp_path / "checkpoint", random.Random(1)
    wanted = losses(run(2, "train", tmp_path / "whole", steps)[0])
    firsts = []
    for _ in range(20):
        found = train_and_kill(folder, steps, rng)
        assert found.items() <= wanted.items()
        exists = lowrank.checkpoint.exists(folder)
        firsts.append(lowrank.checkpoint.restore(folder).step if exists else 0)
    assert firsts == sorted(firsts)
    assert 0 < firsts[-1] < steps
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    alone = losses(run(1, "train", other, steps)[0])  # on one process, to rounding
    for step, loss in alone.items():
        np.testing.assert_allclose(float.fromhex(loss), float.fromhex(wanted[step]), rtol=1e-4)
    last = run(2, "train", folder, steps)[0]
    assert last["first"] == firsts[-1]
    assert losses(last).items() <= wanted.items()
    assert max(losses(last)) == steps - 1
