"""What batches of ever new sizes cost: compilation, and the padding that avoids it.

Run ``python -m benchmarks.ragged`` in the root of a clone; it prints Markdown.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, pad_minibatch
from numpyro_dynamic_subsample.__main__ import STUDENTS, Batch, load, start
from numpyro_dynamic_subsample.__main__ import model as ratings_model

FEATURES = 32
ROWS = 1_000_000  # of the synthetic plate, of which only batches are made


class Step(NamedTuple):
    """The arguments of one step."""

    batch: Any
    indices: dict[str, Any]
    valid: dict[str, Any]


class Way(NamedTuple):
    name: str
    pad: Callable[[Any, int], tuple[Any, int]]
    counted: bool = True


WAYS = (
    Way("per-size compilation", lambda rows, _: (rows, -1), counted=False),
    Way("power-of-two buckets", lambda rows, _: pad_minibatch(rows)),
    Way("one compilation", pad_minibatch),
)


def jitted(run: Callable, compiled: list[int]) -> Callable:
    """Compile a step anew, also where an equal one has been compiled before."""

    def step(argument: Any, step: Step) -> Any:
        compiled.append(1)
        batch, indices, valid = step
        return run(argument, batch, indices=indices, valid=valid)

    return jax.jit(step)


def first_epoch(
    svi: SubsampleSVI, state: Any, make: Callable[[Way, int], Step], steps: int
) -> tuple[list[tuple[str, float, int]], float]:
    """Time an epoch in each way, and tell how far losses differ from the first's."""
    found, losses = [], []
    for way in WAYS:
        jax.clear_caches()
        compiled: list[int] = []
        update = jitted(svi.update, compiled)
        now, of_way = state, []
        started = time.perf_counter()
        for number in range(steps):
            now, loss = update(now, make(way, number))
            of_way.append(loss)
        jax.block_until_ready((now, of_way))
        found.append((way.name, time.perf_counter() - started, len(compiled)))
        losses.append(np.array(of_way))
    return found, agreement(losses)


def agreement(losses: Sequence[np.ndarray]) -> float:
    """Refuse losses that differ by more than rounding, in 32 bits and many steps."""
    apart = max(np.abs(other / losses[0] - 1).max() for other in losses)
    assert apart < 1e-4, f"The ways disagree by {apart:.1e}: no time can be believed."
    return float(apart)


def insteval(steps: int) -> tuple[list[tuple[str, float, int]], float]:
    """Take an epoch of 128 students a batch, each with all ratings of theirs."""
    ratings = load()
    order = np.random.default_rng(0).permutation(STUDENTS).astype("int32")
    parts = np.split(order, range(128, STUDENTS, 128))
    places = [np.concatenate([ratings.of_student[r] for r in rows]) for rows in parts]
    most = max(map(len, places))

    def make(way: Way, number: int) -> Step:
        rows, own = parts[number], places[number]
        counts = [len(ratings.of_student[row]) for row in rows]
        student = np.repeat(np.arange(len(rows), dtype="int32"), counts)
        arrays = student, ratings.lecturer[own], ratings.y[own]
        students, count = way.pad(rows, 128)
        (student, lecturer, y), given = way.pad(arrays, most)
        valid = {"students": count, "ratings": given} if way.counted else {}
        real = count if way.counted else len(rows)
        batch = Batch(students, real, student, lecturer, y, given)
        return Step(batch, {"students": students}, valid)

    guide = AutoNormal(ratings_model, init_loc_fn=init_to_value(values=start()))
    svi = SubsampleSVI(ratings_model, guide, optax.adam(0.02), TraceMeanField_ELBO())
    state = jitted(svi.init, [])(jax.random.key(0), make(WAYS[-1], 0))
    # The last batch, of fewer students, is among the steps of a short run, too.
    skip = len(parts) - steps
    return first_epoch(svi, state, lambda way, number: make(way, number + skip), steps)


def regression(batch: tuple[jax.Array, jax.Array]) -> None:
    """Regress y on x; its cost is that of its rows, which padding adds to."""
    x, y = batch
    weights: Any = numpyro.sample(
        "weights", dist.Normal(0, jnp.ones(FEATURES)).to_event(1)
    )
    with numpyro.plate("n", ROWS, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def regression_data(rows: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(rows, FEATURES)).astype("float32")
    noise = draw.normal(size=rows)
    return x, (x @ np.linspace(-1, 1, FEATURES) + noise).astype("float32")


def regression_svi() -> tuple[SubsampleSVI, Any]:
    guide = AutoNormal(regression)
    svi = SubsampleSVI(regression, guide, optax.adam(0.01), Trace_ELBO())
    first = Step(regression_data(64), {}, {})
    return svi, jitted(svi.init, [])(jax.random.key(0), first)


def synthetic(steps: int) -> tuple[list[tuple[str, float, int]], float]:
    """Take batches of as many sizes as there are steps, from 33 to 1,024 rows."""
    sizes = np.linspace(33, 1024, steps).astype(int)
    np.random.default_rng(0).shuffle(sizes)
    x, y = regression_data(1024)

    def make(way: Way, number: int) -> Step:
        size = sizes[number]
        batch, count = way.pad((x[:size], y[:size]), 1024)
        return Step(batch, {}, {"n": count} if way.counted else {})

    return first_epoch(*regression_svi(), make, steps)


def steady(capacity: int, percent: int, repeats: int) -> tuple[float, float]:
    """Time a compiled step, unpadded and padded to a capacity; medians in seconds."""
    count = capacity * percent // 100
    rows = regression_data(count)
    svi, state = regression_svi()
    padded, _ = pad_minibatch(rows, capacity)
    steps = Step(rows, {}, {}), Step(padded, {}, {"n": np.int32(count)})
    updates = [jitted(svi.update, []) for _ in steps]
    steps = [jax.device_put(step) for step in steps]
    agreement([np.array([u(state, s)[1]]) for u, s in zip(updates, steps, strict=True)])
    times: tuple[list[float], list[float]] = ([], [])
    # In turns, so that whatever else the machine does meets both alike.
    for repeat in range(repeats + 10):
        for update, step, of_step in zip(updates, steps, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(update(state, step))
            if repeat >= 10:
                of_step.append(time.perf_counter() - started)
    unpadded, with_padding = map(statistics.median, times)
    return unpadded, with_padding


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few sizes and repeats")
    quick = parser.parse_args(argv).quick

    packages = ("numpyro-dynamic-subsample", "numpyro", "jax", "numpy", "optax")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="; ")
    print(f"Python {platform.python_version()}, {platform.machine()}", end=", ")
    print(f"{os.cpu_count()} CPUs, JAX on {jax.devices()[0].device_kind}")
    if quick:
        print("\nA short run (--quick).")

    print("\n| first epoch | steps | way | compilations | seconds | ratio |")
    print("|---|--:|---|--:|--:|--:|")
    notes = []
    for name, epoch, steps in (
        ("InstEval", insteval, 3 if quick else 24),
        ("64 sizes", synthetic, 4 if quick else 64),
    ):
        found, apart = epoch(steps)
        best = found[-1][1]
        for way, seconds, compilations in found:
            cells = f"{compilations} | {seconds:.1f} | {seconds / best:.1f}"
            print(f"| {name} | {steps} | {way} | {cells} |", flush=True)
        notes.append(f"{apart:.0e} ({name})")
    print(f"\nLosses of the three ways agree to {', '.join(notes)}.")

    print("\n| steady step, capacity | occupancy | unpadded, ms | padded, ms | ratio |")
    print("|--:|--:|--:|--:|--:|")
    for capacity in (256, 65_536):
        for percent in (50, 75, 100):
            without, padded = steady(capacity, percent, 20 if quick else 300)
            cells = f"{without * 1e3:.2f} | {padded * 1e3:.2f} | {padded / without:.2f}"
            print(f"| {capacity:,} | {percent} % | {cells} |", flush=True)


if __name__ == "__main__":
    main()
