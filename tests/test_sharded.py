"""Sharding over devices changes where steps are computed, and nothing else."""

import os
import re
import socket
import subprocess
import sys
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from numpyro.handlers import substitute
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from checks import assert_prints
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample
from numpyro_dynamic_subsample.examples import sharded
from numpyro_dynamic_subsample.examples.sharded import ROWS, model

TIMEOUT = 150


def wrapper(guide, optimizer):
    svi = SVI(model, dynamic_subsample(guide), optimizer, Trace_ELBO())

    def call(run, argument, batch):
        with substitute(data=jax.tree.map(jnp.asarray, batch.pinned)):
            return run(argument, *batch.args)

    return svi, call


def context(guide, optimizer):
    svi = SVI(model, guide, optimizer, Trace_ELBO())

    def call(run, argument, batch):
        pins = substitute(data=jax.tree.map(jnp.asarray, batch.pinned))
        with dynamic_subsample(), pins:
            return run(argument, *batch.args)

    return svi, call


def padded(guide, optimizer, **options):
    svi = SubsampleSVI(model, guide, optimizer, Trace_ELBO(), **options)
    return svi, lambda run, argument, batch: run(argument, batch)


FORMS = {
    "wrapper": wrapper,
    "context": context,
    "padded": padded,
    "row-wise": partial(padded, rowwise=True),
}


def numbers_in_arrays(program):
    """Count the numbers of each array in the program of one device."""
    shapes = re.findall(r"\w\[([\d,]+)\]", program)
    return [prod(map(int, shape.split(","))) for shape in shapes]


def train(form, mesh):
    """Take some steps; give losses, parameters, and the size of the compiled steps."""
    svi, call = FORMS[form](AutoNormal(model), optax.adam(0.1))
    pads = form in ("padded", "row-wise")
    batches = list(sharded.batches() if pads else sharded.batches(None))
    state = call(svi.init, jax.random.key(0), batches[0])
    state = sharded.split_state(state, mesh)
    update = jax.jit(partial(call, svi.update), donate_argnums=0)
    losses, compiled = [], {}
    for batch in batches:
        step, size = sharded.split_batch(batch, mesh), len(batch.args[0])
        if size not in compiled:
            compiled[size] = update.lower(state, step).compile()
        # A compiled step refuses arguments that are sharded otherwise, so that this
        # also shows that a new state is sharded like the old one.
        state, loss = compiled[size](state, step)
        losses.append(loss)
    params = process_allgather(svi.get_params(state), tiled=True)
    arrays = [numbers_in_arrays(step.as_text()) for step in compiled.values()]
    memory = [step.memory_analysis() for step in compiled.values()]
    return params | {
        "losses": np.array(losses),
        "largest array": max(map(max, arrays)),
        "bytes": max(m.argument_size_in_bytes + m.temp_size_in_bytes for m in memory),
    }


def write_what_is_found(path, forms, devices, address="", process=0, processes=1):
    """What this file does as a program: alone, or as one of several processes."""
    mesh = sharded.connect(int(devices), address, int(process), int(processes))
    found = {
        f"{form} {name}": value
        for form in forms.split(",")
        for name, value in train(form, mesh).items()
    }
    if jax.process_index() == 0:
        np.savez(path, **found)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*commands):
    """Run programs at the same time, and return what each prints."""
    # Processes with different programs would wait for each other for ever.
    assert "PYTHONHASHSEED" in os.environ
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, *own], **pipes) for own in commands]
    printed = []
    try:
        for process in started:
            out, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
            printed.append(out)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return printed


@pytest.mark.parametrize(
    ("forms", "devices", "processes"),
    [(["wrapper", "context", "row-wise"], 8, 1), (["padded"], 4, 2)],
    ids=["8 devices", "2 processes with 4 devices each"],
)
def test_steps_equal_those_of_one_device(tmp_path, forms, devices, processes):
    path, address = tmp_path / "found.npz", f"127.0.0.1:{free_port()}"
    command = [__file__, path, ",".join(forms), str(devices), address]
    run(*[[*command, str(n), str(processes)] for n in range(processes)])
    found = np.load(path)
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


def test_example_prints_what_it_says():
    assert_prints(sharded, *run(["-m", sharded.__name__]))


if __name__ == "__main__":
    write_what_is_found(*sys.argv[1:])
