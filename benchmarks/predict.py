"""Prediction: against vmapped JAX by hand, and in chunks against one call.

``python -m benchmarks.predict WAY`` is a process of its own, for its memory.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

from .pairs import Case, Found, Row, agree, in_turns, run, seconds
from .peer_scripts.record import peak_bytes
from .rows import NOISE, conjugate_svi, observations

CHUNK, DRAWS = 10_000, 100
WAYS = ("chunks", "one call")
OPTIONS: dict[str, Any] = {"return_sites": ["y"], "progress_bar": False}


def batch(y: np.ndarray, own: np.ndarray) -> Minibatch:
    return minibatch(y[own], rows={"rows": own})


def made(rows: int, first: np.ndarray) -> tuple[SubsampleSVI, dict[str, jax.Array]]:
    svi = conjugate_svi(rows, optax.adam(0.01), False)
    state = svi.init(jax.random.key(0), batch(observations(rows), first))
    return svi, svi.get_params(state)


@partial(jax.jit, static_argnums=3)
def by_hand(key: jax.Array, params: Any, rows: jax.Array, draws: int) -> jax.Array:
    """Draw latents of some rows, and their data, all draws at once."""
    loc, scale = params["z_auto_loc"][rows], params["z_auto_scale"][rows]

    def one(key: jax.Array) -> jax.Array:
        of_latents, of_data = jax.random.split(key)
        z = loc + scale * jax.random.normal(of_latents, loc.shape)
        return z + NOISE * jax.random.normal(of_data, loc.shape)

    return jax.vmap(one)(jax.random.split(key, draws))


def against_by_hand(size: int, batches: int, draws: int, quick: bool) -> Found:
    """Predict batch after batch, and bring all draws to the host."""
    total, key = 1_000_000, jax.random.key(0)
    choose = np.random.default_rng(0)
    rows = [choose.integers(0, total, size, dtype="int32") for _ in range(batches)]
    # Rows that are in a batch twice would be more work than by hand.
    rows = [np.unique(own)[: size - size // 64] for own in rows]
    svi, params = made(total, rows[0])
    y = observations(total)
    given = [batch(y, own) for own in rows]

    def ours(given: list[Minibatch]) -> np.ndarray:
        return svi.predict(key, params, given, draws, **OPTIONS)["y"]

    def other(rows: list[np.ndarray]) -> np.ndarray:
        keys = jax.random.split(key, len(rows))
        found = [
            by_hand(k, params, own, draws) for k, own in zip(keys, rows, strict=True)
        ]
        return np.concatenate([np.asarray(own) for own in found], 1)

    rounds = 2 if quick else 10
    ways = {
        "ours": partial(ours, given),
        "by hand": partial(other, rows),
        "ours, one": partial(ours, given[:1]),
        "by hand, one": partial(other, rows[:1]),
    }
    agree({way: ways[way]().std() for way in ("ours", "by hand")}, tolerance=0.02)
    took = {way: own * 1e3 for way, own in in_turns(ways, rounds, warm_up=1).items()}
    case = f"{draws:,} draws of {len(rows[0]):,} rows"
    against = "vmapped by hand"
    return Found(
        [
            Row(
                f"{case}, a batch of {batches}",
                against,
                "ms",
                took["ours"] / batches,
                took["by hand"] / batches,
                # A few batches take less time than to trace model and guide.
                None if quick else 1.5,
            ),
            Row(
                f"{case}, one call",
                against,
                "ms",
                took["ours, one"],
                took["by hand, one"],
                None,
                "traced anew in each call",
            ),
        ],
        {},
    )


def predict(way: str, rows: int, times: int) -> dict[str, Any]:
    """Compile, predict some times, and say how much memory it took in all."""
    y, key = observations(rows), jax.random.key(0)
    chunks = np.split(np.arange(rows), range(CHUNK, rows, CHUNK))
    svi, params = made(rows, chunks[0])
    given = [batch(y, own) for own in chunks]
    batches = given if way == "chunks" else batch(y, np.arange(rows))

    def draw() -> np.ndarray:
        return svi.predict(key, params, batches, DRAWS, **OPTIONS)["y"]

    before = peak_bytes()
    spread = float(draw().std())
    took = [seconds(draw) for _ in range(times)]
    return {"seconds": took, "bytes": peak_bytes() - before, "spread": spread}


def compare(rows: int, times: int) -> Found:
    command = [sys.executable, "-m", "benchmarks.predict"]
    found = {way: run([*command, way, str(rows), str(times)]) for way in WAYS}
    agree({way: own["spread"] for way, own in found.items()}, tolerance=0.01)
    ours, other = (found[way] for way in WAYS)
    case = f"{DRAWS} draws of {rows:,} rows in chunks of {CHUNK:,}"
    took = (np.array(own["seconds"]) for own in (ours, other))
    memory = (own["bytes"] / 2**20 for own in (ours, other))
    return Found(
        [
            Row(case, WAYS[1], "s", *took, 1.2),
            Row(f"peak memory, {case}", WAYS[1], "MiB", *memory),
        ],
        {},
    )


def cases(quick: bool) -> list[Case]:
    sizes = {16: 10, 256: 4} if quick else {16: 1000, 256: 100, 4096: 10}
    found = [
        Case(
            f"prediction of {size} rows",
            partial(against_by_hand, size, batches, 1000, quick),
        )
        for size, batches in sizes.items()
    ]
    rows, times = (20_000, 1) if quick else (400_000, 5)
    return [*found, Case("prediction", partial(compare, rows, times))]


if __name__ == "__main__":
    way, rows, times = sys.argv[1:]
    print(json.dumps(predict(way, int(rows), int(times))))
