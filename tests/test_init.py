"""`SubsampleSVI.init` looks for initial values in one program, and finds NumPyro's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import (
    SVI,
    Trace_ELBO,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from numpyro.infer import util as initialisation
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from models import N, X
from numpyro_dynamic_subsample import SubsampleSVI
from numpyro_dynamic_subsample.effect import internals


def plates(x, scale=1.0):
    return numpyro.plate("n", N, subsample_size=len(x))


def model(x, scale=1.0):
    mu = numpyro.sample("mu", dist.LogNormal(0, scale))
    with plates(x):
        # Not in alphabetical order.
        a = numpyro.sample("a", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(a, 1), obs=x)


def init(svi, **options):
    return svi.init(jax.random.key(3), X[:4], **options)


ROWS = {"n": np.arange(4)}


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
@pytest.mark.parametrize(
    "strategy",
    [
        init_to_uniform,
        partial(init_to_uniform, radius=0.5),
        init_to_median,
        init_to_mean,
        init_to_sample,
        init_to_feasible,
        init_to_value(values={"mu": 2.0}),
    ],
    ids=lambda own: getattr(own, "func", own).__name__,
)
def test_initial_values_are_numpyros(guide, strategy):
    own = SubsampleSVI(
        model, guide(model, init_loc_fn=strategy), optax.adam(0.1), Trace_ELBO()
    )
    by_hand = SVI(
        model,
        guide(model, init_loc_fn=strategy, create_plates=plates),
        optax.adam(0.1),
        Trace_ELBO(),
    )
    found = own.get_params(init(own, indices=ROWS))
    with numpyro.handlers.substitute(data={"n": jnp.arange(4)}):
        wanted = by_hand.get_params(init(by_hand))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.fixture
def made(monkeypatch):
    """The programs that are made, of which there are none yet."""
    made = {}
    monkeypatch.setattr(internals, "_programs", made)
    return made


def test_search_is_one_program_and_is_compiled_once(made):
    search = initialisation.find_valid_initial_params
    for x in (X[:4], X[4:8]):
        svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())
        svi.init(jax.random.key(0), x, indices=ROWS)
        assert len(made) == 1
    assert initialisation.find_valid_initial_params is search


def test_model_that_needs_values_is_searched_as_numpyro_does(made):
    def by_value(x):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        side = -1.0 if float(jax.lax.stop_gradient(mu)) < 0 else 1.0
        with plates(x):
            numpyro.sample("y", dist.Normal(mu * side, 1), obs=x)

    own, by_hand = (
        svi(by_value, AutoDelta(by_value), optax.adam(0.1), Trace_ELBO())
        for svi in (SubsampleSVI, SVI)
    )
    params = own.get_params(init(own, indices=ROWS))
    assert not made
    with numpyro.handlers.substitute(data={"n": jnp.arange(4)}):
        assert params == by_hand.get_params(init(by_hand))


def test_values_that_are_not_valid_are_an_error():
    def impossible(x):
        model(x)
        numpyro.factor("impossible", jnp.nan)

    svi = SubsampleSVI(
        impossible, AutoNormal(impossible), optax.adam(0.1), Trace_ELBO()
    )
    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        init(svi, indices=ROWS)


def test_init_can_be_compiled():
    svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())
    compiled = jax.jit(lambda: init(svi, indices=ROWS))()
    state = init(
        SubsampleSVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO()),
        indices=ROWS,
    )
    for own, other in zip(
        jax.tree.leaves(compiled.optim_state),
        jax.tree.leaves(state.optim_state),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-6)


def test_no_tracer_is_left_behind():
    with jax.checking_leaks():
        svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())
        state = init(svi, indices=ROWS)
    values = internals.initial_values(svi.guide.fn)
    assert all(isinstance(own, jax.Array) for own in values.values())
    posterior = svi.guide.median(svi.get_params(state))
    assert posterior["a"].shape == (N,)


def test_strategy_that_holds_values():
    strategy = init_to_value(values={"mu": 2.0, "a": X})
    guide = AutoNormal(model, init_loc_fn=strategy)
    svi = SubsampleSVI(model, guide, optax.adam(0.1), Trace_ELBO())
    params = svi.get_params(init(svi, indices=ROWS))
    np.testing.assert_allclose(params["mu_auto_loc"], np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(params["a_auto_loc"], X, rtol=1e-6)
