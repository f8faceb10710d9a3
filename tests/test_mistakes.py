"""Slips that users make: each is an error, a warning, or a loss that is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from checks import assert_close, told
from models import N, hierarchy
from numpyro_dynamic_subsample import (
    SubsampleSVI,
    dynamic_subsample,
    minibatch,
)

X = np.arange(8.0)
ROWS = np.array([5, 0, 3])


model = hierarchy()


@pytest.fixture(scope="module", params=[False, True], ids=["ordinary", "row-wise"])
def steps(request):
    """A compiled step, and a state that it starts from."""
    guide, optim = AutoNormal(model), optax.adam(0.1)
    svi = SubsampleSVI(model, guide, optim, Trace_ELBO(), rowwise=request.param)
    state = svi.init(jax.random.key(0), told(X[ROWS], rows={"n": ROWS}))
    return svi, state, jax.jit(svi.update)


INVALID = {
    "rows above": ({"n": np.array([5, 0, 8])}, {"n": 3}),
    "negative rows": ({"n": np.array([5, 0, -1])}, {"n": 3}),
    "count above": ({"n": ROWS}, {"n": 4}),
    "count of zero": ({"n": ROWS}, {"n": 0}),
}


@pytest.mark.parametrize(("rows", "count"), INVALID.values(), ids=INVALID)
def test_traced_rows_and_counts_out_of_range_are_nan(steps, rows, count):
    svi, state, step = steps
    good, loss = step(state, told(X[ROWS], rows={"n": ROWS}, counts={"n": 3}))
    assert jnp.isfinite(loss)
    bad, loss = step(state, told(X[ROWS], rows=rows, counts=count))
    assert jnp.isnan(loss)
    before, after, moved = (svi.get_params(s) for s in (state, bad, good))
    for name, value in after.items():
        changed = np.asarray(value != before[name])
        assert np.isnan(value)[changed].all(), name
        assert changed.any() or "z_" in name
        assert np.isfinite(moved[name]).all()
    # What follows is NaN, too.
    assert jnp.isnan(step(bad, told(X[ROWS], rows={"n": ROWS}, counts={"n": 3}))[1])


def test_rows_as_a_list_in_a_compiled_step(steps):
    _, state, step = steps
    of_list = step(state, told(X[ROWS], rows={"n": [5, 0, 3]}))[1]
    assert of_list == step(state, told(X[ROWS], rows={"n": ROWS}))[1]


def test_models_arguments_may_have_any_name():
    def model(x, indices, valid):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(indices.sum() + valid, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    batch = minibatch(X[ROWS], indices=ROWS, valid=2.0, rows={"n": ROWS})
    state = svi.init(jax.random.key(0), batch)
    by_name = svi.evaluate(state, batch)
    with handlers.substitute(data={"n": jnp.asarray(ROWS)}):
        by_position = svi.evaluate(state, X[ROWS], indices=ROWS, valid=2.0)
    np.testing.assert_allclose(by_name, by_position)


@pytest.mark.parametrize("form", ["wrapper", "context", "SubsampleSVI"])
def test_numpy_rows_in_substitute(form):
    svi_class = SubsampleSVI if form == "SubsampleSVI" else SVI
    guide = AutoDelta(model)
    guide = dynamic_subsample(guide) if form == "wrapper" else guide
    svi = svi_class(model, guide, optax.sgd(0.1), Trace_ELBO())
    pins = handlers.substitute(data={"n": ROWS})
    if form == "wrapper":
        message = r"plate 'n' \(size 8\) are of type ndarray.*jnp.asarray\(rows\)"
        with pins, pytest.raises(ValueError, match=message):
            svi.init(jax.random.key(0), X[ROWS])
        return
    with dynamic_subsample(), pins:
        state = svi.init(jax.random.key(0), X[ROWS])
        states = state, svi.update(state, X[ROWS])[0]
        before, after = (svi.get_params(state)["z_auto_loc"] for state in states)
    assert set(np.flatnonzero(before != after)) == set(ROWS)


# ------------------------------------------------------------------ scales


# ------------------------------------------------------------------ Predictive


# ------------------------------------------------------------------ shapes


FORMS = {
    "wrapper": lambda model: SVI(
        model, dynamic_subsample(AutoNormal(model)), optax.sgd(0.1), Trace_ELBO()
    ),
    "SubsampleSVI": lambda model: SubsampleSVI(
        model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO()
    ),
}


# ------------------------------------------------------------------ settings of JAX


def crossed(x, rows, columns):
    a = numpyro.plate("a", 6, subsample_size=len(rows), dim=-2)
    b = numpyro.plate("b", 4, subsample_size=len(columns), dim=-1)
    with a, b:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=x)


SETTINGS = {
    "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no promotion of types": lambda: jax.numpy_dtype_promotion("strict"),
    "no compilation": jax.disable_jit,
}


@pytest.mark.parametrize("rowwise", [False, True], ids=["ordinary", "row-wise"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_jax_change_nothing(setting, rowwise):
    rows, columns = np.array([5, 0, 3]), np.array([2, 1])
    batch = minibatch(
        np.ones((3, 2), "float32"),
        rows,
        columns,
        rows={"a": rows, "b": columns},
        along={"a": {0: 0, 1: 0}, "b": {0: 1, 2: 0}},
        capacity={"a": 4, "b": 3},
    )

    def step():
        guide = AutoNormal(crossed)
        optim, loss = optax.sgd(0.1), Trace_ELBO()
        svi = SubsampleSVI(crossed, guide, optim, loss, rowwise=rowwise)
        state, loss = jax.jit(svi.update)(svi.init(jax.random.key(0), batch), batch)
        return loss, svi.get_params(state)

    expected = step()
    with SETTINGS[setting]():
        assert_close(step(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ users' classes


# ------------------------------------------------------------------ lines of warnings


# ------------------------------------------------------------------ factors
