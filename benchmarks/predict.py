"""Predict all rows in chunks, or in one call: time, and memory of a process of its own.

``python -m benchmarks.predict WAY`` is such a process.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from numpyro_dynamic_subsample import minibatch

from .pairs import Case, Found, Row, agree, run, seconds
from .peer_scripts.record import peak_bytes
from .rows import conjugate_svi, observations

CHUNK, DRAWS = 10_000, 100
WAYS = ("chunks", "one call")


def predict(way: str, rows: int, times: int) -> dict[str, Any]:
    """Compile, predict some times, and say how much memory it took in all."""
    svi = conjugate_svi(rows, optax.adam(0.01), False)
    y, key = observations(rows), jax.random.key(0)

    def batch(own: np.ndarray) -> Any:
        return minibatch(y[own], rows={"rows": own})

    chunks = [
        batch(own) for own in np.split(np.arange(rows), range(CHUNK, rows, CHUNK))
    ]
    state = svi.init(key, chunks[0])
    options: dict[str, Any] = {"num_samples": DRAWS, "return_sites": ["y"]}

    def draw() -> np.ndarray:
        if way == "chunks":
            made = svi.predict_batches(
                key, state, chunks, progress_bar=False, **options
            )
        else:
            made = svi.predict(key, state, batch(np.arange(rows)), **options)
        return made["y"]

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
            Row(case, WAYS[1], "s", *took),
            Row(f"peak memory, {case}", WAYS[1], "MiB", *memory),
        ],
        {},
    )


def cases(quick: bool) -> list[Case]:
    rows, times = (20_000, 1) if quick else (400_000, 5)
    return [Case("prediction", partial(compare, rows, times))]


if __name__ == "__main__":
    way, rows, times = sys.argv[1:]
    print(json.dumps(predict(way, int(rows), int(times))))
