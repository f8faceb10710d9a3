"""Row-wise steps against dense ones: time and memory against N, and what they reach."""

import time
from functools import partial
from itertools import cycle
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
from numpyro_dynamic_subsample.__main__ import load, shuffled

from .insteval import STEPS, deviation, fit
from .pairs import Case, Found, Row, Steps, agree, in_turns
from .pictures import LOOKS, save, subplots

WAYS = {"row-wise": True, "dense": False}
BATCH = 256
NOISE = 0.5  # standard deviation of an observation


def conjugate(rows: int, y: Any) -> None:
    """Observe every latent once; rows are independent, so the guide can be exact."""
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


class Compiled(NamedTuple):
    """A compiled step on pinned rows, and how many bytes it takes besides its state."""

    steps: Steps
    temporary: int


def compiled(rows: int, rowwise: bool) -> Compiled:
    svi = conjugate_svi(rows, optax.adam(0.01), rowwise)
    y = observations(rows)
    draw = np.random.default_rng(1)
    # Enough batches that their rows are not in the processor's cache already.
    indices = [draw.integers(0, rows, BATCH, dtype="int32") for _ in range(64)]
    batches = [(jnp.asarray(y[own]), jnp.asarray(own)) for own in indices]

    def update(state: Any, y: Any, own: Any) -> Any:
        return svi.update(state, minibatch(y, rows={"rows": own}))

    state = svi.init(
        jax.random.key(0), minibatch(batches[0][0], rows={"rows": indices[0]})
    )
    step = jax.jit(update, donate_argnums=0).lower(state, *batches[0]).compile()
    memory = step.memory_analysis()
    assert memory is not None
    return Compiled(Steps(step, state, batches), memory.temp_size_in_bytes)


def against_size(sizes: list[int], rounds: int) -> Found:
    """Time steps in turns for all sizes, and check that losses begin alike."""
    took: dict[str, list[np.ndarray]] = {}
    temporary: dict[str, list[int]] = {}
    first: dict[str, list[float]] = {}
    for way, rowwise in WAYS.items():
        steps = {rows: compiled(rows, rowwise) for rows in sizes}
        first[way] = [float(steps[rows].steps()[1]) for rows in sizes]
        # Dense steps are slow enough to need fewer.
        fewer = rounds if rowwise else max(rounds // 10, 3)
        of_way = in_turns({str(n): s.steps for n, s in steps.items()}, fewer)
        took[way] = [of_way[str(rows)] * 1e3 for rows in sizes]
        temporary[way] = [steps[rows].temporary for rows in sizes]
    agree(first)
    rows = [
        Row(f"step, N = {n:,}", "dense step", "ms", ours, other)
        for n, ours, other in zip(sizes, *took.values(), strict=True)
    ]
    ends = f"row-wise at N = {sizes[-1]:,}", f"row-wise at N = {sizes[0]:,}"
    ours = took["row-wise"]
    rows.append(Row(*ends, "ms", ours[-1], ours[0], 1.5))
    kib = [of_size / 1024 for of_size in temporary["row-wise"]]
    case = f"temporary memory, {ends[0]}"
    rows.append(Row(case, ends[1], "KiB", kib[-1], kib[0], 1.0))
    dense = temporary["dense"][-1] / 1024
    rows.append(Row(case, "dense step", "KiB", kib[-1], dense))
    medians = {way: np.median(of_way, 1).tolist() for way, of_way in took.items()}
    series = {"N": sizes, "ms": medians, "bytes": temporary}
    return Found(rows, {"step against N": series})


class Course(NamedTuple):
    """How far a fit was from the truth, and when."""

    after_steps: float
    seconds: float  # that these steps took
    in_the_end: float


def nats_a_row(params: dict[str, Any], y: jax.Array) -> jax.Array:
    """Return the divergence of the guide from the posterior, per row."""
    variance = 1 / (1 + 1 / NOISE**2)
    apart = (params["z_auto_loc"] - variance / NOISE**2 * y) ** 2
    spread = params["z_auto_scale"] ** 2 / variance
    return jnp.mean(apart / variance + spread - 1 - jnp.log(spread)) / 2


def shuffled_parts(rows: int, batch: int) -> np.ndarray:
    """Return the rows of each step of an epoch."""
    order = np.random.default_rng(2).permutation(rows).astype("int32")
    return order.reshape(-1, batch)


def course(
    rowwise: bool, optimizer: Any, parts: np.ndarray, epochs: int, budget: float = 0.0
) -> Course:
    """Take some epochs of steps, and more for as long as the budget lasts.

    Parts are the rows of each step of an epoch.
    """
    rows = parts.size
    y = jnp.asarray(observations(rows))
    svi = conjugate_svi(rows, optimizer, rowwise)
    distance = jax.jit(nats_a_row)

    def update(state: Any, own: Any) -> Any:
        return svi.update(state, minibatch(y[own], rows={"rows": own}))

    # A tenth of an epoch at once, so that calls cost nothing beside the steps.
    chunks = [jnp.asarray(chunk) for chunk in np.split(parts, 10)]
    own = chunks[0][0]
    state = svi.init(jax.random.key(0), minibatch(y[own], rows={"rows": own}))
    scan = jax.jit(partial(jax.lax.scan, update), donate_argnums=0)
    run = scan.lower(state, chunks[0]).compile()
    seconds = 0.0
    after_steps, in_time = None, 0.0
    for done, chunk in enumerate(cycle(chunks), 1):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(run(state, chunk))
        seconds += time.perf_counter() - started
        if done == epochs * len(chunks):
            after_steps, in_time = float(distance(svi.get_params(state), y)), seconds
        if after_steps is not None and seconds >= budget:
            in_the_end = float(distance(svi.get_params(state), y))
            return Course(after_steps, in_time, in_the_end)
    raise AssertionError("an endless cycle has ended")


def equal_terms(rows: int, batch: int, epochs: int, rates: list[float]) -> Found:
    """Take equal steps, then row-wise ones for as long as the dense ones took."""
    parts = shuffled_parts(rows, batch)
    dense = [course(False, optax.adam(rate), parts, epochs) for rate in rates]
    budget = min(fit.seconds for fit in dense)
    rowwise = [course(True, optax.adam(rate), parts, epochs, budget) for rate in rates]

    case = f"Adam, N = {rows:,}, batch {batch:,}"
    against, unit = "dense Adam, equal", "nats a row"
    found = []
    for terms, reached in (
        (f"{epochs * len(parts):,} steps", "after_steps"),
        (f"{budget:.2g} s", "in_the_end"),
    ):
        ours, other = (
            min(
                (getattr(fit, reached), rate)
                for fit, rate in zip(fits, rates, strict=True)
            )
            for fits in (rowwise, dense)
        )
        note = f"best step sizes {ours[1]} and {other[1]} of {rates}"
        label = f"{case}, distance from the posterior after {terms}"
        found.append(Row(label, against, unit, ours[0], other[0], None, note))
    values = min(fit.seconds for fit in rowwise), budget
    label = f"{case}, time of {epochs * len(parts):,} steps"
    found.append(Row(label, against, "s", *values))
    return Found(found, {})


def decaying(steps: int) -> optax.GradientTransformation:
    """Make an optimizer for the parameters of rows.

    Its short memory of squares (b2) is for rows whose first step comes late: Adam
    corrects its moments by one count of steps for all rows, and makes the steps after
    the first gradients of such rows up to six times as long with the usual memory.
    """
    return optax.adam(optax.exponential_decay(0.2, steps, 0.01), b2=0.99)


def step_sizes(batches: dict[int, int], epochs: int) -> Found:
    """Let the step size decay, or not, in small and large data sets.

    For each number of rows, how many of them are in a batch.
    """
    found, reached = [], {}
    for rows, batch in batches.items():
        parts = shuffled_parts(rows, batch)
        ours = course(True, decaying(epochs * len(parts)), parts, epochs).after_steps
        other = course(True, optax.adam(0.3), parts, epochs).after_steps
        case = f"Adam, N = {rows:,}, {epochs} epochs, step size decaying from 0.2"
        label = f"{case}, distance from the posterior"
        found.append(Row(label, "constant 0.3", "nats a row", ours, other))
        reached[label] = ours
    (small, of_small), (large, of_large) = reached.items()
    found.append(Row(large, small, "nats a row", of_large, of_small, 1.1))
    return Found(found, {})


def insteval(epochs: int, rates: list[float]) -> Found:
    """Fit InstEval with both, for equal steps; with 2,972 rows these take as long."""
    ratings = load()
    orders = np.array([shuffled(epoch, 0) for epoch in range(epochs)])
    best: dict[str, tuple[float, float, float]] = {}
    for way, rowwise in WAYS.items():
        of_way = []
        for rate in rates:
            schedule = optax.exponential_decay(rate, epochs * STEPS, 0.01)
            *_, last = fit(ratings, orders, optax.adam(schedule), rowwise=rowwise)
            of_way.append((deviation(last.figures), rate, last.seconds))
        best[way] = min(of_way)
    (ours, rate, seconds), (other, dense_rate, dense_seconds) = best.values()
    note = f"best step sizes {rate} and {dense_rate}"
    case = f"Adam, InstEval, {epochs} epochs"
    label = f"{case}, worst of the four figures"
    found = [
        Row(label, "dense Adam", "% off", ours, other, None, note),
        Row(f"{case}, time", "dense Adam", "s", seconds, dense_seconds),
    ]
    return Found(found, {})


def cases(quick: bool) -> list[Case]:
    sizes = [1000, 10_000] if quick else [10_000, 100_000, 1_000_000, 10_000_000]
    rounds = 50 if quick else 500
    found = [Case("step against N", partial(against_size, sizes, rounds))]
    if quick:
        run = partial(equal_terms, 10_000, 1000, 2, [0.1])
        found.append(Case("Adam, conjugate model", run))
        run = partial(step_sizes, {1000: 100, 10_000: 1000}, 5)
        return [*found, Case("step sizes of rows", run)]
    run = partial(equal_terms, 1_000_000, 4000, 6, [0.01, 0.03, 0.1, 0.3])
    found.append(Case("Adam, conjugate model", run))
    run = partial(step_sizes, {20_000: 250, 1_000_000: 4000}, 100)
    found.append(Case("step sizes of rows", run))
    run = partial(insteval, 150, [0.01, 0.02, 0.05])
    return [*found, Case("Adam, InstEval", run)]


def draw(series: dict[str, Any], folder: Path) -> None:
    """Draw time and temporary memory of a step against the rows of the plate."""
    found = series["step against N"]
    figure, (left, right) = subplots(1, 2)
    for look, way in zip(LOOKS[:2], reversed(WAYS), strict=True):
        left.loglog(found["N"], found["ms"][way], label=way, **look)
        kib = np.array(found["bytes"][way]) / 1024
        right.loglog(found["N"], kib, label=way, **look)
    left.set(xlabel="rows of the plate, N", ylabel="time of a step (ms)")
    right.set(xlabel="rows of the plate, N", ylabel="temporary memory (KiB)")
    for ax in (left, right):
        ax.yaxis.set_major_formatter("{x:,g}")
    left.legend()
    save(figure, folder / "rows.png")
