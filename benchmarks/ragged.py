"""What batches of ever new sizes cost: compilation, and the padding that avoids it."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from numpyro_dynamic_subsample.__main__ import STUDENTS, load

from .insteval import BATCH_SIZE, STEPS, subsample_svi
from .pairs import Case, Found, Row, Steps, agree, in_turns
from .pictures import LOOKS, save, subplots

FEATURES = 32
ROWS = 1_000_000  # of the synthetic plate, of which only batches are made
LARGEST = 1024


class Way(NamedTuple):
    name: str
    capacity: Callable[[dict[str, int]], Any]  # for the largest counts


WAYS = (
    Way("a compilation per size", lambda _: None),
    Way("power-of-two buckets", lambda _: "powers of two"),
    Way("one compilation", lambda most: most),
)
FIXED = "fixed size, as many rows"


class Epoch(NamedTuple):
    """Batches that are made while an epoch runs, as a loader does."""

    svi: SubsampleSVI
    state: Any
    steps: int
    ragged: Callable[[Way, int], Minibatch]
    fixed: Callable[[int], Minibatch]  # with the mean size of the ragged ones


def jitted(run: Callable, compiled: list[int]) -> Callable:
    """Compile a step anew, also where an equal one has been compiled before."""

    def step(argument: Any, batch: Minibatch) -> Any:
        compiled.append(1)
        return run(argument, batch)

    return jax.jit(step)


def one_epoch(
    update: Callable, state: Any, steps: int, make: Callable[[int], Minibatch]
) -> tuple[list[float], np.ndarray]:
    """Take an epoch's steps; the seconds after each of them, and all losses."""
    losses, clock = [], []
    started = time.perf_counter()
    for number in range(steps):
        state, loss = jax.block_until_ready(update(state, make(number)))
        losses.append(loss)
        clock.append(time.perf_counter() - started)
    return clock, np.array(losses)


def epochs(
    make_epoch: Callable[[int], Epoch],
    name: str,
    steps: int,
    target: float | None,
    times: int,
) -> Found:
    """Time the first epoch in each way, and later ones, where all is compiled.

    The target is for one compilation against a fixed size.
    """
    epoch = make_epoch(steps)
    makes = {way.name: partial(epoch.ragged, way) for way in WAYS}
    makes[FIXED] = epoch.fixed
    ours = WAYS[-1].name
    clocks: dict[str, list[list[float]]] = {way: [] for way in makes}
    losses, compilations, runs = {}, {}, {}
    for number in range(times):
        for way, make in makes.items():
            # The others compile for minutes.
            if number and way not in (ours, FIXED):
                continue
            jax.clear_caches()
            compiled: list[int] = []
            update = jitted(epoch.svi.update, compiled)
            runs[way] = partial(one_epoch, update, epoch.state, epoch.steps, make)
            clock, losses[way] = runs[way]()
            clocks[way].append(clock)
            compilations[way] = len(compiled)
    apart = agree({way.name: losses[way.name] for way in WAYS})

    later = in_turns({way: runs[way] for way in (ours, FIXED)}, 20, warm_up=2)
    took = {way: np.array(of_way)[:, -1] for way, of_way in clocks.items()}
    rows = []
    for way in (*(way.name for way in WAYS[:-1]), FIXED):
        counts = f"{compilations[ours]} and {compilations[way]} compilations"
        aim = target if way == FIXED else None
        values = took[ours], took[way]
        rows.append(Row(f"first epoch, {name}", way, "s", *values, aim, counts))
    milliseconds = later[ours] * 1e3, later[FIXED] * 1e3
    note = f"losses of the first three ways agree to {apart:.0e}"
    rows.append(Row(f"later epochs, {name}", FIXED, "ms", *milliseconds, target, note))
    return Found(rows, {name: {way: of_way[0] for way, of_way in clocks.items()}})


def insteval(steps: int) -> Epoch:
    """Take batches of 128 students, each with all ratings of theirs."""
    ratings = load()
    order = np.random.default_rng(0).permutation(STUDENTS).astype("int32")
    parts = np.split(order, range(BATCH_SIZE, STUDENTS, BATCH_SIZE))
    # The last batch, of fewer students, is among the steps of a short run, too.
    parts = parts[-steps:]
    most = ratings.capacity(parts)
    length = sum(ratings.counts[rows].sum() for rows in parts) // steps

    def ragged(way: Way, number: int) -> Minibatch:
        return ratings(parts[number], capacity=way.capacity(most))

    def fixed(number: int) -> Minibatch:
        made = ratings(np.resize(parts[number], BATCH_SIZE))
        columns = ("student", "lecturer", "y")
        resized = {name: np.resize(made.kwargs[name], length) for name in columns}
        return replace(made, kwargs=made.kwargs | resized)

    svi = subsample_svi(optax.adam(0.02))
    state = svi.init(jax.random.key(0), ragged(WAYS[-1], 0))
    return Epoch(svi, state, steps, ragged, fixed)


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
    first = minibatch(regression_data(64), rows={"n": None})
    return svi, svi.init(jax.random.key(0), first)


def synthetic(steps: int) -> Epoch:
    """Take batches of as many sizes as there are steps, from 33 to 1,024 rows."""
    sizes = np.linspace(33, LARGEST, steps).astype(int)
    np.random.default_rng(0).shuffle(sizes)
    x, y = regression_data(LARGEST)

    def ragged(way: Way, number: int) -> Minibatch:
        size, capacity = sizes[number], way.capacity({"n": LARGEST})
        return minibatch((x[:size], y[:size]), rows={"n": None}, capacity=capacity)

    mean = sum(sizes) // steps
    fixed = minibatch((x[:mean], y[:mean]), rows={"n": None})
    return Epoch(*regression_svi(), steps, ragged, lambda number: fixed)


def steady(capacity: int, percent: int, rounds: int) -> Found:
    """Time a compiled step, unpadded and padded to a capacity."""
    count = capacity * percent // 100
    rows = regression_data(count)
    svi, state = regression_svi()
    steps = {
        "padded": minibatch(rows, rows={"n": None}, capacity=capacity),
        "unpadded": minibatch(rows, rows={"n": None}),
    }
    ways = {
        name: Steps(jitted(svi.update, []), state, [(jax.device_put(step),)])
        for name, step in steps.items()
    }
    agree({name: way()[1] for name, way in ways.items()})
    took = in_turns(ways, rounds)
    case = f"steady step, {capacity:,} rows, {percent} % of them real"
    milliseconds = took["padded"] * 1e3, took["unpadded"] * 1e3
    return Found([Row(case, "unpadded", "ms", *milliseconds)], {})


def cases(quick: bool) -> list[Case]:
    found = []
    ways = [("InstEval", insteval, 2 if quick else STEPS, 1.2)]
    if not quick:
        # Half of all rows are padding here, and a fixed size has none.
        ways.append(("64 sizes", synthetic, 64, None))
    for name, make, steps, target in ways:
        run = partial(epochs, make, name, steps, target, 1 if quick else 5)
        found.append(Case(f"epoch, {name}", run))
    for capacity in (256,) if quick else (256, 65_536):
        for percent in (50,) if quick else (50, 75, 100):
            run = partial(steady, capacity, percent, 20 if quick else 300)
            found.append(Case(f"steady step, {capacity:,} rows, {percent} %", run))
    return found


def draw(series: dict[str, Any], folder: Path) -> None:
    """Draw how the seconds of a first epoch add up."""
    figure, axes = subplots(1, len(series))
    for ax, (name, clocks) in zip(axes, series.items(), strict=True):
        for look, (way, clock) in zip(LOOKS, clocks.items(), strict=True):
            steps = np.arange(1, len(clock) + 1)
            every = max(len(clock) // 8, 1)
            ax.semilogy(steps, clock, label=way, markevery=every, **look)
        ax.set(title=name, xlabel="step of the first epoch")
        ax.set_yticks([1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"])
        ax.minorticks_off()
    axes[0].sharey(axes[-1])
    axes[0].set_ylabel("time, with compilation (s)")
    lines = axes[0].get_lines()
    figure.legend(handles=lines, loc="outside upper center", ncols=4, fontsize=9)
    save(figure, folder / "ragged.png")
