"""An epoch of ``fit`` beside the bare loop over the same compiled step."""

import io
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from functools import partial
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch
from numpyro_dynamic_subsample.__main__ import cut, load, shuffled

from .insteval import BATCH_SIZE, subsample_svi
from .pairs import Case, Found, Row, agree

ROWS = 10_000
WARM_UP = 3  # epochs


def small(y: Any) -> None:
    mu: Any = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def made_before() -> tuple[SubsampleSVI, Callable[[int], Iterable[Minibatch]]]:
    """Take small batches that wait in a list, so that the loop itself shows."""
    y = np.random.default_rng(0).normal(size=ROWS).astype("float32")
    parts = np.split(np.random.default_rng(1).permutation(ROWS), range(64, ROWS, 64))
    made = [minibatch(y[rows], rows={"rows": rows}, capacity=64) for rows in parts]
    svi = SubsampleSVI(small, AutoNormal(small), optax.adam(0.01), Trace_ELBO())
    return svi, lambda epoch: made


def insteval() -> tuple[SubsampleSVI, Callable[[int], Iterable[Minibatch]]]:
    """Make the batches during the epoch, as the demo does."""
    ratings, parts = load(), cut(shuffled(0, 0), BATCH_SIZE)
    make = partial(ratings, capacity=ratings.capacity(parts))

    def of_epoch(epoch: int) -> Iterable[Minibatch]:
        return map(make, parts)

    return subsample_svi(optax.adam(0.001)), of_epoch


def epochs(make: Callable, case: str, rounds: int) -> Found:
    """Let epochs of the bare loop take turns with those of ``fit``, in its callback."""
    svi, of_epoch = make()
    key = jax.random.key(0)
    bare = {"state": svi.init(key, next(iter(of_epoch(0)))), "losses": []}
    step = jax.jit(svi.update, donate_argnums=0)
    times: dict[str, list[float]] = {"fit": [], "bare": []}
    began = time.perf_counter()

    def callback(*_: Any) -> None:
        nonlocal began
        times["fit"].append(time.perf_counter() - began)
        began = time.perf_counter()
        losses = []
        for batch in of_epoch(0):
            bare["state"], loss = step(bare["state"], batch)
            losses.append(loss)
        jax.block_until_ready(bare["state"])
        times["bare"].append(time.perf_counter() - began)
        bare["losses"] += losses
        began = time.perf_counter()

    # The bar is part of what is timed, and would cut through that of the cases.
    with redirect_stderr(io.StringIO()):
        result = svi.fit(key, of_epoch, WARM_UP + rounds, callback=callback)
    agree({"fit": result.losses, "bare": np.array(bare["losses"])}, tolerance=0)
    ours, other = (1e3 * np.array(own[WARM_UP:]) for own in times.values())
    steps = len(result.losses) // (WARM_UP + rounds)
    note = f"{steps} steps an epoch; equal losses, bit for bit"
    return Found([Row(case, "bare loop", "ms", ours, other, 1.05, note)], {})


def cases(quick: bool) -> list[Case]:
    rounds = 5 if quick else 100
    return [
        Case(name, partial(epochs, make, name, rounds))
        for name, make in (
            ("epoch of fit, small model, batches made before", made_before),
            ("epoch of fit, InstEval", insteval),
        )
    ]
