"""A fit that goes on where it was killed: ``python resumable.py DIRECTORY``."""

import sys
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from models import hierarchy
from numpyro_dynamic_subsample import SubsampleSVI, minibatch
from numpyro_dynamic_subsample.__main__ import newest

ROWS, BATCH, EPOCHS = 184, 16, 6
SAVE_EVERY = 9
DATA = np.random.default_rng(0).normal(size=ROWS).astype("f4")


model = hierarchy(ROWS, "rows", 0.5)


def step_of(rows):
    return minibatch(DATA[rows], rows={"rows": rows}, capacity=BATCH)


def loader(rows=ROWS, batch_size=BATCH, epochs=EPOCHS, seed=0, make=step_of):
    """Read ahead what `make` makes of the rows of each batch, shuffled every epoch."""
    return (
        grain.MapDataset.range(rows)
        .seed(seed)
        .shuffle()
        .batch(batch_size)
        .repeat(epochs)
        .map(make)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )


def fit(directory, first):
    """Fit, from where the checkpoints in a directory end, and give state and losses.

    The guide's first call is that with the rows `first`.
    """
    svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
    state = svi.init(jax.random.key(0), minibatch(DATA[first], rows={"rows": first}))
    update = jax.jit(svi.update, donate_argnums=0)
    batches = iter(loader())
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=3
    )
    losses = []
    with ocp.CheckpointManager(directory, options=options) as saved:
        restore = ocp.args.Composite(
            svi=ocp.args.StandardRestore(state),
            loader=grain.checkpoint.CheckpointRestore(batches),
        )
        done, restored = newest(saved, restore)
        state = restored.svi if restored else state
        for step, batch in enumerate(batches, done + 1):
            state, loss = update(state, batch)
            losses.append(float(loss))
            save = ocp.args.Composite(
                svi=ocp.args.StandardSave(state),
                loader=grain.checkpoint.CheckpointSave(batches),
            )
            saved.save(step, args=save)
            print(step, flush=True)
    return state, losses


if __name__ == "__main__":
    fit(Path(sys.argv[1]), np.arange(BATCH))
