"""Joint guides on batches against the full batch: time to the same held-out loss."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO, init_to_value
from numpyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)

from numpyro_dynamic_subsample import SubsampleSVI

from .pairs import Case, Found, Row

GROUPS = 200
OBSERVED = 1000  # of each group
HELD_OUT = 50
FEATURES = 8
BATCH = 20
DRAWS = 32  # of the posterior, for a held-out loss
RATES = (0.003, 0.01, 0.03)
GUIDES = {
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
}


class Data(NamedTuple):
    """Yes or no, shape ``(groups, observed)``, and what it goes by."""

    x: jax.Array
    y: jax.Array


def logits(latents: dict[str, Any], x: jax.Array) -> jax.Array:
    return latents["group"][..., None] + x @ latents["weights"]


def model(data: Data) -> None:
    """Regress in groups, with an intercept for each."""
    zeros = jnp.zeros(FEATURES)
    latents: dict[str, Any] = {
        "weights": numpyro.sample("weights", dist.Normal(zeros, 1).to_event(1))
    }
    sd: Any = numpyro.sample("sd", dist.HalfNormal(1))
    with numpyro.plate("groups", GROUPS, subsample_size=len(data.y)):
        latents["group"] = numpyro.sample("group", dist.Normal(0, sd))
        answers = dist.Bernoulli(logits=logits(latents, data.x)).to_event(1)
        numpyro.sample("y", answers, obs=data.y)


def made_up() -> tuple[Data, Data]:
    """Draw data to train on and data held out, of the same groups."""
    draw = np.random.default_rng(0)
    size = GROUPS, OBSERVED + HELD_OUT
    x = draw.normal(size=(*size, FEATURES)).astype("float32")
    group = draw.normal(size=(GROUPS, 1))
    chance = 1 / (1 + np.exp(-group - x @ np.linspace(-1, 1, FEATURES)))
    y = (draw.uniform(size=size) < chance).astype("float32")
    whole = Data(jnp.asarray(x), jnp.asarray(y))
    train = jax.tree.map(lambda leaf: leaf[:, :OBSERVED], whole)
    return train, jax.tree.map(lambda leaf: leaf[:, OBSERVED:], whole)


class Course(NamedTuple):
    """The held-out loss, and the seconds of training that it took, by and by."""

    clock: list[float]
    losses: list[float]


def course(guide_class: Any, rate: float, batch: int, budget: float) -> Course:
    """Train for some seconds, compilation excluded."""
    train, held_out = made_up()
    start = init_to_value(
        values={
            "weights": jnp.zeros(FEATURES),
            "sd": jnp.ones(()),
            "group": jnp.zeros(GROUPS),
        }
    )
    guide = guide_class(model, init_loc_fn=start)
    svi = SubsampleSVI(model, guide, optax.adam(rate), Trace_ELBO())
    # Joint guides begin with all rows; batches may follow.
    state = svi.init(jax.random.key(0), train)

    def update(state: Any, rows: Any) -> Any:
        given = jax.tree.map(lambda leaf: leaf[rows], train)
        return svi.update(state, given, indices={"groups": rows})

    @jax.jit
    def loss(state: Any) -> jax.Array:
        params = svi.get_params(state)
        sampled = svi.guide.sample_posterior(
            jax.random.key(1), params, sample_shape=(DRAWS,)
        )
        latents = {name: sampled[name] for name in ("group", "weights")}
        logit = jax.vmap(partial(logits, x=held_out.x))(latents)
        each = dist.Bernoulli(logits=logit).log_prob(held_out.y)
        return -jnp.mean(jax.nn.logsumexp(each, axis=0) - jnp.log(DRAWS))

    draw = np.random.default_rng(1)

    def some_rows() -> jax.Array:
        """Return rows of about as many observations, whatever the batch."""
        epochs = -(-10 * batch // GROUPS)
        rows = np.stack([draw.permutation(GROUPS) for _ in range(epochs)])
        return jnp.asarray(rows.reshape(-1, batch)[:10].astype("int32"))

    steps = jax.jit(partial(jax.lax.scan, update))
    run = steps.lower(state, some_rows()).compile()
    clock, losses = [0.0], [float(loss(state))]
    while clock[-1] < budget:
        rows = some_rows()
        started = time.perf_counter()
        state, _ = jax.block_until_ready(run(state, rows))
        clock.append(clock[-1] + time.perf_counter() - started)
        losses.append(float(loss(state)))
    return Course(clock, losses)


def race(guide: str, budget: float, rates: tuple[float, ...]) -> Found:
    """Time both ways, at the best of a few step sizes, to where full batches get."""

    def courses(batch: int) -> dict[float, Course]:
        return {rate: course(GUIDES[guide], rate, batch, budget) for rate in rates}

    full, ours = courses(GROUPS), courses(BATCH)
    aim = min(min(of_rate.losses) for of_rate in full.values()) + 0.001

    def soonest(courses: dict[float, Course]) -> tuple[float, float]:
        return min(
            (next((t for t, loss in zip(*c, strict=True) if loss <= aim), np.inf), rate)
            for rate, c in courses.items()
        )

    (seconds, rate), (full_seconds, full_rate) = soonest(ours), soonest(full)
    note = f"held-out loss {aim:.3f}; best step sizes {rate} and {full_rate}"
    case = f"{guide}, batches of {BATCH} of {GROUPS} groups"
    if not np.isfinite(seconds):
        note = f"held-out loss {aim:.3f} not reached in {budget:.0f} s"
    values = seconds if np.isfinite(seconds) else None, full_seconds
    return Found([Row(case, "full batch", "s", *values, None, note)], {})


def cases(quick: bool) -> list[Case]:
    guides = list(GUIDES)[:1] if quick else GUIDES
    budget, rates = (1.0, RATES[-1:]) if quick else (4.0, RATES)
    return [Case(guide, partial(race, guide, budget, rates)) for guide in guides]
