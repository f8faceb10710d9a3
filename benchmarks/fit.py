"""An epoch of ``fit`` beside one scan over batches that are on the device."""

import io
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class Loop(NamedTuple):
    svi: SubsampleSVI
    of_epoch: Callable[[int], Iterable[Minibatch]]


def small_model() -> Loop:
    """Take small batches that wait in a list, so that the loop itself shows."""
    y = np.random.default_rng(0).normal(size=ROWS).astype("float32")
    parts = np.split(np.random.default_rng(1).permutation(ROWS), range(64, ROWS, 64))
    made = [minibatch(y[rows], rows={"rows": rows}, capacity=64) for rows in parts]
    svi = SubsampleSVI(small, AutoNormal(small), optax.adam(0.01), Trace_ELBO())
    return Loop(svi, lambda epoch: made)


def insteval() -> Loop:
    """Make the batches during the epoch, as the demo does."""
    ratings, parts = load(), cut(shuffled(0, 0), BATCH_SIZE)
    make = partial(ratings, capacity=ratings.capacity(parts))

    def of_epoch(epoch: int) -> Iterable[Minibatch]:
        return map(make, parts)

    return Loop(subsample_svi(optax.adam(0.001)), of_epoch)


def insteval_made_before() -> Loop:
    svi, of_epoch = insteval()
    made = list(of_epoch(0))
    return Loop(svi, lambda epoch: made)


def epochs(
    make: Callable[[], Loop],
    case: str,
    rounds: int,
    target: float | None = None,
    together: int | None = None,
) -> Found:
    """Let epochs of ``fit`` take turns, in its callback, with those of one scan.

    All batches of the scan are on the device, stacked.
    """
    svi, of_epoch = make()
    key = jax.random.key(0)
    made = list(of_epoch(0))
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *made)
    scan = jax.jit(lambda state: jax.lax.scan(svi.update, state, stacked))
    by_scan = {"state": svi.init(key, made[0]), "losses": []}
    times: dict[str, list[float]] = {"fit": [], "scan": []}
    began = time.perf_counter()

    def callback(*_: Any) -> None:
        nonlocal began
        times["fit"].append(time.perf_counter() - began)
        began = time.perf_counter()
        by_scan["state"], losses = scan(by_scan["state"])
        jax.block_until_ready(losses)
        times["scan"].append(time.perf_counter() - began)
        by_scan["losses"].append(losses)
        began = time.perf_counter()

    # The bar is part of what is timed, and would cut through that of the cases.
    with redirect_stderr(io.StringIO()):
        result = svi.fit(
            key,
            of_epoch,
            WARM_UP + rounds,
            callback=callback,
            steps_per_dispatch=together,
        )
    losses = {"fit": result.losses, "scan": np.concatenate(by_scan["losses"])}
    apart = agree(losses)
    first = 1e3 * times["fit"][0]
    ours, other = (1e3 * np.array(own[WARM_UP:]) for own in times.values())
    note = (
        f"{len(made)} steps an epoch; losses within {apart:.0e}; the first epoch, with "
        f"compilation, {first:,.0f} ms"
    )
    return Found([Row(case, "one scan", "ms", ours, other, target, note)], {})


def cases(quick: bool) -> list[Case]:
    rounds = 5 if quick else 100
    named: list[tuple] = [
        ("InstEval, batches made on the way", insteval, 1.7),
        ("InstEval, batches made before", insteval_made_before, 1.4),
        ("small model, batches made before", small_model, None),
    ]
    for count in (16,) if quick else (1, 2, 4, 8, 16, 32, 64):
        name = f"small model, at most {count} steps a dispatch"
        named.append((name, small_model, None, count))
    return [
        Case(f"epoch of fit, {name}", partial(epochs, make, name, rounds, *options))
        for name, make, *options in named
    ]
