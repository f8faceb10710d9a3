"""Split rows, optimizer state and batches over devices and processes.

What has an entry for each row of the plate is split along that axis, and batches are
split along theirs. JAX then compiles steps that run on all devices, each with its part.
On four virtual devices of a CPU::

    $ python -m numpyro_dynamic_subsample.examples.sharded --devices 4
    4 devices in 1 process, 4000 of 16000 rows on each
    step 1, 64 rows: loss 100919
    step 2, 32 rows: loss 151574
    step 3, 64 rows: loss 142131

The same in two processes, which print the same::

    $ python -m numpyro_dynamic_subsample.examples.sharded --devices 2 \
          --processes 2 --process 1 &
    $ python -m numpyro_dynamic_subsample.examples.sharded --devices 2 \
          --processes 2 --process 0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

ROWS = 16_000
CAPACITY = 64  # a multiple of the number of devices, as ROWS is


def model(batch: Any) -> None:
    """Draw a mean, a latent for each row, and the batch's data."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=batch)


def batches(capacity: int | None = CAPACITY) -> Iterator[Minibatch]:
    """Yield batches of several sizes, the same ones in all processes."""
    draw = np.random.default_rng(0)
    data = draw.normal(size=ROWS).astype("float32")
    for size in (64, 32, 64):
        rows = draw.choice(ROWS, size, replace=False)
        yield minibatch(data[rows], rows={"rows": rows}, capacity=capacity)


def split_state(state: Any, mesh: Mesh) -> Any:
    """Split arrays along the axis with an entry for each row; copy all others."""

    def sharding(leaf: Any) -> NamedSharding:
        axes = ("rows" if length == ROWS else None for length in leaf.shape)
        return NamedSharding(mesh, PartitionSpec(*axes))

    # A compiled program may make arrays of which each process has a part only.
    copy = jax.jit(lambda state: state, out_shardings=jax.tree.map(sharding, state))
    return copy(state)


def split_batch(batch: Minibatch, mesh: Mesh) -> Minibatch:
    """Split the rows of a batch, each process giving its part to its devices."""
    along_rows = NamedSharding(mesh, PartitionSpec("rows"))

    def split(leaf: Any) -> Any:
        if not np.ndim(leaf):
            return leaf
        own = np.split(leaf, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(along_rows, own)

    return jax.tree.map(split, batch)


def connect(devices: int, address: str, process: int, processes: int) -> Mesh:
    """Let JAX have virtual devices, and other processes; return all devices."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, process)
    return Mesh(jax.devices(), "rows")


def main(argv: list[str] | None = None) -> None:
    """Take a few steps on all devices."""
    parser = argparse.ArgumentParser(description="Split a fit over devices.")
    parser.add_argument("--devices", type=int, default=4, help="of this process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0, help="which one this is")
    parser.add_argument("--address", default="127.0.0.1:51234", help="of process 0")
    options = parser.parse_args(argv)
    mesh = connect(**vars(options))

    svi = SubsampleSVI(
        model, AutoNormal(model), optax.adam(0.1), Trace_ELBO(), rowwise=True
    )
    state = split_state(svi.init(jax.random.key(0), next(batches())), mesh)
    each = svi.get_params(state)["z_auto_loc"].addressable_shards[0].data.shape[0]
    devices, processes = f"{mesh.size} devices", f"{jax.process_count()} process"
    print(f"{devices} in {processes}, {each} of {ROWS} rows on each")
    step = jax.jit(svi.update, donate_argnums=0)
    for number, batch in enumerate(batches(), 1):
        state, loss = step(state, split_batch(batch, mesh))
        count = batch.counts["rows"]
        print(f"step {number}, {count} rows: loss {loss:.0f}")


if __name__ == "__main__":
    main()
