"""An epoch and a row-wise step, against the same estimator in JAX, without NumPyro."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import norm

from numpyro_dynamic_subsample import Minibatch, minibatch
from numpyro_dynamic_subsample.__main__ import STUDENTS, cut, load

from .insteval import BATCH_SIZE, STEPS, subsample_svi
from .pairs import Case, Found, Row, Steps, agree, in_turns
from .rows import BATCH, NOISE, conjugate_svi, observations

AGAINST = "JAX by hand"
ADAM = optax.adam(0.01)


class State(NamedTuple):
    params: dict[str, jax.Array]  # unconstrained, as SVI's
    adam: Any
    key: jax.Array


class Problem(NamedTuple):
    """A program of both sides, with the state that both start from."""

    ours: Callable
    by_hand: Callable
    state: Any  # of SVI
    batches: list[tuple]


def draw_keys(key: jax.Array, count: int) -> tuple[jax.Array, list[jax.Array]]:
    """Return the key of the next step, and those of the guide's sites in this one."""
    key, of_step = jax.random.split(key)
    _, of_guide = jax.random.split(of_step)
    keys = []
    for _ in range(1 + count):  # the plate has one, which pinned rows do not need
        of_guide, own = jax.random.split(of_guide)
        keys.append(own)
    return key, keys[1:]


def normal(params: dict[str, jax.Array], site: str) -> tuple[jax.Array, jax.Array]:
    scale = jax.nn.softplus(params[f"{site}_auto_scale"])
    return params[f"{site}_auto_loc"], scale


def divergence(q: tuple, loc: Any, scale: Any) -> jax.Array:
    """Return that of a normal distribution from another."""
    ratio = (q[1] / scale) ** 2
    return 0.5 * (ratio + ((q[0] - loc) / scale) ** 2 - 1 - jnp.log(ratio))


def ratings_loss(
    params: dict[str, jax.Array], batch: Minibatch, keys: Any
) -> jax.Array:
    names = "rows", "students", "student", "lecturer", "y"
    rows, students, student_of, lecturer_of, y = map(batch.kwargs.get, names)

    def draw(site: str, rows: Any = slice(None)) -> tuple[tuple, jax.Array]:
        loc, scale = (leaf[rows] for leaf in normal(params, site))
        return (loc, scale), loc + scale * jax.random.normal(next(keys), loc.shape)

    loss = jnp.zeros(())
    value = {}
    q, value["intercept"] = draw("intercept", ...)
    loss += divergence(q, 3.0, 2.0)
    for site in ("sd_student", "sd_lecturer", "sd_residual"):
        q, log = draw(site, ...)
        value[site] = jnp.exp(log)
        prior = norm.logpdf(value[site], 0.0, 2.0) + jnp.log(2.0)
        loss += norm.logpdf(log, *q) - log - prior
    q, lecturer = draw("lecturer")
    loss += divergence(q, value["intercept"], value["sd_lecturer"]).sum()
    q, student = draw("student", rows)
    apart = divergence(q, 0.0, value["sd_student"])
    mean = lecturer[lecturer_of] + student[student_of]
    each = norm.logpdf(y, mean, value["sd_residual"])
    real = jnp.arange(len(rows)) < batch.counts["students"]
    real_ratings = jnp.arange(len(y)) < batch.counts["ratings"]
    of_batch = jnp.where(real, apart, 0).sum() - jnp.where(real_ratings, each, 0).sum()
    return loss + STUDENTS / students * of_batch


def ratings_step(state: State, batch: Minibatch) -> tuple[State, jax.Array]:
    key, keys = draw_keys(state.key, 6)
    loss = partial(ratings_loss, batch=batch, keys=iter(keys))
    value, slope = jax.value_and_grad(loss)(state.params)
    updates, adam = ADAM.update(slope, state.adam, state.params)
    return State(optax.apply_updates(state.params, updates), adam, key), value


def epoch() -> Problem:
    """Scan over the padded batches of InstEval."""
    ratings = load()
    order = np.random.default_rng(0).permutation(STUDENTS)
    parts = cut(order, BATCH_SIZE)
    capacity = ratings.capacity(parts)
    steps = [ratings(part, capacity=capacity) for part in parts]
    svi = subsample_svi(ADAM)
    state = svi.init(jax.random.key(0), steps[0])

    def ours(state: Any, steps: Minibatch) -> Any:
        return jax.lax.scan(svi.update, state, steps)

    def by_hand(state: State, steps: Minibatch) -> Any:
        return jax.lax.scan(ratings_step, state, steps)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    return Problem(ours, by_hand, state, [(stacked,)])


def row_loss(params: Any, y: Any, places: Any, key: Any) -> jax.Array:
    """Observe each latent once, with the rows of the parameters that are there."""
    q = loc, scale = tuple(leaf[places] for leaf in normal(params, "z"))
    z = loc + scale * jax.random.normal(key, loc.shape)
    return (divergence(q, 0.0, 1.0) - norm.logpdf(y, z, NOISE)).sum()


def row_step(rows: int, state: State, y: Any, own: Any) -> tuple[State, jax.Array]:
    key, (of_z,) = draw_keys(state.key, 1)
    unique, places = jnp.unique(
        own, return_inverse=True, size=len(own), fill_value=rows
    )
    everything = state.params, state.adam
    params, adam = jax.tree.map(
        lambda leaf: leaf.at[unique].get(mode="clip") if leaf.ndim else leaf, everything
    )

    def loss(params: Any) -> jax.Array:
        return rows / len(own) * row_loss(params, y, places, of_z)

    value, slope = jax.value_and_grad(loss)(params)
    updates, adam = ADAM.update(slope, adam, params)
    params, adam = jax.tree.map(
        lambda leaf, new: leaf.at[unique].set(new, mode="drop") if leaf.ndim else new,
        everything,
        (optax.apply_updates(params, updates), adam),
    )
    return State(params, adam, key), value


def row_wise(rows: int) -> Problem:
    svi = conjugate_svi(rows, ADAM, True)
    y = observations(rows)
    draw = np.random.default_rng(1)
    indices = [draw.integers(0, rows, BATCH, dtype="int32") for _ in range(64)]
    batches = [(jnp.asarray(y[own]), jnp.asarray(own)) for own in indices]
    state = svi.init(
        jax.random.key(0), minibatch(batches[0][0], rows={"rows": indices[0]})
    )

    def ours(state: Any, y: Any, own: Any) -> Any:
        return svi.update(state, minibatch(y, rows={"rows": own}))

    return Problem(ours, partial(row_step, rows), state, batches)


def compare(
    make: Callable[[], Problem], name: str, rounds: int, times: int, warm_up: int
) -> Found:
    """Compile both some times, and run them in turns."""
    problem = make()
    (_, (params, adam)), key = problem.state.optim_state, problem.state.rng_key
    sides = {
        "ours": (problem.ours, problem.state),
        "by hand": (problem.by_hand, State(params, adam, key)),
    }
    traced: dict[str, list[float]] = {side: [] for side in sides}
    compiled: dict[str, Any] = {}

    def trace(side: str) -> Any:
        # A function that JAX has not seen.
        run, state = partial(sides[side][0]), sides[side][1]
        return jax.jit(run, donate_argnums=0).lower(state, *problem.batches[0])

    def compile_anew(side: str) -> None:
        started = time.perf_counter()
        lowered = trace(side)
        traced[side].append(time.perf_counter() - started)
        compiled[side] = lowered.compile()

    first = in_turns(
        {side: partial(compile_anew, side) for side in sides}, times, warm_up
    )
    ways = {
        side: Steps(compiled[side], jax.tree.map(jnp.copy, state), problem.batches)
        for side, (_, state) in sides.items()
    }
    for _ in range(3):
        apart = agree({side: way()[1] for side, way in ways.items()})
    took = in_turns(ways, rounds)
    note = f"losses agree to {apart:.0e}"

    def row(what: str, target: float | None, of_side: Any, note: str = "") -> Row:
        milliseconds = (1e3 * np.array(of_side[side]) for side in sides)
        return Row(f"{what}, {name}", AGAINST, "ms", *milliseconds, target, note)

    traced = {side: of_side[warm_up:] for side, of_side in traced.items()}
    compiling = {side: first[side] - traced[side] for side in sides}
    return Found(
        [
            row("run", 1.05, took, note),
            row("trace and lower", None, traced),
            row("compile", 1.3, compiling),
        ],
        {},
    )


def cases(quick: bool) -> list[Case]:
    # Tracing for the first time fills caches of JAX, and is no measure.
    measured = (20, 1, 0) if quick else (500, 7, 1)
    problems = [(f"InstEval, an epoch of {STEPS} steps", epoch)]
    for rows in (10_000,) if quick else (10_000, 1_000_000):
        problems.append((f"row-wise step, N = {rows:,}", partial(row_wise, rows)))
    return [
        Case(name, partial(compare, make, name, *measured)) for name, make in problems
    ]
