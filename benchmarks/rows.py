"""Row-wise steps: against dense ones as the plate grows, and what their recipe reaches.

The posterior is known, and the guide can be exact.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, minibatch

from .pairs import Row, Series, Steps, agree, in_turns
from .pictures import LOOKS, save, subplots

WAYS = {"row-wise": True, "dense": False}
BATCH = 256
NOISE = 0.5  # standard deviation of an observation
MEMORY = "temporary memory of a step"


def conjugate(rows: int, y: Any) -> None:
    """Observe every latent once."""
    with numpyro.plate("rows", rows, subsample_size=len(y)):
        z: Any = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y)


def conjugate_svi(rows: int, optimizer: Any, rowwise: bool) -> SubsampleSVI:
    model = partial(conjugate, rows)
    guide = AutoNormal(model)
    loss = TraceMeanField_ELBO()
    return SubsampleSVI(model, guide, optimizer, loss, rowwise=rowwise)


def observations(rows: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.normal(0, np.hypot(1, NOISE), rows).astype("float32")


class Problem(NamedTuple):
    update: Callable
    state: Any
    batches: list[tuple]


def problem(rows: int, optimizer: Any, rowwise: bool) -> Problem:
    """Make a step, and batches of random rows."""
    svi, y = conjugate_svi(rows, optimizer, rowwise), observations(rows)
    draw = np.random.default_rng(1)
    # Enough batches that their rows are not in the processor's cache already.
    indices = [draw.integers(0, rows, BATCH, dtype="int32") for _ in range(64)]
    batches = [(jnp.asarray(y[own]), jnp.asarray(own)) for own in indices]

    def update(state: Any, y: Any, own: Any) -> Any:
        return svi.update(state, minibatch(y, rows={"rows": own}))

    first = minibatch(batches[0][0], rows={"rows": indices[0]})
    return Problem(update, svi.init(jax.random.key(0), first), batches)


def against_size(sizes: list[int], rounds: int) -> Iterator[Row | Series]:
    """Time steps in turns for all sizes, and check that losses begin alike."""
    took: dict[str, list[np.ndarray]] = {}
    memory: dict[str, list[int]] = {}
    first: dict[str, list[float]] = {}
    for way, rowwise in WAYS.items():
        steps, memory[way] = {}, []
        for rows in sizes:
            update, state, batches = problem(rows, optax.adam(0.01), rowwise)
            jitted = jax.jit(update, donate_argnums=0)
            compiled = jitted.lower(state, *batches[0]).compile()
            memory[way].append(compiled.memory_analysis().temp_size_in_bytes)
            steps[str(rows)] = Steps(compiled, state, batches)
        first[way] = [float(step()[1]) for step in steps.values()]
        # Dense steps are slow enough to need fewer.
        of_way = in_turns(steps, rounds if rowwise else max(rounds // 10, 3))
        took[way] = list(of_way.values())
    agree(first)
    medians = {way: np.median(of_way, 1).tolist() for way, of_way in took.items()}
    yield {"rows": sizes, "seconds": medians, "bytes": memory}
    for size, ours, other in zip(sizes, *took.values(), strict=True):
        yield Row(f"step, N = {size:,}", "dense", "s", ours, other)
    ours, dense = memory["row-wise"], memory["dense"]
    largest, smallest = f"N = {sizes[-1]:,}", f"row-wise, N = {sizes[0]:,}"
    times = took["row-wise"]
    yield Row(f"step, {largest}", smallest, "s", times[-1], times[0], 1.5)
    yield Row(f"{MEMORY}, {largest}", smallest, "bytes", ours[-1], ours[0], 1.0)
    yield Row(f"{MEMORY}, {largest}", "dense", "bytes", ours[-1], dense[-1])


def distance(rows: int, batch: int, epochs: int, optimizer: Any) -> float:
    """Fit with row-wise steps; the divergence from the posterior, in nats a row."""
    y = observations(rows)
    order = np.random.default_rng(2).permutation(rows).astype("int32")
    batches = [
        minibatch(y[own], rows={"rows": own}) for own in order.reshape(-1, batch)
    ]
    svi = conjugate_svi(rows, optimizer, True)
    result = svi.fit(jax.random.key(0), batches, epochs, progress_bar=False)
    variance = 1 / (1 + 1 / NOISE**2)
    apart = (result.params["z_auto_loc"] - variance / NOISE**2 * y) ** 2
    spread = result.params["z_auto_scale"] ** 2 / variance
    return float(jnp.mean(apart / variance + spread - 1 - jnp.log(spread)) / 2)


def recipe(batches: dict[int, int], lengths: tuple[int, ...]) -> Iterator[Row]:
    """Let the step size decay as in the README, or not.

    For each number of rows, how many of them are in a batch.
    """
    reached = {}
    for rows, batch in batches.items():
        constant = distance(rows, batch, lengths[-1], optax.adam(0.3))
        for epochs in lengths:
            # A short memory of squares (b2) is for rows whose first step comes late:
            # Adam corrects its moments by one count of steps for all rows, and makes
            # the first steps of such rows up to six times as long with the usual one.
            rate = optax.exponential_decay(0.3, epochs * rows // batch, 0.01)
            ours = distance(rows, batch, epochs, optax.adam(rate, b2=0.99))
            case = f"recipe, N = {rows:,}, {epochs} epochs"
            against = f"constant step size, {lengths[-1]} epochs"
            yield Row(case, against, "nats a row", ours, constant)
        reached[case] = ours
    (small, of_small), (large, of_large) = reached.items()
    yield Row(large, small, "nats a row", of_large, of_small, 1.1)


def cases(quick: bool) -> Iterator[Row | Series]:
    if quick:
        yield from against_size([1000, 10_000], 50)
        yield from recipe({1000: 100, 10_000: 1000}, (5,))
    else:
        yield from against_size([10_000, 100_000, 1_000_000, 10_000_000], 500)
        yield from recipe({20_000: 250, 1_000_000: 4000}, (50, 100))


def draw(found: Series, folder: Path) -> None:
    """Draw time and temporary memory of a step against the rows of the plate."""
    figure, (left, right) = subplots(2)
    for look, way in zip(LOOKS, reversed(WAYS), strict=False):
        milliseconds = np.array(found["seconds"][way]) * 1e3
        left.loglog(found["rows"], milliseconds, label=way, **look)
        mebibytes = np.array(found["bytes"][way]) / 2**20
        right.loglog(found["rows"], mebibytes, label=way, **look)
    left.set(title="Time of a step", ylabel="time (ms)")
    right.set(title=MEMORY.capitalize(), ylabel="memory (MiB)")
    for ax in (left, right):
        ax.set(xlabel="rows of the plate")
        ax.yaxis.set_major_formatter("{x:,g}")
    left.legend()
    save(figure, folder / "rows.png")
