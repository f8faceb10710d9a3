"""Sharding over devices changes where steps are computed, and nothing else."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sharded import FORMS, ROWS, train

SCRIPT = Path(__file__).with_name("sharded.py")
TIMEOUT = 150


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_elsewhere(path, forms, devices, processes):
    command = [sys.executable, SCRIPT, path, ",".join(forms), str(devices)]
    each = [[]]
    if processes > 1:
        address = f"127.0.0.1:{free_port()}"
        each = [[address, str(n), str(processes)] for n in range(processes)]
    # Processes with different programs would wait for each other for ever.
    assert "PYTHONHASHSEED" in os.environ
    started = [
        subprocess.Popen([*command, *own], stderr=subprocess.PIPE, text=True)
        for own in each
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return np.load(path)


@pytest.mark.parametrize(
    ("forms", "devices", "processes"),
    [(list(FORMS), 8, 1), (["padded", "row-wise"], 4, 2)],
    ids=["8 devices", "2 processes with 4 devices each"],
)
def test_steps_equal_those_of_one_device(tmp_path, forms, devices, processes):
    found = train_elsewhere(tmp_path / "found.npz", forms, devices, processes)
    for form in forms:
        alone = train(form, Mesh(jax.devices()[:1], "rows"))
        largest, needed = alone.pop("largest array"), alone.pop("bytes")
        assert largest == ROWS
        for name, value in alone.items():
            there = found[f"{form} {name}"]
            np.testing.assert_allclose(there, value, rtol=2e-6, atol=2e-6, err_msg=form)
        # Were any array of all rows gathered, it would be in the program of a device.
        assert found[f"{form} largest array"] == ROWS / 8
        assert found[f"{form} bytes"] < needed / 6
