"""Values of all rows that handlers give to sites, and what a batch gets of them."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.util import log_density

from checks import assert_close
from models import TRUTH, N, X, plate_of, rows_moved, sliced_and_pinned, svi_of
from numpyro_dynamic_subsample import dynamic_subsample, minibatch

Z = jnp.arange(float(N))
Y = np.asarray(3 * Z, "float32")
BATCHES = {
    "some": [5, 3, 0],
    "one": [4],
    "twice": [2, 2, 7],
    "in order": list(range(N)),
    "shuffled": [5, 3, 0, 1, 4, 2, 7, 6],
}


def base(y):
    b = numpyro.sample("b", dist.Normal(0, 1))
    with numpyro.plate("n", N, subsample_size=len(y)):
        z = numpyro.sample("z", dist.Normal(0, 10))
        w = numpyro.sample("w", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b * z + w, 1), obs=y)


def loss_by_hand(params, rows, prior_of_z=True):
    """The negative log density of the model at the guide's point, with known `z`."""
    rows = np.array(rows)
    b, w, z = params["b_auto_loc"], params["w_auto_loc"][rows], Z[rows]
    density = dist.Normal(0, 1).log_prob(w) + dist.Normal(b * z + w, 1).log_prob(
        Y[rows]
    )
    if prior_of_z:
        density += dist.Normal(0, 10).log_prob(z)
    return -dist.Normal(0, 1).log_prob(b) - N / len(rows) * density.sum()


GIVERS = {
    "condition": lambda model: handlers.condition(model, data={"z": Z}),
    "a function": lambda model: handlers.condition(
        model, condition_fn=lambda site: Z if site["name"] == "z" else None
    ),
    "behind a block": lambda model: handlers.block(
        handlers.condition(model, data={"z": Z}), hide=["z"]
    ),
}


@pytest.mark.parametrize(
    ("giver", "first"),
    [("condition", "some"), ("a function", "in order"), ("behind a block", "some")],
)
def test_conditions_of_all_rows(giver, first):
    """Also where the first call brings a batch."""
    svi = svi_of(GIVERS[giver](base), AutoDelta, "SubsampleSVI")

    def batch(name):
        rows = np.array(BATCHES[name])
        return minibatch(Y[rows], rows={"n": rows})

    state = svi.init(jax.random.key(0), batch(first))
    params = svi.get_params(state)
    for name in ("some", "one", "twice", "in order"):
        # A blocked site has no density of its own.
        expected = loss_by_hand(params, BATCHES[name], giver != "behind a block")
        loss = svi.evaluate(state, batch(name))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    message = r"All 8 rows of plate 'n' are pinned, but not in .* `condition` .* 'z'"
    with pytest.raises(ValueError, match=message):
        svi.evaluate(state, batch("shuffled"))


def intervened(dose):
    """As `do` means it: the outcome takes the dose, and `d` goes on as it was."""

    def model(size):
        with numpyro.plate("n", N, subsample_size=size) as rows:
            z = numpyro.sample("z", dist.Normal(0, 1))
            if dose is None:
                d = numpyro.sample("d", dist.Normal(z, 1))
            else:
                numpyro.sample("d", dist.Normal(z, 1))
                d = dose[rows]
            numpyro.deterministic("mean", z + 100 * d)
            numpyro.sample("y", dist.Normal(z + d, 1), obs=jnp.asarray(Y)[rows])

    return model


@pytest.mark.parametrize("rows", ["some", "one", "in order"])
def test_interventions_on_all_rows(rows):
    """Loss and sites are those of a model with the values written into it."""
    rows = np.array(BATCHES[rows])
    observed = handlers.do(intervened(None), data={"d": 10 * Z})
    by_hand = intervened(10 * Z)
    latents = {"z": Z[None, rows] / 2, "d": Z[None, rows]}
    found, key = [], jax.random.key(0)
    for model in (observed, by_hand):
        svi = svi_of(model, AutoDelta(by_hand), "context")
        with dynamic_subsample(), handlers.substitute(data={"n": jnp.asarray(rows)}):
            mean = Predictive(model, latents)(key, len(rows))["mean"]
            found.append((mean, svi.evaluate(svi.init(key, len(rows)), len(rows))))
    assert_close(*found, rtol=1e-6)


@pytest.mark.parametrize("handler", [handlers.condition, handlers.do])
def test_a_wrapper_alone_says_that_it_cannot_reach_them(handler):
    model = handler(base, data={"z": Z})
    svi = svi_of(model, AutoDelta)
    state = svi.init(jax.random.key(0), Y)
    svi.evaluate(state, Y)
    message = rf"`{handler.__name__}` gives site 'z' .* all 8 rows of plate 'n', .* 1 "
    with handlers.substitute(data={"n": jnp.array([4])}):
        with pytest.raises(ValueError, match=message):
            svi.evaluate(state, Y[4:5])


def mixture(y):
    with numpyro.plate("n", N, subsample_size=len(y)):
        e = numpyro.sample("e", dist.Normal(0, 0.5))
        infer = {"enumerate": "parallel"}
        s = numpyro.sample("s", dist.Categorical(jnp.ones(2) / 2), infer=infer)
        numpyro.sample("y", dist.Normal(jnp.array([-3.0, 3.0])[s] + e, 0.1), obs=y)


@pytest.mark.parametrize("rows", ["one", "shuffled"])
def test_infer_discrete_with_samples_of_all_rows(rows):
    truth = np.arange(N) % 2
    samples = {"e": jnp.tile(Z / N, (5, 1))}
    rows = jnp.array(BATCHES[rows])
    y = (jnp.where(truth, 3.0, -3.0) + Z / N)[rows]
    pinned = handlers.substitute(mixture, data={"n": rows})
    with dynamic_subsample():
        predict = Predictive(pinned, samples, infer_discrete=True)
        found = predict(jax.random.key(0), y)["s"]
    expected = np.tile(truth[rows], (5, 1))
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_samples_given_by_a_function():
    """As packages do that call NumPyro's handlers by themselves."""
    rows, key = jnp.array(BATCHES["some"]), jax.random.key(0)

    def give(site):
        return {"z": Z, "w": 0 * Z, "b": jnp.array(1.0)}.get(site["name"])

    with dynamic_subsample(), handlers.substitute(data={"n": rows}):
        given = handlers.substitute(handlers.seed(base, key), substitute_fn=give)
        trace = handlers.trace(given).get_trace(jnp.zeros(3))
    np.testing.assert_array_equal(trace["z"]["value"], Z[rows])
    np.testing.assert_allclose(trace["y"]["fn"].loc, Z[rows])


def test_rows_of_one_plate_that_pin_another():
    """Default rows of one plate are no default of another."""

    def model():
        with numpyro.plate("all", 5) as rows:
            numpyro.sample("u", dist.Normal(0, 1))
        with handlers.substitute(data={"b": rows}):
            plate = numpyro.plate("b", 10, subsample_size=5)
        with plate:
            z = numpyro.sample("z", dist.Normal(0, 10))
            numpyro.sample("y", dist.Normal(z, 1), obs=10 * jnp.arange(5.0))

    for form in ("wrapper", "SubsampleSVI"):
        svi = svi_of(model, AutoDelta, form)
        state = svi.init(jax.random.key(0))
        assert rows_moved(svi, state) == list(range(5))


def test_scalar_intervention_where_only_the_guide_is_wrapped():
    model = handlers.do(intervened(None), data={"d": jnp.array(2.0)})
    svi = svi_of(model, AutoDelta)
    message = "`do` replaces site 'd', with a scale that NumPyro counts twice, in plate"
    with pytest.raises(ValueError, match=message):
        svi.init(jax.random.key(0), 3)


def with_condition_fn(x, rows):
    def choose(site):
        return jnp.array(1.0) if site["name"] == "s" else None

    def model():
        s = numpyro.sample("s", dist.LogNormal(0, 1))
        with plate_of(rows):
            z = numpyro.sample("z", dist.Normal(0, 10))
            numpyro.sample("y", dist.Normal(z, s), obs=x)

    handlers.condition(model, condition_fn=choose)()


def with_substitute_inside(x, rows):
    handlers.substitute(sliced_and_pinned, data={"z": 10 * TRUTH})(x, rows)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (with_condition_fn, "wrapper"),
        (with_substitute_inside, "wrapper"),
        (with_condition_fn, "context"),
    ],
)
def test_rows_are_taken_once_whoever_gives_other_sites(model, form):
    """Where each row meets its own, the residuals of all are zero."""
    svi = svi_of(model, AutoDelta(sliced_and_pinned), form)
    rows = jnp.array(BATCHES["shuffled"])
    with dynamic_subsample() if form == "context" else nullcontext():
        state = svi.init(jax.random.key(0), TRUTH[rows], rows)
        state = state._replace(optim_state=svi.optim.init({"z_auto_loc": TRUTH}))
        loss = svi.evaluate(state, TRUTH[rows], rows)
    exact = dist.Normal(0, 10).log_prob(TRUTH) + dist.Normal(0, 1).log_prob(0.0)
    of_scale = dist.LogNormal(0, 1).log_prob(1.0) * (model is with_condition_fn)
    np.testing.assert_allclose(loss, -exact.sum() - of_scale, rtol=1e-5)


def test_log_density_of_samples_of_all_rows():
    rows = jnp.array(BATCHES["shuffled"])
    with dynamic_subsample():
        found, _ = log_density(sliced_and_pinned, (X[rows], rows), {}, {"z": TRUTH})
    exact = dist.Normal(0, 10).log_prob(TRUTH) + dist.Normal(TRUTH, 1).log_prob(X)
    np.testing.assert_allclose(found, exact.sum(), rtol=1e-5)
