"""Epochs of ``fit`` beside those of one scan, whose batches wait on the device.

Epochs of each way follow one another in blocks of ten, and blocks take turns.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import Minibatch, SubsampleSVI, minibatch

from .insteval import load, parts_of, subsample_svi
from .pairs import Row, Series, agree
from .pictures import LOOKS, save, subplots
from .steps import ADAM, KEY, ROWS, small, small_data

SIZE = 64  # of a batch of the small model
BLOCK = 10  # epochs
FIT, SCAN, STEP = "fit", "one scan, batches on the device", "a step at a time"


class Loop(NamedTuple):
    svi: SubsampleSVI
    of_epoch: Callable[[int], Iterable[Minibatch]]  # which repeat after a block

    def stacked(self) -> list[Minibatch]:
        """Return the batches of each epoch of a block, on the device."""
        epochs = [list(self.of_epoch(epoch)) for epoch in range(BLOCK)]
        return [
            jax.tree.map(lambda *own: jnp.asarray(np.stack(own)), *batches)
            for batches in epochs
        ]

    def scan(self) -> Callable:
        return jax.jit(partial(jax.lax.scan, self.svi.update), donate_argnums=0)

    def init(self) -> Any:
        return self.svi.init(KEY, next(iter(self.of_epoch(0))))


def small_model() -> Loop:
    """Take small batches that wait in a list, so that the loop itself shows."""
    y = small_data()
    order = np.random.default_rng(1).permutation(ROWS)
    made = [
        minibatch(y[rows], rows={"rows": rows}, capacity=SIZE)
        for rows in np.split(order, range(SIZE, ROWS, SIZE))
    ]
    svi = SubsampleSVI(small, AutoNormal(small), ADAM, Trace_ELBO())
    return Loop(svi, lambda epoch: made)


def insteval() -> Loop:
    """Shuffle anew for each epoch, and make batches on the way, as the demo does."""
    ratings, parts = load(), [parts_of(epoch) for epoch in range(BLOCK)]
    most = ratings.capacity(part for of_epoch in parts for part in of_epoch)
    make = partial(ratings, capacity=most)
    svi = subsample_svi(optax.adam(0.005))
    return Loop(svi, lambda epoch: map(make, parts[epoch % BLOCK]))


def made_before() -> Loop:
    svi, of_epoch = insteval()
    made = [list(of_epoch(epoch)) for epoch in range(BLOCK)]
    return Loop(svi, lambda epoch: made[epoch % BLOCK])


def epochs(
    case: str,
    loop: Loop,
    blocks: int,
    aim: float | None = None,
    together: int | None = None,
) -> Row:
    """Let blocks of a scan run in the callback of ``fit``."""
    stacks, scan, state = loop.stacked(), loop.scan(), loop.init()
    times: dict[str, list[float]] = {FIT: [], SCAN: []}
    scanned = []
    began = time.perf_counter()

    def lap(way: str) -> None:
        nonlocal began
        now = time.perf_counter()
        times[way].append((now - began) / BLOCK)
        began = now

    def callback(epoch: int, *_: Any) -> None:
        nonlocal state
        if (epoch + 1) % BLOCK:
            return
        lap(FIT)
        for stacked in stacks:
            state, losses = scan(state, stacked)
            scanned.append(np.asarray(losses))
        lap(SCAN)

    # The bar is part of what is timed, and would cut through the table.
    with redirect_stderr(io.StringIO()):
        result = loop.svi.fit(
            KEY,
            loop.of_epoch,
            BLOCK * (1 + blocks),  # the first block compiles
            callback=callback,
            steps_per_dispatch=together,
        )
    agree({FIT: result.losses, SCAN: np.concatenate(scanned)})
    took = (np.array(of_way[1:]) for of_way in times.values())
    return Row(f"epoch of fit, {case}", SCAN, "s", *took, aim)


class Clock(list[float]):
    def __call__(self) -> None:
        self.append(time.perf_counter())


def by_fit(loop: Loop, epochs: int, lap: Clock) -> np.ndarray:
    lap()
    with redirect_stderr(io.StringIO()):
        result = loop.svi.fit(KEY, loop.of_epoch, epochs, callback=lambda *_: lap())
    return result.losses


def by_scan(loop: Loop, epochs: int, lap: Clock) -> np.ndarray:
    stacks, losses = loop.stacked(), []
    lap()
    scan, state = loop.scan(), loop.init()
    for epoch in range(epochs):
        state, of_epoch = scan(state, stacks[epoch % BLOCK])
        losses.append(np.asarray(of_epoch))
        lap()
    return np.concatenate(losses)


def by_steps(loop: Loop, epochs: int, lap: Clock) -> np.ndarray:
    losses = []
    lap()
    step, state = jax.jit(loop.svi.update, donate_argnums=0), loop.init()
    for epoch in range(epochs):
        for batch in loop.of_epoch(epoch):
            state, loss = step(state, batch)
            losses.append(loss)
        jax.block_until_ready(state)
        lap()
    return np.array(losses)


def whole_fits(count: int) -> Iterator[Row | Series]:
    """Fit InstEval as the demo does, from the same start in each way."""
    clocks: dict[str, list[float]] = {}
    losses = {}
    for way, run in ((FIT, by_fit), (SCAN, by_scan), (STEP, by_steps)):
        jax.clear_caches()
        loop = insteval()
        clock = Clock()
        losses[way] = run(loop, count, clock)
        clocks[way] = (np.array(clock[1:]) - clock[0]).tolist()
    agree(losses)
    weights = [len(part) for part in parts_of(0)]
    mean = np.average(losses[FIT].reshape(count, -1), 1, weights)
    later = {way: np.diff(clock) for way, clock in clocks.items()}
    for way in (SCAN, STEP):
        first = clocks[FIT][0], clocks[way][0]
        yield Row("first epoch, as the demo", way, "s", *first)
        yield Row("later epochs, as the demo", way, "s", later[FIT], later[way])
    yield {"seconds": clocks, "loss": mean.tolist()}


def cases(quick: bool) -> Iterator[Row | Series]:
    blocks = 1 if quick else 10
    if not quick:
        yield epochs("InstEval, batches made on the way", insteval(), blocks, 1.7)
        yield epochs("InstEval, batches made before", made_before(), blocks, 1.4)
    for count in (16,) if quick else (1, 4, 16, 64):
        case = f"small model, at most {count} steps at once"
        yield epochs(case, small_model(), blocks, None, count)
    yield from whole_fits(10 if quick else 30)


def draw(found: Series, folder: Path) -> None:
    """Draw the loss of epochs against time, without that of the first."""
    thousands = np.array(found["loss"]) / 1e3
    figure, (ax,) = subplots(1)
    for number, (way, clock) in enumerate(found["seconds"].items()):
        look = LOOKS[number] | {"markersize": 4, "zorder": 9 - number}
        ax.plot(np.array(clock) - clock[0], thousands, label=way, **look)
    ax.set(
        title="A fit of InstEval: all ways take the same steps",
        xlabel="time since the end of the first epoch, in which all is compiled (s)",
        ylabel="loss: negative ELBO,\nmean of an epoch (thousand nats)",
    )
    ax.legend()
    save(figure, folder / "fit.png")
