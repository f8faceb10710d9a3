"""Slips that users make: each is an error, a warning, or a loss that is NaN."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from models import N, hierarchy, pinned_plate, plate
from numpyro_dynamic_subsample import (
    MisalignedSubsampleWarning,
    SubsampleSVI,
    UnscaledSubsampleWarning,
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
    state = svi.init(jax.random.key(0), X[ROWS], indices={"n": ROWS})
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
    good, loss = step(state, X[ROWS], indices={"n": ROWS}, valid={"n": 3})
    assert jnp.isfinite(loss)
    bad, loss = step(state, X[ROWS], indices=rows, valid=count)
    assert jnp.isnan(loss)
    before, after, moved = (svi.get_params(s) for s in (state, bad, good))
    for name, value in after.items():
        changed = np.asarray(value != before[name])
        assert np.isnan(value)[changed].all(), name
        assert changed.any() or "z_" in name
        assert np.isfinite(moved[name]).all()
    # What follows is NaN, too.
    assert jnp.isnan(step(bad, X[ROWS], indices={"n": ROWS}, valid={"n": 3})[1])


@pytest.mark.parametrize("rows", [[5, 0, 8], [5, 0, -1]])
def test_known_rows_out_of_range_are_an_error(steps, rows):
    svi, state, _ = steps
    with pytest.raises(ValueError, match=r"plate 'n' \(size 8\) run from .* 0 to 7"):
        svi.update(state, X[ROWS], indices={"n": rows})


def test_rows_as_a_list_in_a_compiled_step(steps):
    _, state, step = steps
    of_list = step(state, X[ROWS], indices={"n": [5, 0, 3]})[1]
    assert of_list == step(state, X[ROWS], indices={"n": ROWS})[1]


KEYWORDS = {
    "valid": ({"valid": 3}, "valid must be a dict with plates for keys, not int"),
    "indices": ({"indices": ROWS}, "indices must be a dict .* not ndarray.*position"),
}


@pytest.mark.parametrize(("keywords", "message"), KEYWORDS.values(), ids=KEYWORDS)
def test_keywords_that_are_no_dict(steps, keywords, message):
    svi, state, _ = steps
    with pytest.raises(ValueError, match=message):
        svi.update(state, X[ROWS], **keywords)


def test_models_arguments_called_indices_and_valid():
    def model(x, indices, valid):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(indices.sum() + valid, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    batch = minibatch(X[ROWS], indices=ROWS, valid=2.0, rows={"n": ROWS})
    state = svi.init(jax.random.key(0), batch)
    by_name = svi.evaluate(state, batch)
    args = X[ROWS], jnp.asarray(ROWS), 2.0
    np.testing.assert_allclose(by_name, svi.evaluate(state, *args, indices={"n": ROWS}))


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


SVI_OF_MODEL = SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
NO_GUIDES = {
    "a class": (AutoNormal, r"got the class AutoNormal.*AutoNormal\(model\)"),
    "a kernel": (NUTS(model), "got NUTS, which has no guide"),
    "an SVI": (SVI_OF_MODEL, "Wrap its guide before"),
    "a model": (model, r"not know the model.*If this is the model.*AutoNormal\(model"),
    "a number": (3, "got 3, which cannot be called"),
}


@pytest.mark.parametrize(("guide", "message"), NO_GUIDES.values(), ids=NO_GUIDES)
def test_what_is_no_guide(guide, message):
    with pytest.raises(ValueError, match=message):
        dynamic_subsample(guide)


# ------------------------------------------------------------------ scales


def of_groups(around, size=3):
    """Ratings that belong to the groups of a batch, with some handler around."""

    def model(group, y, groups):
        with numpyro.plate("groups", N, subsample_size=size):
            a = numpyro.sample("a", dist.Normal(0, 1))
        with around(groups):
            numpyro.sample("y", dist.Normal(a[group], 1), obs=y)

    return model


def plate_of_batch(groups):
    return numpyro.plate("ratings", 5)


def scaled_by(scale):
    return lambda groups: handlers.scale(scale=scale(groups))


def own_plate(groups):
    return numpyro.plate("ratings", 20, subsample_size=5)


GROUP, Y = jnp.array([0, 0, 1, 2, 2]), jnp.ones(5)


def warnings_of(model, valid=None, size=3):
    guide = AutoDelta(handlers.block(model, hide=["y"]))
    svi = SubsampleSVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    rows = {"groups": jnp.arange(size)}
    counts = None if valid is None else {"groups": valid}
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            svi.init(
                jax.random.key(0), GROUP, Y, jnp.array(3), indices=rows, valid=counts
            )
    found = [w for w in given if w.category is UnscaledSubsampleWarning]
    return [str(warning.message) for warning in found]


def test_data_of_groups_without_a_scale():
    (message,) = warnings_of(of_groups(plate_of_batch))
    for part in ("'y'", "'groups'", "3 of its 8 rows", "handlers.scale(scale=8 / gr"):
        assert part in message


def test_scale_that_cannot_follow_the_count():
    constant = of_groups(scaled_by(lambda groups: 8 / 3))
    assert warnings_of(constant) == []
    (message,) = warnings_of(constant, valid=2)
    assert "constant scale, which cannot follow the count" in message


SCALED = {
    "by the groups": (scaled_by(lambda groups: 8 / groups), 3),
    "a subsampled plate of its own": (own_plate, 3),
    "all groups": (plate_of_batch, N),
}


@pytest.mark.parametrize(("around", "size"), SCALED.values(), ids=SCALED)
def test_scaled_data_give_no_warning(around, size):
    assert warnings_of(of_groups(around, size), size=size) == []
    if size < N:
        assert warnings_of(of_groups(around, size), valid=2, size=size) == []


def test_factor_gives_no_warning():
    def model(group, y, groups):
        with numpyro.plate("groups", N, subsample_size=3):
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.factor("f", a.sum())

    assert warnings_of(model) == []


# ------------------------------------------------------------------ Predictive


def predicting(x, rows=None):
    with plate(x, rows) if rows is None else pinned_plate(x, rows):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z + x, 1))


SAMPLES = {"z": jnp.zeros((2, N))}


def test_samples_of_rows_that_the_plate_draws():
    message = r"'n' draws 3 of its 8 rows, and Predictive takes its latents \['z'\]"
    with dynamic_subsample():
        with pytest.warns(MisalignedSubsampleWarning, match=message):
            Predictive(predicting, SAMPLES)(jax.random.key(0), X[:3])


def test_samples_of_rows_that_are_pinned_or_indexed_or_all():
    def indexing(size):
        with numpyro.plate("n", N, subsample_size=size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z + jnp.asarray(X)[idx], 1))

    with dynamic_subsample():
        Predictive(predicting, SAMPLES)(jax.random.key(0), X[:3], jnp.asarray(ROWS))
        Predictive(predicting, SAMPLES)(jax.random.key(0), X)
        Predictive(indexing, SAMPLES)(jax.random.key(0), 3)


def test_samples_of_rows_beyond_the_plate():
    message = r"plate 'n' \(size 8\) run from 0 to 9"
    with dynamic_subsample(), pytest.raises(ValueError, match=message):
        rows = jnp.array([0, 9, 1])
        Predictive(predicting, SAMPLES)(jax.random.key(0), X[:3], rows)
