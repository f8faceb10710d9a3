"""Steps with rows, batches and state sharded over all devices that there are.

``python sharded.py FOUND FORMS DEVICES [ADDRESS PROCESS PROCESSES]`` takes them on
virtual CPU devices, alone or as one of several processes, and writes what it finds to
the file FOUND.
"""

import re
import sys
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.handlers import substitute
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from checks import told
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample, minibatch

ROWS = 16_000
CAPACITY = 64
SIZES = [64, 32, 64]


def model(batch):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=batch)


def wrapper(guide, optimizer):
    svi = SVI(model, dynamic_subsample(guide), optimizer, Trace_ELBO())

    def call(run, argument, batch, rows, count):
        with substitute(data={"rows": rows}):
            return run(argument, batch)

    return svi, call


def context(guide, optimizer):
    svi = SVI(model, guide, optimizer, Trace_ELBO())

    def call(run, argument, batch, rows, count):
        with dynamic_subsample(), substitute(data={"rows": rows}):
            return run(argument, batch)

    return svi, call


def padded(guide, optimizer, **options):
    svi = SubsampleSVI(model, guide, optimizer, Trace_ELBO(), **options)

    def call(run, argument, batch, rows, count):
        return run(argument, told(batch, rows={"rows": rows}, counts={"rows": count}))

    return svi, call


FORMS = {
    "wrapper": wrapper,
    "context": context,
    "padded": padded,
    "row-wise": partial(padded, rowwise=True),
}


def batches(capacity):
    draw = np.random.default_rng(0)
    data = draw.normal(size=ROWS).astype("f4")
    for size in SIZES:
        rows = draw.choice(ROWS, size, replace=False)
        batch = minibatch(data[rows], rows={"rows": rows}, capacity=capacity)
        yield *batch.args, batch.rows["rows"], batch.counts["rows"]


def numbers_in_arrays(program):
    """Count the numbers of each array in the program of one device."""
    shapes = re.findall(r"\w\[([\d,]+)\]", program)
    return [prod(map(int, shape.split(","))) for shape in shapes]


def train(form, mesh):
    """Take some steps; give losses, parameters, and the size of the compiled steps."""

    def by_rows(leaf):
        axes = ("rows" if length == ROWS else None for length in leaf.shape)
        return NamedSharding(mesh, PartitionSpec(*axes))

    def spread(leaf):
        over_devices = NamedSharding(mesh, PartitionSpec("rows"))
        own = np.split(leaf, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(over_devices, own)

    svi, call = FORMS[form](AutoNormal(model), optax.adam(0.1))
    pads = form in ("padded", "row-wise")
    whole = list(batches(CAPACITY if pads else None))
    steps = [(spread(batch), spread(rows), count) for batch, rows, count in whole]
    first = jax.tree.map(jnp.asarray, whole[0])
    state = call(svi.init, jax.random.key(0), *first)
    shardings = jax.tree.map(by_rows, state)
    state = jax.jit(lambda state: state, out_shardings=shardings)(state)
    update = jax.jit(partial(call, svi.update), donate_argnums=0)
    losses, compiled = [], {}
    for step in steps:
        size = len(step[0])
        if size not in compiled:
            compiled[size] = update.lower(state, *step).compile()
        # A compiled step refuses arguments that are sharded otherwise, so that this
        # also shows that a new state is sharded like the old one.
        state, loss = compiled[size](state, *step)
        losses.append(loss)
    params = process_allgather(svi.get_params(state), tiled=True)
    arrays = [numbers_in_arrays(step.as_text()) for step in compiled.values()]
    memory = [step.memory_analysis() for step in compiled.values()]
    return params | {
        "losses": np.array(losses),
        "largest array": max(map(max, arrays)),
        "bytes": max(m.argument_size_in_bytes + m.temp_size_in_bytes for m in memory),
    }


def main(path, forms, devices, address=None, process=0, processes=1):
    jax.config.update("jax_num_cpu_devices", int(devices))
    if address is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(process))
    mesh = Mesh(jax.devices(), "rows")
    found = {
        f"{form} {name}": value
        for form in forms.split(",")
        for name, value in train(form, mesh).items()
    }
    if jax.process_index() == 0:
        np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
