"""Slips that users make: each is an error, a warning, or a loss that is NaN."""

import warnings
from contextlib import nullcontext

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

from checks import assert_close, told
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


@pytest.mark.parametrize("rows", [[5, 0, 8], [5, 0, -1]])
def test_known_rows_out_of_range_are_an_error(steps, rows):
    svi, state, _ = steps
    with pytest.raises(ValueError, match=r"plate 'n' \(size 8\) run from .* 0 to 7"):
        svi.update(state, told(X[ROWS], rows={"n": rows}))


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


def warnings_of(model, count=None, size=3):
    guide = AutoDelta(handlers.block(model, hide=["y"]))
    svi = SubsampleSVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    rows = {"groups": jnp.arange(size)}
    counts = None if count is None else {"groups": count}
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            svi.init(
                jax.random.key(0),
                told(GROUP, Y, jnp.array(3), rows=rows, counts=counts),
            )
    found = [w for w in given if w.category is UnscaledSubsampleWarning]
    return [str(warning.message) for warning in found]


def test_data_of_groups_without_a_scale():
    (message,) = warnings_of(of_groups(plate_of_batch))
    scale = "handlers.scale(scale=8 / count)"
    for part in ("'y'", "'groups'", "3 of its 8 rows", scale):
        assert part in message


def test_scale_that_cannot_follow_the_count():
    constant = of_groups(scaled_by(lambda groups: 8 / 3))
    assert warnings_of(constant) == []
    (message,) = warnings_of(constant, count=2)
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
        assert warnings_of(of_groups(around, size), count=2, size=size) == []


def test_factor_without_data_gives_no_warning():
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


def test_samples_of_rows_that_the_plate_draws_without_data():
    def latents_only(size):
        with plate(X[:size], None):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("w", dist.Normal(z, 1))

    with dynamic_subsample(), pytest.warns(MisalignedSubsampleWarning):
        Predictive(latents_only, SAMPLES)(jax.random.key(0), 3)


def test_guide_that_is_masked_in_training_is_no_prediction():
    def indexing(size):
        with numpyro.plate("n", N, subsample_size=size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(X)[idx])

    guide = AutoNormal(indexing)
    masked = handlers.mask(guide, mask=False)
    svi = SVI(indexing, masked, optax.sgd(0.1), Trace_ELBO())
    with dynamic_subsample():
        svi.init(jax.random.key(0), 3)


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


# ------------------------------------------------------------------ shapes


def latent_plus(x, **size):
    with numpyro.plate("people", 100, **size):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def covariates(x):
    with numpyro.plate("people", 100):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z + x, 1), obs=0 * x)


FORMS = {
    "wrapper": lambda model: SVI(
        model, dynamic_subsample(AutoNormal(model)), optax.sgd(0.1), Trace_ELBO()
    ),
    "SubsampleSVI": lambda model: SubsampleSVI(
        model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO()
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [latent_plus, covariates])
def test_sliced_batch_for_a_plate_without_a_subsample_size(model, form):
    message = r"'people' takes all of its 100 rows, but the batch brings 16. .*"
    message += r"numpyro.plate\('people', 100, subsample_size=len\(batch\)\)"
    svi = FORMS[form](model)
    with pytest.raises(ValueError, match=message):
        svi.init(jax.random.key(0), np.ones(16))
    state = svi.init(jax.random.key(0), np.ones(100))
    with pytest.raises(ValueError, match=message):
        svi.update(state, np.ones(16))


def test_data_of_all_rows_in_a_plate_of_one():
    """NumPyro would let all data meet the one latent."""

    def one(x):
        latent_plus(x, subsample_size=1)

    message = r"'y' has data for 100 rows, .* 'people', which takes 1 of its 100"
    with pytest.raises(ValueError, match=message):
        FORMS["SubsampleSVI"](one).init(jax.random.key(0), np.ones(100))


def test_size_of_the_batch_for_that_of_the_plate():
    def model(x):
        with numpyro.plate("people", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = FORMS["SubsampleSVI"](model)
    state = svi.init(jax.random.key(0), np.ones(100))
    message = r"^Give plate 'people' the number of rows of the whole data set, here 100"
    with pytest.raises(ValueError, match=message):
        svi.update(state, np.ones(16))


def test_one_name_for_plates_of_two_sizes():
    def model(x):
        with numpyro.plate("people", 100, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("people", 50, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(0, 1), obs=x)

    message = r"makes plate 'people' twice: .* 16 of 100 rows, and once 16 of 50"
    with pytest.raises(ValueError, match=message):
        FORMS["wrapper"](model).init(jax.random.key(0), np.ones(16))


def test_rows_decide_where_the_plate_asks_for_no_size():
    """Scale included: loss and step are those of a plate that asks for the size."""

    def sized(x):
        latent_plus(x, subsample_size=len(x))

    rows = np.array([7, 99, 3])
    x = np.linspace(-1, 1, 3).astype("float32")
    steps = []
    for model in (latent_plus, sized):
        for capacity in (None, 8):
            batch = minibatch(x, rows={"people": rows}, capacity=capacity)
            svi = FORMS["SubsampleSVI"](model)
            state = svi.init(jax.random.key(0), np.ones(100))
            state, loss = svi.update(state, batch)
            steps.append((loss, svi.get_params(state)["z_auto_loc"]))
    for loss, loc in steps[1:]:
        np.testing.assert_allclose(loss, steps[0][0], rtol=1e-6)
        np.testing.assert_allclose(loc, steps[0][1], rtol=1e-6)


def test_minibatch_for_a_plain_svi():
    batch = minibatch(X[ROWS], rows={"n": ROWS})
    for guide in (AutoNormal(model), dynamic_subsample(AutoNormal(model))):
        svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
        with pytest.raises(TypeError, match="Minibatch is not an array. SubsampleSVI"):
            svi.init(jax.random.key(0), batch)


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


class OfAUser(AutoNormal):
    def median(self, *args, **kwargs):
        return super().median(*args, **kwargs)

    def sample_posterior(self, key, params, sample_shape=()):
        return super().sample_posterior(key, params, sample_shape=sample_shape)


@pytest.mark.parametrize("wrap", [dynamic_subsample, lambda guide: guide])
def test_posterior_methods_that_a_user_overrides(wrap):
    guide = wrap(OfAUser(model))
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    with dynamic_subsample(), handlers.substitute(data={"n": jnp.asarray(ROWS)}):
        params = svi.get_params(svi.init(jax.random.key(0), X[ROWS]))
    with dynamic_subsample():
        assert guide.median(params)["z"].shape == (N,)
        drawn = guide.sample_posterior(jax.random.key(0), params, sample_shape=(2,))
    assert drawn["z"].shape == (2, N)


# ------------------------------------------------------------------ lines of warnings


@pytest.mark.parametrize("how", ["eager", "jit", "fit"])
def test_warnings_stand_at_the_users_line(how):
    svi = SubsampleSVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        if how == "fit":
            svi.fit(jax.random.key(0), [X[:3]], 1, progress_bar=False)
        elif how == "eager":
            svi.init(jax.random.key(0), X[:3])
        else:
            jax.jit(svi.init)(jax.random.key(0), X[:3])
    places = {w.filename for w in given if w.category is MisalignedSubsampleWarning}
    assert places == {__file__}


# ------------------------------------------------------------------ factors


def of_stars(around):
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("stars", N, subsample_size=len(y)):
            z = numpyro.sample("z", dist.Normal(mu, 1))
        with around(y):
            numpyro.factor("f", dist.Normal(z, 0.5).log_prob(y).sum())

    return model


def factor_warnings(model, capacity=None):
    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    batch = minibatch(X[ROWS], rows={"stars": ROWS}, capacity=capacity)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        svi.init(jax.random.key(0), batch)
    return [str(w.message) for w in given if w.category is UnscaledSubsampleWarning]


def test_factor_of_data_outside_of_the_plate():
    (message,) = factor_warnings(of_stars(lambda y: nullcontext()))
    assert "Factor 'f' depends on latents of plate 'stars'" in message
    assert "Move it into the plate, or scale it with handlers.scale" in message
    scaled = of_stars(lambda y: handlers.scale(scale=N / len(y)))
    assert factor_warnings(scaled) == []
    # A context around the step knows nothing of padding.
    for around in (nullcontext(), dynamic_subsample()):
        with around:
            (message,) = factor_warnings(scaled, capacity=5)
        assert "sums over its rows, those of the padding too" in message


def test_number_of_rows_that_is_traced():
    def indexing(size):
        with numpyro.plate("n", N, subsample_size=size) as rows:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(X)[rows])

    svi = SubsampleSVI(indexing, AutoNormal(indexing), optax.sgd(0.1), Trace_ELBO())
    batch = minibatch(3, rows={"n": ROWS})
    state = svi.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"'n' \(size 8\) .* traced.*Leave subsample"):
        jax.jit(svi.update)(state, batch)
