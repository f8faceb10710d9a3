"""Prediction: against vmapped JAX by hand, and in chunks against one call.

``python -m benchmarks.predict WAY ROWS TIMES`` is a process of its own, for its memory.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from numpyro_dynamic_subsample import Minibatch, minibatch

from .pairs import Row, agree, in_turns, run, seconds
from .peer_scripts.record import peak_bytes
from .rows import NOISE, conjugate_svi, observations

CHUNK, KEY = 10_000, jax.random.key(0)
WAYS = ("chunks", "one call")


def predictor(total: int, first: np.ndarray) -> tuple[Any, Any, Any]:
    """Return a function that predicts rows, one that makes batches, and parameters."""
    y = observations(total)
    svi = conjugate_svi(total, optax.adam(0.01), False)

    def batch(rows: np.ndarray) -> Minibatch:
        return minibatch(y[rows], rows={"rows": rows})

    params = svi.get_params(svi.init(KEY, batch(first)))

    def predict(draws: int, batches: Any) -> np.ndarray:
        return svi.predict(KEY, params, batches, draws, ["y"], progress_bar=False)["y"]

    return predict, batch, params


@partial(jax.jit, static_argnums=3)
def by_hand(key: jax.Array, params: Any, rows: jax.Array, draws: int) -> jax.Array:
    """Draw latents of some rows, and their data, all draws at once."""
    loc, scale = params["z_auto_loc"][rows], params["z_auto_scale"][rows]

    def one(key: jax.Array) -> jax.Array:
        of_latents, of_data = jax.random.split(key)
        z = loc + scale * jax.random.normal(of_latents, loc.shape)
        return z + NOISE * jax.random.normal(of_data, loc.shape)

    return jax.vmap(one)(jax.random.split(key, draws))


def against_by_hand(size: int, batches: int, aim: float | None) -> Iterator[Row]:
    """Predict batch after batch, and bring all draws to the host."""
    total, draws, choose = 1_000_000, 1000, np.random.default_rng(0)
    rows = [choose.choice(total, size, replace=False) for _ in range(batches)]
    rows = [own.astype("int32") for own in rows]
    predict, batch, params = predictor(total, rows[0])
    given = [batch(own) for own in rows]

    def other(rows: list[np.ndarray]) -> np.ndarray:
        keys = jax.random.split(KEY, len(rows))
        found = map(partial(by_hand, draws=draws), keys, [params] * len(rows), rows)
        return np.concatenate([np.asarray(own) for own in found], 1)

    case = f"{draws:,} draws of {size:,} rows"
    for count, label in ((batches, f"{batches:,} batches"), (1, "one batch")):
        ways = {
            "ours": partial(predict, draws, given[:count]),
            "by hand": partial(other, rows[:count]),
        }
        agree({way: draw().std() for way, draw in ways.items()}, tolerance=0.03)
        took = in_turns(ways, 10 if aim else 2, warm_up=1)
        # One batch takes less time than to trace model and guide, in each call.
        aim_here = aim if count > 1 else None
        yield Row(f"{case}, {label}", "vmap by hand", "s", *took.values(), aim_here)


def one_way(way: str, rows: int, times: int) -> dict[str, Any]:
    """Compile, predict some times, and say how much memory it took in all."""
    chunks = np.split(np.arange(rows), range(CHUNK, rows, CHUNK))
    predict, batch, _ = predictor(rows, chunks[0])
    made = [batch(own) for own in chunks]
    given = made if way == WAYS[0] else batch(np.arange(rows))
    before, deviation = peak_bytes(), float(predict(100, given).std())
    took = [seconds(partial(predict, 100, given)) for _ in range(times)]
    return {"seconds": took, "bytes": peak_bytes() - before, "deviation": deviation}


def in_chunks(rows: int, times: int) -> Iterator[Row]:
    command = [sys.executable, "-m", "benchmarks.predict"]
    found = [run([*command, way, str(rows), str(times)]) for way in WAYS]
    agree(
        dict(zip(WAYS, (own["deviation"] for own in found), strict=True)),
        tolerance=0.01,
    )
    case = f"100 draws of {rows:,} rows, {CHUNK:,} in a batch"
    for label, key, unit, aim in (
        (case, "seconds", "s", 1.2),
        (f"{case}, peak memory", "bytes", "bytes", None),
    ):
        yield Row(label, "one batch", unit, *(own[key] for own in found), aim)


def cases(quick: bool) -> Iterator[Row]:
    # With few batches, tracing shows.
    sizes = {16: 10} if quick else {16: 1000, 256: 100, 4096: 10}
    for size, batches in sizes.items():
        yield from against_by_hand(size, batches, None if quick else 1.5)
    yield from in_chunks(*(20_000, 1) if quick else (400_000, 5))


if __name__ == "__main__":
    way, rows, times = sys.argv[1:]
    print(json.dumps(one_way(way, int(rows), int(times))))
