"""The three rules of `plates`: one choice of rows, taken once, in any order."""

from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from checks import told
from models import guide_list, plate_of
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample

N = 6
X = np.array([0.0, 7.0, -3.0, 11.0, 2.0, -8.0])
BIAS = np.array([5.0, 1.0, -2.0, 0.5, -4.0, 3.0])
LOC = np.array([-6.0, 2.0, 9.0, -1.0, 4.0, 8.0])

BATCHES = {
    "half": [4, 1, 3],
    "in order": [0, 1, 2, 3, 4, 5],
    "shuffled": [5, 0, 3, 1, 4, 2],
    "with replacement": [2, 2, 0, 5, 3, 2],
}


def plain(x, rows, pinned=True):
    """Data that are sliced, and data that the model indexes."""
    with plate_of(rows, N, pinned=pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        w = numpyro.sample("w", dist.Normal(0, 10))
        numpyro.sample("sliced", dist.Normal(z + w, 1), obs=x)
        numpyro.sample("indexed", dist.Normal(z + w, 1), obs=jnp.asarray(X)[idx])


def full(x, rows, pinned=True):
    """Besides, parameters of the model and ``numpyro.subsample``."""
    with plate_of(rows, N, pinned=pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        w = numpyro.sample("w", dist.Normal(0, 10))
        bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
        numpyro.sample("sliced", dist.Normal(z + w + bias, 1), obs=x)
        numpyro.sample("indexed", dist.Normal(z + w + bias, 1), obs=jnp.asarray(X)[idx])
        x = numpyro.subsample(jnp.asarray(X), event_dim=0)
        numpyro.sample("subsampled", dist.Normal(z + w + bias, 1), obs=x)


OBSERVED = ["sliced", "indexed", "subsampled"]
of_small_spread = partial(partial, init_scale=1e-4)


def two_parts(model):
    parts = {"z": of_small_spread(AutoNormal), "w": AutoDelta}
    return guide_list(model, parts, hide=OBSERVED)


def by_hand(model):
    def guide(x, rows, pinned=True):
        with plate_of(rows, N, pinned=pinned):
            for name in ("z", "w"):
                loc = numpyro.param(f"{name}_auto_loc", jnp.zeros(N), event_dim=0)
                numpyro.sample(name, dist.Normal(loc, 1e-4))

    return guide


def by_hand_with_index(model):
    def guide(x, rows, pinned=True):
        with plate_of(rows, N, pinned=pinned) as idx:
            for name in ("z", "w"):
                loc = numpyro.param(f"{name}_auto_loc", jnp.zeros(N))
                numpyro.sample(name, dist.Normal(loc[idx], 1e-4))

    return guide


def two_autoguides(model):
    first, second = two_parts(model)

    def guide(*args, **kwargs):
        return {**first(*args, **kwargs), **second(*args, **kwargs)}

    return guide


GUIDES = {
    "AutoNormal": of_small_spread(AutoNormal),
    "AutoDelta": AutoDelta,
    "AutoDiagonalNormal": of_small_spread(AutoDiagonalNormal),
    "AutoMultivariateNormal": of_small_spread(AutoMultivariateNormal),
    "AutoGuideList": two_parts,
    "by hand": by_hand,
    "by hand, with index": by_hand_with_index,
    "two autoguides": two_autoguides,
}


def known(name, value):
    """Parameters whose rows can be told apart: `z` is at LOC, `w` at zero."""
    values = {"bias": BIAS, "z_auto_loc": LOC, "w_auto_loc": np.zeros(N)}
    # Joint guides have one vector, of w and z.
    values["auto_loc"] = np.concatenate([np.zeros(N), LOC])
    return jnp.asarray(values[name], "float32") if name in values else value


def truth(rows, bias):
    rows = np.asarray(rows)
    residual = X[rows] - LOC[rows] - (BIAS[rows] if bias else 0)
    return N / len(rows) * np.sum(0.5 * residual**2 + 0.5 * np.log(2 * np.pi))


class Form(NamedTuple):
    svi: type = SVI
    wrap: bool = False
    context: bool = False


FORMS = {
    "wrapper": Form(wrap=True),
    "context": Form(context=True),
    "wrapper in nested contexts": Form(wrap=True, context=True),
    "SubsampleSVI": Form(svi=SubsampleSVI),
}


def contexts(form):
    stack = ExitStack()
    for _ in range(2 if form.context else 0):
        stack.enter_context(dynamic_subsample())
    return stack


def compiled_loss(form, guide, model, loss):
    """The loss by site, of some rows, at parameters that are known for each row."""
    guide = GUIDES[guide](model)
    if form.wrap:
        guide = dynamic_subsample(guide, model=model)
    svi = form.svi(model, guide, optax.sgd(0.1), loss)

    def arguments(rows):
        x = jnp.asarray(X, "float32")[rows]
        if form.svi is SubsampleSVI:
            return (told(x, rows, rows={"n": rows}, pinned=False),)
        return x, rows

    state = svi.init(jax.random.key(0), *arguments(jnp.arange(N)))
    params = svi.optim.get_params(state.optim_state)
    params = {name: known(name, value) for name, value in params.items()}
    state = state._replace(optim_state=svi.optim.init(params))

    @jax.jit
    def loss_of(rows):
        return svi.evaluate(state, *arguments(rows))

    return loss_of


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("guide", GUIDES)
def test_every_row_meets_its_own(guide, form):
    """The density of the observed sites is that of the rows, computed by hand."""
    alone = form.wrap and not form.context
    model, sites = (plain, 2) if alone else (full, 3)
    with contexts(form):
        loss = compiled_loss(form, guide, model, Trace_ELBO(sum_sites=False))
        for rows in BATCHES.values():
            found = loss(jnp.array(rows))
            observed = [found[name] for name in found if name in OBSERVED]
            assert len(observed) == sites
            for value in observed:
                np.testing.assert_allclose(value, truth(rows, not alone), rtol=2e-3)


OBJECTIVES = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1),
    RenyiELBO(num_particles=1),
]


@pytest.mark.parametrize("loss", OBJECTIVES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("guide", ["by hand, with index", "two autoguides"])
def test_objectives_in_a_context(guide, loss):
    """All rows in another order have the loss that they have in order."""
    with contexts(FORMS["context"]):
        of_rows = compiled_loss(FORMS["context"], guide, full, loss)
        found = [of_rows(jnp.array(BATCHES[k])) for k in ("in order", "shuffled")]
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_multi_sample_guide_in_a_context():
    def guide(x, rows):
        with plate_of(rows, N) as idx:
            loc = numpyro.param("z_auto_loc", jnp.zeros(N))[idx]
            for name, value in (("z", loc), ("w", 0 * loc)):
                numpyro.sample(name, dist.Normal(value, 1e-4).expand_by([3]).mask(True))

    loss = Trace_ELBO(multi_sample_guide=True)
    svi = SVI(full, guide, optax.sgd(0.1), loss)
    params = {"z_auto_loc": jnp.asarray(LOC), "bias": jnp.asarray(BIAS)}

    def of(rows):
        rows = jnp.array(rows)
        args = (jax.random.key(0), params, full, guide, jnp.asarray(X)[rows], rows)
        return svi.loss.loss(*args)

    with dynamic_subsample():
        found = [of(BATCHES[kind]) for kind in ("in order", "shuffled")]
    np.testing.assert_allclose(*found, rtol=1e-4)


# ------------------------------------------------------------------ Predictive


def doubling(x, rows, pinned=True):
    """Rows in the order of the batch: the latent, less the row's own datum."""
    with plate_of(rows, N, pinned=pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.deterministic("sliced", z - x)
        numpyro.deterministic("indexed", z - jnp.asarray(X)[idx])
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def conditioned(x, rows):
    handlers.condition(doubling, data={"z": jnp.asarray(LOC)})(x, rows)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("nested", [False, True], ids=["one context", "two contexts"])
@pytest.mark.parametrize("given", ["samples", "guide", "guide by hand", "condition"])
def test_predictive_pairs_rows_with_their_own(given, nested, kind):
    rows = jnp.array(BATCHES[kind])
    x = jnp.asarray(X)[rows]
    samples = {"z": jnp.asarray([LOC, LOC + 1])}
    guide = AutoDelta(doubling)

    def guide_by_hand(x, rows):
        with plate_of(rows, N) as idx:
            numpyro.sample("z", dist.Delta(jnp.asarray(LOC)[idx]))

    with ExitStack() as stack:
        for _ in range(1 + nested):
            stack.enter_context(dynamic_subsample())
        if given == "samples":
            predictive = Predictive(doubling, samples)
        elif given == "guide":
            with handlers.seed(rng_seed=0):
                guide(x, rows)
            params = {"z_auto_loc": jnp.asarray(LOC)}
            predictive = Predictive(doubling, guide=guide, params=params, num_samples=2)
        elif given == "guide by hand":
            predictive = Predictive(doubling, guide=guide_by_hand, num_samples=2)
        else:
            predictive = Predictive(conditioned, num_samples=2)
        if given == "condition" and kind in ("shuffled", "with replacement"):
            message = "All 6 rows of plate 'n' .* `condition` gives .* site 'z'"
            with pytest.raises(ValueError, match=message):
                predictive(jax.random.key(0), x, rows)
            return
        found = predictive(jax.random.key(0), x, rows)
    shift = np.array([0.0, 1.0 if given == "samples" else 0.0])[:, None]
    expected = (LOC - X)[np.asarray(rows)] + shift
    np.testing.assert_allclose(found["indexed"], expected)
    np.testing.assert_allclose(found["sliced"], expected)


# ------------------------------------------------------------------ posterior methods


# ------------------------------------------------------------------ a wrapper alone


def test_what_a_wrapper_alone_cannot_reach():
    """A guide without a site in the plate, and parameters of the model there."""

    def model(x, rows):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with plate_of(rows, N):
            bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
            numpyro.sample("y", dist.Normal(mu + bias, 1), obs=x)

    guide = dynamic_subsample(AutoNormal(model))
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    x = jnp.asarray(X)
    state = svi.init(jax.random.key(0), x, jnp.arange(N))
    svi.update(state, x, jnp.arange(N))
    rows = jnp.array(BATCHES["shuffled"])
    step = jax.jit(svi.update)
    with pytest.raises(ValueError, match="All 6 rows of plate 'n' .* SubsampleSVI"):
        step(state, x[rows], rows)
    with dynamic_subsample():
        after = svi.get_params(step(state, x[rows], rows)[0])["bias"]
    mu = svi.get_params(state)["mu_auto_loc"]
    # A step goes a tenth of the way to the row's own residual.
    np.testing.assert_allclose(after, 0.1 * (X - mu), atol=0.1)


@pytest.mark.parametrize("kind", ["in order", "shuffled"])
def test_padding_to_all_rows_follows_the_indices(kind):
    """Also in ``numpyro.subsample``."""

    def model(x):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 10))
            data = numpyro.subsample(jnp.asarray(X), event_dim=0)
            numpyro.sample("y", dist.Normal(z, 1), obs=data)

    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    rows = jnp.array(BATCHES[kind])
    state = svi.init(jax.random.key(0), X)
    state = state._replace(optim_state=svi.optim.init({"z_auto_loc": jnp.asarray(LOC)}))
    loss = svi.evaluate(state, told(X, rows={"n": rows}, counts={"n": 2}))
    two = np.asarray(rows[:2])
    of_rows = dist.Normal(0, 10).log_prob(LOC) + dist.Normal(LOC, 1).log_prob(X)
    np.testing.assert_allclose(loss, -3 * np.asarray(of_rows)[two].sum(), rtol=1e-5)
