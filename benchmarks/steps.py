"""A jitted step, the first call at a new size, and eager steps, against plates by hand.

Both sides pin the rows of their batches, since plates by hand are wrong in an
``AutoGuideList`` otherwise.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from statistics import median
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
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, init_to_value
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from numpyro_dynamic_subsample import SubsampleSVI, minibatch
from numpyro_dynamic_subsample.__main__ import LECTURERS, STUDENTS, load, start
from numpyro_dynamic_subsample.__main__ import model as ratings_model

from .pairs import Case, Found, Row, Steps, agree, in_turns

ROWS = 10_000
FEATURES = 8
AGAINST = "create_plates"

X = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype("float32")


class Problem(NamedTuple):
    """A model, and what both sides need to fit it."""

    model: Callable
    create_plates: Callable  # a correct one
    plate: str
    batch: Callable[[np.ndarray], Any]  # that holds these rows
    size: int = ROWS
    guide: Callable = AutoNormal
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


def ratings_of(batch: tuple) -> None:
    ratings_model(*batch)


def ratings_plates(batch: tuple) -> list[Any]:
    return [
        numpyro.plate("lecturers", LECTURERS),
        numpyro.plate("students", STUDENTS, subsample_size=len(batch[0])),
    ]


def guide_list(model: Callable, create_plates: Any = None) -> AutoGuideList:
    made = []

    # Made again for each part, they would use up another random key for each.
    def of_list(*args: Any) -> Any:
        made[:] = [create_plates(*args)]
        return made

    by_hand = create_plates is not None
    guide = AutoGuideList(model, create_plates=of_list if by_hand else None)
    of_part = (lambda *_: made) if by_hand else None
    for part, hidden in ((AutoNormal, ["w"]), (AutoDelta, ["mu", "z"])):
        guide.append(part(block(model, hide=hidden), create_plates=of_part))
    return guide


def insteval() -> Problem:
    ratings = load()

    def batch(rows: np.ndarray) -> tuple:
        names = "rows", "students", "student", "lecturer", "y"
        return tuple(map(ratings(rows).kwargs.get, names))

    guide = partial(AutoNormal, init_loc_fn=init_to_value(values=start()))
    loss = TraceMeanField_ELBO()
    return Problem(ratings_of, ratings_plates, "students", batch, STUDENTS, guide, loss)


SMALL = Problem(small, rows_plate, "rows", lambda rows: X[rows, 0])
GUIDES = {
    "AutoNormal": SMALL,
    "AutoDelta": SMALL._replace(guide=AutoDelta),
    "AutoGuideList": SMALL._replace(guide=guide_list),
}
MODELS: dict[str, Callable[[], Problem]] = {
    "small model": lambda: SMALL,
    "InstEval": insteval,
    "networks before and after the plate": lambda: SMALL._replace(
        model=with_networks, batch=lambda rows: X[rows]
    ),
}


def sides(problem: Problem) -> dict[str, Side]:
    model, plate = problem.model, problem.plate
    optimizer = optax.adam(0.01)
    svi = SubsampleSVI(model, problem.guide(model), optimizer, problem.loss)
    guide = problem.guide(model, create_plates=problem.create_plates)
    plain = SVI(model, guide, optimizer, problem.loss)

    def ours(state: Any, batch: Any, rows: Any) -> Any:
        return svi.update(state, minibatch(batch, rows={plate: rows}))

    def by_hand(state: Any, batch: Any, rows: Any) -> Any:
        with substitute(data={plate: rows}):
            return plain.update(state, batch)

    # At full size, where plates by hand can start from given values, too.
    everything = problem.batch(np.arange(problem.size))
    key = jax.random.key(0)
    return {
        "ours": Side(ours, svi.init(key, everything)),
        "by hand": Side(by_hand, plain.init(key, everything)),
    }


def drawn(problem: Problem, size: int) -> tuple[Any, jax.Array]:
    """Draw a batch, and its rows."""
    draw = np.random.default_rng(size)
    rows = draw.choice(problem.size, size, replace=False).astype("int32")
    return jax.tree.map(jnp.asarray, problem.batch(rows)), jnp.asarray(rows)


def check(both: dict[str, Side], steps: dict[str, Callable], batch: tuple) -> None:
    agree({name: steps[name](side.state, *batch)[1] for name, side in both.items()})


def jitted(problem: Problem, case: str, size: int, rounds: int) -> Found:
    both = sides(problem)
    batch = drawn(problem, size)
    # By hand once more, which tells how much of a ratio is noise. It is compiled by
    # itself: a program that runs twice in a round is found in the cache more often.
    both["again"] = both["by hand"]
    compiled = {
        name: jax.jit(partial(side.step)).lower(side.state, *batch).compile()
        for name, side in both.items()
    }
    check(both, compiled, batch)
    costs = [
        {key: step.cost_analysis()[key] for key in ("flops", "bytes accessed")}
        for step in compiled.values()
    ]
    ways = {n: Steps(compiled[n], side.state, [batch]) for n, side in both.items()}
    took = in_turns(ways, rounds)
    same = "equal flops and bytes" if costs[0] == costs[1] else f"costs {costs}"
    noise = np.median(took["again"]) / np.median(took["by hand"])
    note = f"{same}; {AGAINST} against itself {noise:.2f}"
    ours, other = took["ours"] * 1e3, took["by hand"] * 1e3
    return Found([Row(case, AGAINST, "ms", ours, other, 1.05, note)], {})


def first_call(problem: Problem, case: str, rounds: int) -> Found:
    both = sides(problem)
    steps = {name: jax.jit(side.step) for name, side in both.items()}
    check(both, steps, drawn(problem, 96))
    # Every size is new to JAX, whoever takes it.
    sizes = count(150)
    batches = [drawn(problem, next(sizes)) for _ in range(2 * (rounds + 1))]
    upcoming = iter(batches)
    traced: dict[str, list[float]] = {name: [] for name in both}

    def first(name: str) -> Any:
        started = time.perf_counter()
        lowered = steps[name].lower(both[name].state, *next(upcoming))
        traced[name].append(time.perf_counter() - started)
        return lowered.compile()

    took = in_turns({name: partial(first, name) for name in both}, rounds, warm_up=1)
    ours, other = (median(of_side[1:]) * 1e3 for of_side in traced.values())
    note = f"of which traced and lowered {ours:.0f} and {other:.0f} ms"
    values = took["ours"] * 1e3, took["by hand"] * 1e3
    return Found([Row(case, AGAINST, "ms", *values, 1.05, note)], {})


def eager(problem: Problem, case: str, rounds: int) -> Found:
    both = sides(problem)
    batch = drawn(problem, 100)
    check(both, {name: side.step for name, side in both.items()}, batch)
    ways = {n: Steps(side.step, side.state, [batch]) for n, side in both.items()}
    took = in_turns(ways, rounds, warm_up=2)
    values = took["ours"] * 1e3, took["by hand"] * 1e3
    return Found([Row(case, AGAINST, "ms", *values, 1.15)], {})


def jitted_cases(quick: bool) -> list[Case]:
    sizes = (256,) if quick else (32, 256, 1024, 4096)
    guides = list(GUIDES)[-1:] if quick else GUIDES
    cases = []
    for guide in guides:
        for size in sizes:
            name = f"jitted step, {guide}, {size:,} rows"
            run = partial(jitted, GUIDES[guide], name, size, 50 if quick else 1000)
            cases.append(Case(name, run))
    return cases


def first_cases(quick: bool) -> list[Case]:
    models = list(MODELS)[:1] if quick else MODELS
    cases = []
    for measure, label, rounds in (
        (first_call, "first call at a new size", 1 if quick else 8),
        (eager, "eager step", 3 if quick else 30),
    ):
        for model in models:
            name = f"{label}, {model}"

            def run(
                measure: Any = measure,
                model: str = model,
                name: str = name,
                rounds: int = rounds,
            ) -> Found:
                return measure(MODELS[model](), name, rounds)

            cases.append(Case(name, run))
    return cases
