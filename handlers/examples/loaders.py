"""Feed a fit from NumPy, grain or torch.

Each loader shuffles rows, and makes the batches of these by one function, `load`; the
last batch of an epoch is smaller. One compilation serves all batches::

    $ python -m numpyro_dynamic_subsample.examples.loaders
    numpy: 80 steps, 1 compilation
    grain: 80 steps, 1 compilation
    torch: not installed

`read_ahead` makes batches in threads while the device works, and needs no more memory
than a few of them, so `load` may read from disk, or make data up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

ROWS, BATCH, EPOCHS = 1000, 64, 5
DATA = np.random.default_rng(0).normal(size=ROWS).astype("float32")


def model(batch: Any) -> None:
    """Draw a mean, a latent for each row, and the batch's data."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=batch)


def load(rows: Any) -> Minibatch:
    """Make the batch of some rows: an array, or the list that torch gives."""
    rows = np.asarray(rows)
    return minibatch(DATA[rows], rows={"rows": rows}, capacity=BATCH, size=ROWS)


def shuffled(epoch: int) -> Iterator[Minibatch]:
    """Make the batches of an epoch from NumPy's permutation of the rows."""
    order = np.random.default_rng(epoch).permutation(ROWS)
    return map(load, np.split(order, range(BATCH, ROWS, BATCH)))


def read_ahead(
    rows: int,
    batch_size: int,
    epochs: int = 1,
    seed: int = 0,
    make: Callable[[np.ndarray], Any] = load,
) -> Iterable[Any]:
    """Make batches ahead in grain's threads, shuffled anew in every epoch."""
    grain = import_module("grain")
    order = grain.MapDataset.range(rows).seed(seed).shuffle().batch(batch_size)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return order.repeat(epochs).map(make).to_iter_dataset(options)


def with_grain(epoch: int) -> Iterable[Minibatch]:
    """Make the batches of an epoch, in an order of its own."""
    return read_ahead(ROWS, BATCH, seed=epoch)


def with_torch() -> Iterable[Minibatch]:
    """Return a loader of torch, which shuffles by itself in each epoch."""
    loader = import_module("torch.utils.data").DataLoader
    return loader(range(ROWS), batch_size=BATCH, shuffle=True, collate_fn=load)


def main() -> None:
    """Fit with each loader that is installed."""
    loaders = {
        "numpy": lambda: shuffled,
        "grain": lambda: import_module("grain") and with_grain,
        "torch": with_torch,
    }
    for name, make in loaders.items():
        try:
            batches: Any = make()
        except ModuleNotFoundError:
            print(f"{name}: not installed")
            continue
        svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
        result = svi.fit(jax.random.key(0), batches, EPOCHS, progress_bar=False)
        steps, compiled = len(result.losses), result.compilations
        print(f"{name}: {steps} steps, {compiled} compilation")


if __name__ == "__main__":
    main()
