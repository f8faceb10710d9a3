"""An epoch and a row-wise step, against the same estimator in JAX, without NumPyro."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.stats import norm

from numpyro_dynamic_subsample import Minibatch

from .insteval import STEPS, STUDENTS, load, parts_of, subsample_svi
from .pairs import Row, Steps, agree, in_turns
from .rows import NOISE, Problem, problem

AGAINST = "JAX by hand"
ADAM = optax.adam(0.01)


class State(NamedTuple):
    params: dict[str, jax.Array]  # unconstrained, as SVI's
    adam: Any
    key: jax.Array


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


def ratings_loss(params: dict[str, jax.Array], batch: Minibatch, keys: Any) -> Any:
    names = "rows", "students", "student", "lecturer", "y"
    rows, students, student_of, lecturer_of, y = map(batch.kwargs.get, names)

    def draw(site: str, rows: Any = slice(None)) -> tuple[tuple, jax.Array]:
        loc, scale = (leaf[rows] for leaf in normal(params, site))
        return (loc, scale), loc + scale * jax.random.normal(next(keys), loc.shape)

    value = {}
    q, value["intercept"] = draw("intercept", ...)
    loss = divergence(q, 3.0, 2.0)
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
    ratings, parts = load(), parts_of(0)
    capacity = ratings.capacity(parts)
    steps = [ratings(part, capacity=capacity) for part in parts]
    svi = subsample_svi(ADAM)
    state = svi.init(jax.random.key(0), steps[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    return Problem(partial(jax.lax.scan, svi.update), state, [(stacked,)])


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


def compare(
    case: str, problem: Problem, by_hand: Callable, times: int, rounds: int
) -> Iterator[Row]:
    """Compile both some times, and run them in turns."""
    update, start, batches = problem
    _, (params, adam) = start.optim_state
    sides = {
        "ours": (update, start),
        "by hand": (by_hand, State(params, adam, start.rng_key)),
    }
    ways: dict[str, Steps] = {}

    def compile_anew(side: str) -> None:
        run, state = sides[side]
        # JAX has not seen a function that is made here.
        jitted = jax.jit(partial(run), donate_argnums=0)
        compiled = jitted.lower(state, *batches[0]).compile()
        ways[side] = Steps(compiled, jax.tree.map(jnp.copy, state), batches)

    # Tracing for the first time fills caches of JAX, and is no measure.
    calls = {side: partial(compile_anew, side) for side in sides}
    compiling = in_turns(calls, times, warm_up=1)
    for _ in range(3):
        agree({side: way()[1] for side, way in ways.items()})
    took = in_turns(ways, rounds)
    yield Row(case, AGAINST, "s", *took.values(), 1.05)
    yield Row(f"compilation, {case}", AGAINST, "s", *compiling.values(), 1.3)


def cases(quick: bool) -> Iterator[Row]:
    measured = (1, 20) if quick else (7, 500)
    scan = partial(jax.lax.scan, ratings_step)
    yield from compare(f"InstEval, an epoch of {STEPS} steps", epoch(), scan, *measured)
    for rows in (10_000,) if quick else (10_000, 1_000_000):
        ours, step = problem(rows, ADAM, True), partial(row_step, rows)
        yield from compare(f"row-wise step, N = {rows:,}", ours, step, *measured)
