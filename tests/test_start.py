"""`SubsampleSVI.init` starts in few programs, with NumPyro's values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import primitives
from numpyro.infer import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from numpyro.infer import util as initialisation
from numpyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoNormal

from checks import assert_close, told
from models import N, X, svi_of
from numpyro_dynamic_subsample import MisalignedSubsampleWarning, minibatch
from numpyro_dynamic_subsample.effect import internals
from numpyro_dynamic_subsample.steps import programs
from numpyro_dynamic_subsample.steps.start import check_seen


def plates(x, scale=1.0):
    return numpyro.plate("n", N, subsample_size=len(x))


def model(x, scale=1.0):
    mu = numpyro.sample("mu", dist.LogNormal(0, scale))
    with plates(x):
        # Not in alphabetical order.
        a = numpyro.sample("a", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(a, 1), obs=x)


def init(svi, rows=None):
    batch = X[:4] if rows is None else told(X[:4], rows=rows)
    return svi.init(jax.random.key(3), batch)


ROWS = {"n": np.arange(4)}


STRATEGIES = [
    partial(init_to_uniform, radius=0.5),
    init_to_median,
    init_to_mean,
    init_to_sample,
    init_to_feasible,
    init_to_value(values={"mu": 2.0}),
]


@pytest.mark.parametrize(
    ("guide", "strategy"),
    [*((AutoNormal, own) for own in STRATEGIES), (AutoDelta, init_to_uniform)],
    ids=lambda own: getattr(own, "func", own).__name__,
)
def test_initial_values_are_numpyros(guide, strategy):
    own = svi_of(model, guide(model, init_loc_fn=strategy), "SubsampleSVI")
    by_hand = guide(model, init_loc_fn=strategy, create_plates=plates)
    by_hand = svi_of(model, by_hand, "context")
    found = own.get_params(init(own, rows=ROWS))
    with numpyro.handlers.substitute(data={"n": jnp.arange(4)}):
        wanted = by_hand.get_params(init(by_hand))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(found[name], value)
        # The search is one program, whose operations are fused.
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7)


def test_parameters_that_are_drawn_get_numpyros_keys():
    def net(x):
        weights = numpyro.param("weights", lambda key: jax.random.normal(key, (2,)))
        model(x, jnp.exp(0 * weights[0]))

    own, by_hand = (
        svi_of(net, AutoIAFNormal(net, num_flows=1), form, optim=optax.adam(0.1))
        for form in ("SubsampleSVI", "context")
    )
    state = own.init(jax.random.key(3), told(X, rows={"n": np.arange(N)}))
    wanted = by_hand.init(jax.random.key(3), X)
    assert_close(state, wanted, rtol=1e-6, atol=1e-7)


def test_rows_that_are_pinned_are_not_drawn_as_well(monkeypatch):
    drawn = []
    draw = primitives._subsample_fn

    def counted(*args, **kwargs):
        drawn.append(args)
        return draw(*args, **kwargs)

    monkeypatch.setattr(primitives, "_subsample_fn", counted)
    svi = svi_of(model, form="SubsampleSVI")
    init(svi, rows=ROWS)
    assert not drawn
    with pytest.warns(MisalignedSubsampleWarning):
        init(svi_of(model, form="SubsampleSVI"))
    assert drawn


@pytest.mark.parametrize("at", [1.0, 50.0])
def test_programs_with_callbacks_are_shared_with_nobody(at):
    def of_host(x):
        shape = jax.ShapeDtypeStruct((), x.dtype)
        loc = jax.pure_callback(lambda: np.asarray(at, x.dtype), shape)
        numpyro.sample("mu", dist.Normal(loc, 1))
        with plates(x):
            numpyro.sample("y", dist.Normal(0, 1), obs=x)

    guide = AutoNormal(of_host, init_loc_fn=init_to_median)
    svi = svi_of(of_host, guide, "SubsampleSVI")
    # The median is estimated from 15 draws.
    assert abs(svi.get_params(init(svi))["mu_auto_loc"] - at) < 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("y", "initial parameters: site 'y' has the value nan in row 6 of plate 'n'"),
        ("x", "invalid loc .*: site 'y' has the log density nan in row 6 of plate 'n'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Out-of-support:UserWarning")
def test_data_that_are_not_finite_are_named(bad, message):
    def line(x, y):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        with plates(y):
            numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

    data = {name: np.ones(4, "f4") for name in "xy"}
    data[bad][2] = np.nan
    svi = svi_of(line, form="SubsampleSVI")
    batch = minibatch(**data, rows={"n": np.arange(4, 8)}, capacity=6)
    with pytest.raises((RuntimeError, ValueError), match=message):
        svi.init(jax.random.key(0), batch)


def test_state_of_a_model_that_has_not_been_seen():
    new = svi_of(model, form="SubsampleSVI")
    with pytest.raises(ValueError, match=r"Call svi.init\(key, batch\) once"):
        check_seen(new)
    init(new, rows=ROWS)
    check_seen(new)


@pytest.fixture
def made(monkeypatch):
    """The programs that are made, of which there are none yet."""
    made = {}
    monkeypatch.setattr(programs, "_programs", made)
    return made


def test_programs_are_those_of_search_and_init_and_are_compiled_once(made):
    search = initialisation.find_valid_initial_params
    for x in (X[:4], X[4:8]):
        svi = svi_of(model, form="SubsampleSVI")
        svi.init(jax.random.key(0), told(x, rows=ROWS))
        assert len(made) == 2
    assert initialisation.find_valid_initial_params is search


def test_model_that_needs_values_is_searched_as_numpyro_does(made):
    def by_value(x):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        side = -1.0 if float(jax.lax.stop_gradient(mu)) < 0 else 1.0
        with plates(x):
            numpyro.sample("y", dist.Normal(mu * side, 1), obs=x)

    own, by_hand = (
        svi_of(by_value, AutoDelta, form) for form in ("SubsampleSVI", "context")
    )
    params = own.get_params(init(own, rows=ROWS))
    assert not made
    with numpyro.handlers.substitute(data={"n": jnp.arange(4)}):
        assert params == by_hand.get_params(init(by_hand))


def test_values_that_are_not_valid_are_an_error():
    def impossible(x):
        model(x)
        numpyro.factor("impossible", jnp.nan)

    svi = svi_of(impossible, form="SubsampleSVI")
    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        init(svi, rows=ROWS)


def test_init_can_be_compiled():
    svi = svi_of(model, form="SubsampleSVI")
    compiled = jax.jit(lambda: init(svi, rows=ROWS))()
    state = init(svi_of(model, form="SubsampleSVI"), rows=ROWS)
    for own, other in zip(
        jax.tree.leaves(compiled.optim_state),
        jax.tree.leaves(state.optim_state),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-6)


def test_no_tracer_is_left_behind():
    with jax.checking_leaks():
        svi = svi_of(model, form="SubsampleSVI")
        state = init(svi, rows=ROWS)
    values = internals.initial_values(svi.guide.fn)
    assert all(isinstance(own, jax.Array) for own in values.values())
    posterior = svi.guide.median(svi.get_params(state))
    assert posterior["a"].shape == (N,)


def test_strategy_that_holds_values():
    strategy = init_to_value(values={"mu": 2.0, "a": X})
    guide = AutoNormal(model, init_loc_fn=strategy)
    svi = svi_of(model, guide, "SubsampleSVI")
    params = svi.get_params(init(svi, rows=ROWS))
    np.testing.assert_allclose(params["mu_auto_loc"], np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(params["a_auto_loc"], X, rtol=1e-6)
