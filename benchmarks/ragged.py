"""What batches of ever new sizes cost: compilation, which padding avoids."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI

from .insteval import load, parts_of, subsample_svi
from .pairs import Row, Series, agree
from .pictures import LOOKS, save, subplots

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


def cases(quick: bool) -> Iterator[Row | Series]:
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
    yield {way: own.clock for way, own in found.items()}
    ours = found[ONE]
    for way in (PER_SIZE, POWERS):
        note = f"{ours.compilations} and {found[way].compilations} compilations"
        took = ours.clock[-1], found[way].clock[-1]
        yield Row("first epoch, InstEval", way, "s", *took, None, note)


def draw(clocks: Series, folder: Path) -> None:
    """Draw how the seconds of a first epoch add up."""
    figure, (ax,) = subplots(1)
    for look, (way, clock) in zip(LOOKS, clocks.items(), strict=True):
        ax.semilogy(np.arange(1, len(clock) + 1), clock, label=way, **look)
    ax.set(
        title="First epoch of InstEval, in batches of many sizes",
        xlabel="step",
        ylabel="time since the start,\nwith compilation (s)",
    )
    ax.set_yticks([1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"])
    ax.minorticks_off()
    ax.legend(loc="center")
    save(figure, folder / "ragged.png")
