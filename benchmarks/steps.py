"""A jitted step, and the first call at a new size, against plates by hand.

Both sides pin the rows of their batches, since plates by hand are wrong in an
``AutoGuideList`` otherwise.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.handlers import block, substitute
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, minibatch

from . import insteval
from .pairs import Row, Steps, agree, in_turns

AGAINST = "create_plates"
KEY = jax.random.key(0)
ADAM = optax.adam(0.01)
ROWS = 10_000
TABLE = {"users": 600, "items": 300}
FACTORS = 4


class Problem(NamedTuple):
    """A model, and what both sides need to fit it."""

    model: Callable
    create_plates: Callable  # a correct one
    guide: Callable
    sizes: dict[str, int]  # of the plates of which a batch holds some rows
    arguments: Callable[..., tuple]  # of the model, for rows of these plates
    along: Any = None
    loss: Any = Trace_ELBO()


class Side(NamedTuple):
    init: Callable
    step: Callable


def small(y: Any) -> None:
    mu: Any = numpyro.sample("mu", dist.Normal(0, 1))
    with small_plate(y):
        w: Any = numpyro.sample("w", dist.Normal(0, 1))
        z: Any = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z + w, 0.5), obs=y)


def small_plate(y: Any) -> Any:
    return numpyro.plate("rows", ROWS, subsample_size=len(y))


def small_data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=ROWS).astype("float32")


def guide_list(create_plates: Any = None) -> AutoGuideList:
    made = []

    # Made again for each part, they would use up another random key for each.
    def of_list(*args: Any) -> Any:
        made[:] = [create_plates(*args)]
        return made

    by_hand = create_plates is not None
    guide = AutoGuideList(small, create_plates=of_list if by_hand else None)
    of_part = (lambda *_: made) if by_hand else None
    for part, hidden in ((AutoNormal, ["w"]), (AutoDelta, ["mu", "z"])):
        guide.append(part(block(small, hide=hidden), create_plates=of_part))
    return guide


def factors(y: Any) -> None:
    """Factorise a matrix, of which a batch holds some rows and columns."""
    users, items = crossed_plates(y)
    noise: Any = numpyro.sample("noise", dist.LogNormal(0, 1))
    prior = dist.Normal(jnp.zeros(FACTORS), 1).to_event(1)
    with users:
        u: Any = numpyro.sample("u", prior)
    with items:
        v: Any = numpyro.sample("v", prior)
    with users, items:
        numpyro.sample("y", dist.Normal((u * v).sum(-1), noise), obs=y)


def crossed_plates(y: Any) -> list[Any]:
    return [
        numpyro.plate(name, TABLE[name], subsample_size=count, dim=dim)
        for name, count, dim in zip(TABLE, y.shape, (-2, -1), strict=True)
    ]


def factorisation() -> Problem:
    y = np.random.default_rng(0).normal(size=tuple(TABLE.values())).astype("float32")
    return Problem(
        factors,
        crossed_plates,
        partial(AutoNormal, factors),
        TABLE,
        lambda users, items: (y[np.ix_(users, items)],),
        along={"users": 0, "items": {0: 1}},
    )


def problems() -> dict[str, Problem]:
    ratings, y = insteval.load(), small_data()
    of_small = {"rows": ROWS}, lambda rows: (y[rows],)

    def of_students(students: np.ndarray) -> tuple:
        names = "rows", "students", "student", "lecturer", "y"
        return tuple(map(ratings(students).kwargs.get, names))

    return {
        "AutoGuideList": Problem(small, small_plate, guide_list, *of_small),
        "AutoNormal": Problem(
            small, small_plate, partial(AutoNormal, small), *of_small
        ),
        "crossed plates": factorisation(),
        "InstEval": Problem(
            insteval.model,
            insteval.plates,
            insteval.guide,
            {"students": insteval.STUDENTS},
            of_students,
            along={"ratings": (2, 3, 4)},
            loss=insteval.LOSS,
        ),
    }


def our_side(problem: Problem, capacity: int | None = None, **options: Any) -> Side:
    guide = problem.guide()
    svi = SubsampleSVI(problem.model, guide, ADAM, problem.loss, **options)

    def bundle(batch: tuple, rows: Any) -> Any:
        return minibatch(*batch, rows=rows, along=problem.along, capacity=capacity)

    return Side(
        lambda *own: svi.init(KEY, bundle(*own)),
        lambda state, *own: svi.update(state, bundle(*own)),
    )


def other_side(problem: Problem) -> Side:
    guide = problem.guide(create_plates=problem.create_plates)
    svi = SVI(problem.model, guide, ADAM, problem.loss)

    def init(batch: tuple, rows: Any) -> Any:
        with substitute(data=jax.tree.map(jnp.asarray, rows)):
            return svi.init(KEY, *batch)

    def step(state: Any, batch: tuple, rows: Any) -> Any:
        with substitute(data=rows):
            return svi.update(state, *batch)

    return Side(init, step)


def sides(problem: Problem) -> tuple[dict[str, Callable], dict[str, Any]]:
    """Return the steps and the states of both sides."""
    both = {"ours": our_side(problem), "by hand": other_side(problem)}
    # At full size, where plates by hand can start from given values, too.
    rows = {name: np.arange(size) for name, size in problem.sizes.items()}
    everything = problem.arguments(**rows), rows
    states = {name: side.init(*everything) for name, side in both.items()}
    return {name: side.step for name, side in both.items()}, states


def drawn(problem: Problem, count: int) -> tuple[tuple, dict[str, np.ndarray]]:
    """Draw a batch, and its rows."""
    draw = np.random.default_rng(count)
    rows = {
        name: draw.choice(size, count, replace=False).astype("int32")
        for name, size in problem.sizes.items()
    }
    return problem.arguments(**rows), rows


def costs(compiled: dict[str, Any]) -> str:
    ours, other = (step.cost_analysis() for step in compiled.values())
    more = {
        what: 100 * (ours[key] / other[key] - 1)
        for what, key in (("flops", "flops"), ("bytes", "bytes accessed"))
    }
    if not any(more.values()):
        return "flops and bytes equal"
    return ", ".join(f"{percent:+.2f} % {what}" for what, percent in more.items())


def jitted(case: str, problem: Problem, size: int, rounds: int) -> Row:
    steps, states = sides(problem)
    batch = jax.tree.map(jnp.asarray, drawn(problem, size))
    compiled = {
        name: jax.jit(step).lower(states[name], *batch).compile()
        for name, step in steps.items()
    }
    agree({name: step(states[name], *batch)[1] for name, step in compiled.items()})
    ways = {n: Steps(step, states[n], [batch]) for n, step in compiled.items()}
    took = in_turns(ways, rounds)
    return Row(case, AGAINST, "s", *took.values(), 1.05, costs(compiled))


def first_call(case: str, problem: Problem, rounds: int) -> Row:
    steps, states = sides(problem)
    jitted = {name: jax.jit(step) for name, step in steps.items()}
    # Every size is new to JAX, whoever takes it.
    batches = iter([drawn(problem, 150 + n) for n in range(2 * (rounds + 1))])

    def first(name: str) -> Any:
        return jitted[name].lower(states[name], *next(batches)).compile()

    took = in_turns({name: partial(first, name) for name in steps}, rounds, warm_up=1)
    return Row(case, AGAINST, "s", *took.values(), 1.05)


def cases(quick: bool) -> Iterator[Row]:
    for name, problem in list(problems().items())[: 1 if quick else None]:
        for size in (256,) if quick else (64, 256):
            case = f"jitted step, {name}, {size:,} rows"
            yield jitted(case, problem, size, 50 if quick else 1000)
        case = f"first call at a new size, {name}"
        yield first_call(case, problem, 1 if quick else 8)
