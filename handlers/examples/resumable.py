"""Save a fit as it runs, and go on from there after it was killed.

Each checkpoint holds the state of the fit and the place of the loader, so that a fit
that goes on ends where it would have ended anyway, bit for bit. orbax writes a
checkpoint under another name first: one that a kill cuts short is not met again::

    $ python -m numpyro_dynamic_subsample.examples.resumable DIRECTORY
    step 1: loss 1385.9
    step 2: loss 902.8
    step 3: loss 1114.5

After Ctrl-C, or ``kill -9``, the same command goes on after the newest checkpoint::

    $ python -m numpyro_dynamic_subsample.examples.resumable DIRECTORY
    going on after step 9
    step 10: loss 1141.9

``SubsampleSVI.fit`` saves once an epoch in its callback, and goes on with `state` and
`initial_epoch`; its batches, if made from the number of the epoch, need no place.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import orbax.checkpoint as ocp
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

ROWS, BATCH, EPOCHS = 184, 16, 6
SAVE_EVERY = 9  # steps
DATA = np.random.default_rng(0).normal(size=ROWS).astype("float32")


def model(batch: Any) -> None:
    """Draw a mean, a latent for each row, and the batch's data."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=batch)


def load(rows: np.ndarray) -> Minibatch:
    """Make the batch of some rows."""
    return minibatch(DATA[rows], rows={"rows": rows}, capacity=BATCH)


def loader() -> grain.IterDataset:
    """Shuffle rows anew in every epoch. Its iterators can be saved."""
    rows = grain.MapDataset.range(ROWS).seed(0).shuffle()
    return rows.batch(BATCH).repeat(EPOCHS).map(load).to_iter_dataset()


def fit(directory: Path) -> tuple[Any, list[float]]:
    """Fit, from the newest checkpoint in a directory; give state and losses."""
    svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
    state = svi.init(jax.random.key(0), load(np.arange(BATCH)))
    step = jax.jit(svi.update, donate_argnums=0)
    batches, losses = iter(loader()), []
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=3, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(directory.absolute(), options=options) as saved:
        done = saved.latest_step() or 0
        if done:
            contents = ocp.args.Composite(
                svi=ocp.args.StandardRestore(state),
                loader=grain.checkpoint.CheckpointRestore(batches),
            )
            state = saved.restore(done, args=contents).svi
            print(f"going on after step {done}")
        for number, batch in enumerate(batches, done + 1):
            state, loss = step(state, batch)
            losses.append(float(loss))
            contents = ocp.args.Composite(
                svi=ocp.args.StandardSave(state),
                loader=grain.checkpoint.CheckpointSave(batches),
            )
            saved.save(number, args=contents)
            print(f"step {number}: loss {loss:.1f}", flush=True)
    return state, losses


def main(argv: list[str] | None = None) -> None:
    """Fit, with checkpoints in a directory."""
    parser = argparse.ArgumentParser(description="Fit, with checkpoints.")
    parser.add_argument("directory", type=Path)
    fit(parser.parse_args(argv).directory)


if __name__ == "__main__":
    main()
