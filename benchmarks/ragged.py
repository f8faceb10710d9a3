"""What batches of ever new sizes cost: compilation, and the padding that avoids it."""

import time
from collections.abc import Iterable, Iterator
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

from .insteval import load, parts_of, subsample_svi
from .pairs import Row, Steps, agree, in_turns
from .pictures import LOOKS, save, series, subplots

FEATURES = 32
PER_SIZE, POWERS, ONE = (
    "a compilation per size",
    "power-of-two buckets",
    "one compilation",
)


class Epoch(NamedTuple):
    clock: list[float]  # seconds after each step
    losses: np.ndarray
    compilations: int


def epoch(svi: SubsampleSVI, state: Any, batches: Iterable[Minibatch]) -> Epoch:
    """Take steps on batches that are made on the way, with nothing compiled before."""
    jax.clear_caches()
    compilations = 0

    @jax.jit
    def step(state: Any, batch: Minibatch) -> Any:
        nonlocal compilations
        compilations += 1  # when JAX traces
        return svi.update(state, batch)

    losses, clock = [], []
    started = time.perf_counter()
    for batch in batches:
        state, loss = jax.block_until_ready(step(state, batch))
        losses.append(loss)
        clock.append(time.perf_counter() - started)
    return Epoch(clock, np.array(losses), compilations)


def first_epoch(quick: bool) -> Iterator[Row]:
    ratings = load()
    # The last batch, of fewer students, is among the steps of a short run, too.
    parts = parts_of(0)[-2 if quick else 0 :]
    most = ratings.capacity(parts)
    svi = subsample_svi(optax.adam(0.02))
    state = svi.init(jax.random.key(0), ratings(parts[0], capacity=most))
    ways = {PER_SIZE: None, POWERS: "powers of two", ONE: most}
    found = {
        way: epoch(svi, state, (ratings(part, capacity=own) for part in parts))
        for way, own in ways.items()
    }
    agree({way: own.losses for way, own in found.items()})
    clocks = {way: own.clock for way, own in found.items()}
    ours = found[ONE]
    for way in (PER_SIZE, POWERS):
        note = f"{ours.compilations} and {found[way].compilations} compilations"
        took = ours.clock[-1], found[way].clock[-1]
        yield Row("first epoch, InstEval", way, "s", *took, None, note, clocks)


def regression(x: Any, y: Any) -> None:
    """Regress y on x; its cost is that of its rows, which padding adds to."""
    prior = dist.Normal(0, jnp.ones(FEATURES)).to_event(1)
    weights: Any = numpyro.sample("weights", prior)
    with numpyro.plate("n", 1_000_000, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(x @ weights, 1), obs=y)


def padding(capacity: int, rounds: int) -> Row:
    """Time a compiled step on as many rows of padding as real ones."""
    draw, count = np.random.default_rng(0), capacity // 2
    x = draw.normal(size=(count, FEATURES)).astype("float32")
    y = x @ draw.normal(size=FEATURES).astype("float32")
    svi = SubsampleSVI(
        regression, AutoNormal(regression), optax.adam(0.01), Trace_ELBO()
    )
    ways = {}
    for way, own in (("padded", capacity), ("unpadded", None)):
        batch = jax.device_put(minibatch(x, y, rows={"n": None}, capacity=own))
        state = svi.init(jax.random.key(0), batch)
        ways[way] = Steps(jax.jit(svi.update), state, [(batch,)])
    agree({way: step()[1] for way, step in ways.items()})
    case = f"step, {capacity:,} rows, half of them padding"
    return Row(case, "unpadded", "s", *in_turns(ways, rounds).values())


def cases(quick: bool) -> Iterator[Row]:
    yield from first_epoch(quick)
    for capacity in (256,) if quick else (256, 65_536):
        yield padding(capacity, 20 if quick else 300)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw how the seconds of a first epoch add up."""
    figure, (ax,) = subplots(1)
    for look, (way, clock) in zip(LOOKS, series(rows).items(), strict=False):
        ax.semilogy(np.arange(1, len(clock) + 1), clock, label=way, **look)
    ax.set(
        title="First epoch of InstEval: batches of 24 sizes",
        xlabel="step",
        ylabel="time since the start,\nwith compilation (s)",
    )
    ax.set_yticks([1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"])
    ax.minorticks_off()
    figure.legend(loc="outside right center")
    save(figure, folder / "ragged.png")
