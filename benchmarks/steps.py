"""A jitted step, and the first call at a new size, against plates by hand.

Both sides pin the rows of their batches, since plates by hand are wrong in an
``AutoGuideList`` otherwise.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.contrib.module import flax_module
from numpyro.handlers import block, substitute
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, minibatch

from . import insteval
from .pairs import Row, Steps, agree, in_turns

ROWS, FEATURES = 10_000, 8
AGAINST = "create_plates"
X = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype("float32")


class Problem(NamedTuple):
    """A model, and what both sides need to fit it."""

    model: Callable
    create_plates: Callable  # a correct one
    guide: Callable
    arguments: Callable[[np.ndarray], tuple]  # of the model, for a batch of these rows
    plate: str = "rows"
    size: int = ROWS
    loss: Any = Trace_ELBO()


class Side(NamedTuple):
    step: Callable
    state: Any


def small(y: Any) -> None:
    mu: Any = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        w: Any = numpyro.sample("w", dist.Normal(0, 1))
        z: Any = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z + w, 0.5), obs=y)


class Network(nn.Module):
    out: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(2):
            x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(self.out)(x)


def with_networks(x: Any) -> None:
    before: Any = flax_module("before", Network(4), input_shape=(1, FEATURES))
    after: Any = flax_module("after", Network(1), input_shape=(1, 4))
    loc = before(x)
    with numpyro.plate("rows", ROWS, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1).to_event(1))
        numpyro.sample("y", dist.Normal(after(z)[:, 0], 0.5), obs=x.sum(1))


def rows_plate(batch: Any) -> Any:
    return numpyro.plate("rows", ROWS, subsample_size=len(batch))


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


def problems() -> dict[str, Problem]:
    ratings = insteval.load()

    def of_students(rows: np.ndarray) -> tuple:
        names = "rows", "students", "student", "lecturer", "y"
        return tuple(map(ratings(rows).kwargs.get, names))

    def column(rows: np.ndarray) -> tuple:
        return (X[rows, 0],)

    return {
        "AutoGuideList": Problem(small, rows_plate, guide_list, column),
        "AutoNormal": Problem(small, rows_plate, partial(AutoNormal, small), column),
        "networks around the plate": Problem(
            with_networks,
            rows_plate,
            partial(AutoNormal, with_networks),
            lambda rows: (X[rows],),
        ),
        "InstEval": Problem(
            insteval.model,
            insteval.plates,
            insteval.guide,
            of_students,
            "students",
            insteval.STUDENTS,
            insteval.LOSS,
        ),
    }


def sides(problem: Problem) -> dict[str, Side]:
    optimizer = optax.adam(0.01)
    svi = SubsampleSVI(problem.model, problem.guide(), optimizer, problem.loss)
    guide = problem.guide(create_plates=problem.create_plates)
    plain = SVI(problem.model, guide, optimizer, problem.loss)

    def ours(state: Any, batch: tuple, rows: Any) -> Any:
        return svi.update(state, minibatch(*batch, rows={problem.plate: rows}))

    def by_hand(state: Any, batch: tuple, rows: Any) -> Any:
        with substitute(data={problem.plate: rows}):
            return plain.update(state, *batch)

    # At full size, where plates by hand can start from given values, too.
    everything = problem.arguments(np.arange(problem.size))
    key = jax.random.key(0)
    return {
        "ours": Side(ours, svi.init(key, *everything)),
        "by hand": Side(by_hand, plain.init(key, *everything)),
    }


def drawn(problem: Problem, size: int) -> tuple[Any, jax.Array]:
    """Draw a batch, and its rows."""
    draw = np.random.default_rng(size)
    rows = draw.choice(problem.size, size, replace=False).astype("int32")
    return jax.tree.map(jnp.asarray, problem.arguments(rows)), jnp.asarray(rows)


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
    both, batch = sides(problem), drawn(problem, size)
    compiled = {
        name: jax.jit(side.step).lower(side.state, *batch).compile()
        for name, side in both.items()
    }
    agree({n: compiled[n](side.state, *batch)[1] for n, side in both.items()})
    ways = {n: Steps(compiled[n], side.state, [batch]) for n, side in both.items()}
    took = in_turns(ways, rounds)
    return Row(case, AGAINST, "s", *took.values(), 1.05, costs(compiled))


def first_call(case: str, problem: Problem, rounds: int) -> Row:
    both = sides(problem)
    steps = {name: jax.jit(side.step) for name, side in both.items()}
    # Every size is new to JAX, whoever takes it.
    batches = iter([drawn(problem, 150 + n) for n in range(2 * (rounds + 1))])

    def first(name: str) -> Any:
        return steps[name].lower(both[name].state, *next(batches)).compile()

    took = in_turns({name: partial(first, name) for name in both}, rounds, warm_up=1)
    return Row(case, AGAINST, "s", *took.values(), 1.05)


def cases(quick: bool) -> Iterator[Row]:
    for name, problem in list(problems().items())[: 1 if quick else None]:
        for size in (256,) if quick else (256, 2048):
            case = f"jitted step, {name}, {size:,} rows"
            yield jitted(case, problem, size, 50 if quick else 1000)
        case = f"first call at a new size, {name}"
        yield first_call(case, problem, 1 if quick else 8)
