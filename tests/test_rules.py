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
    AutoDAIS,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

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


def plate(rows, pinned):
    with handlers.substitute(data={"n": rows} if pinned else {}):
        return numpyro.plate("n", N, subsample_size=len(rows))


def plain(x, rows, pinned=True):
    """Data that are sliced, and data that the model indexes."""
    with plate(rows, pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        w = numpyro.sample("w", dist.Normal(0, 10))
        numpyro.sample("sliced", dist.Normal(z + w, 1), obs=x)
        numpyro.sample("indexed", dist.Normal(z + w, 1), obs=jnp.asarray(X)[idx])


def full(x, rows, pinned=True):
    """Besides, parameters of the model and ``numpyro.subsample``."""
    with plate(rows, pinned) as idx:
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
    guide = AutoGuideList(model)
    of_z = handlers.block(model, hide=[*OBSERVED, "w"])
    guide.append(AutoNormal(of_z, init_scale=1e-4))
    guide.append(AutoDelta(handlers.block(model, hide=[*OBSERVED, "z"])))
    return guide


def by_hand(model):
    def guide(x, rows, pinned=True):
        with plate(rows, pinned):
            for name in ("z", "w"):
                loc = numpyro.param(f"{name}_auto_loc", jnp.zeros(N), event_dim=0)
                numpyro.sample(name, dist.Normal(loc, 1e-4))

    return guide


def by_hand_with_index(model):
    def guide(x, rows, pinned=True):
        with plate(rows, pinned) as idx:
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
            return (x, rows), {"indices": {"n": rows}, "pinned": False}
        return (x, rows), {}

    args, named = arguments(jnp.arange(N))
    state = svi.init(jax.random.key(0), *args, **named)
    params = svi.optim.get_params(state.optim_state)
    params = {name: known(name, value) for name, value in params.items()}
    state = state._replace(optim_state=svi.optim.init(params))

    @jax.jit
    def loss_of(rows):
        args, named = arguments(rows)
        return svi.evaluate(state, *args, **named)

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
