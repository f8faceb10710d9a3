"""Warnings, by data flow, where latents may meet the data of other rows."""

import copy
import gc
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive, TraceEnum_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoNormal,
    AutoSemiDAIS,
)

from checks import told
from models import (
    TRUTH,
    N,
    X,
    hierarchy,
    indexing,
    latent_and_obs,
    local,
    pinned_plate,
    plate,
    rows_plate,
    sliced,
    sliced_and_pinned,
    subsampling,
    svi_of,
)
from numpyro_dynamic_subsample import (
    MisalignedSubsampleWarning,
    UnscaledSubsampleWarning,
    dynamic_subsample,
    minibatch,
)
from numpyro_dynamic_subsample.effect import warn

B = 4
ROWS = np.array([5, 0, 3])


def init(svi, x=TRUTH[:B], rows=None, **keywords):
    rows = jnp.arange(len(x)) if rows is None else rows
    return svi.init(jax.random.key(0), x, rows, **keywords)


def warned():
    return pytest.warns(MisalignedSubsampleWarning)


@contextmanager
def gathered(category=Warning):
    """The warnings that are given, none of them an error."""
    found = []
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield found
    found += [own for own in given if issubclass(own.category, category)]


# ------------------------------------------------------------------ rows and data


def covariates_only(x, rows):
    """The data are in a distribution's parameters, and all else is the same."""
    with plate(x, rows) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(z - TRUTH[idx], 1), obs=0.0)


def without_data(x, rows):
    with plate(x, rows):
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.factor("f", -(z**2))


def data_elsewhere(x, rows):
    with plate(x, rows):
        numpyro.sample("z", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(0, 1), obs=1.0)


def of_global(x, rows):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with plate(x, rows):
        numpyro.sample("y", dist.Normal(mu, 1), obs=x)


def amortised(x, rows):
    w = numpyro.param("w", 1.0)
    with plate(x, rows):
        numpyro.sample("z", dist.Normal(w * x, 1))


def unaligned(model):
    """How many warnings the first two calls give, eager and traced."""
    guide = amortised if model is sliced else AutoNormal(model)
    svi = svi_of(model, guide)
    with gathered() as given:
        state = init(svi)
        jax.eval_shape(svi.update, state, TRUTH[:B], jnp.arange(B))
    return [w.category for w in given]


@pytest.mark.parametrize(
    "model",
    [
        indexing,
        subsampling,
        covariates_only,
        without_data,
        data_elsewhere,
        of_global,
        sliced,
        sliced_and_pinned,
    ],
)
def test_no_false_alarm(model):
    assert unaligned(model) == []


def test_no_false_alarm_for_full_size_or_pins_around():
    svi = svi_of(sliced)
    init(svi, TRUTH)
    with handlers.substitute(data={"n": jnp.arange(B)}):
        init(svi)
    # Only now are rows drawn.
    with warned():
        init(svi)


def param_per_row(x, rows):
    """A parameter of the model follows the rows, and the data do not."""
    with plate(x, rows):
        bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(z + bias, 1), obs=x)


def factor_of_data(x, rows):
    with plate(x, rows):
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.factor("y", -((z - x) ** 2))


@pytest.mark.parametrize("model", [param_per_row, factor_of_data])
def test_data_that_do_not_follow(model):
    assert unaligned(model) == [MisalignedSubsampleWarning]


def indexed_by_hand(x, rows):
    loc = numpyro.param("loc", jnp.zeros(N))
    with plate(x, rows) as idx:
        numpyro.sample("z", dist.Normal(loc[idx], 1))


def semi_dais(model):
    return AutoSemiDAIS(model, model, None, None)


GUIDES = [AutoNormal, AutoDiagonalNormal, semi_dais, lambda model: indexed_by_hand]


@pytest.mark.parametrize("make", GUIDES)
def test_guides_with_parameters_per_row(make):
    svi = svi_of(sliced, make(sliced))
    # A joint guide makes its first call at full size.
    init(svi, TRUTH)
    with warned() as given:
        init(svi)
        init(svi)
    (message,) = (str(w.message) for w in given)
    for part in ("Plate 'n' draws 4 of its 8 rows", "['z']", "x[idx]", "rows={'n'"):
        assert part in message


@pytest.mark.parametrize("pins", [{}, {"n": jnp.arange(B)}], ids=["drawn", "pinned"])
def test_guides_served_one_by_one(pins):
    def model(x, rows):
        with plate(x, rows):
            latent_and_obs(x, "a")
            latent_and_obs(x, "z")

    parts = [
        AutoDelta(handlers.block(model, hide=["z", "y_z"]), prefix="a_auto"),
        AutoDelta(handlers.block(model, hide=["a", "y_a"]), prefix="z_auto"),
    ]

    def guide(x, rows):
        for part in parts:
            part(x, rows)

    with gathered() as given, handlers.substitute(data=pins), dynamic_subsample():
        init(svi_of(model, guide, "context"))
    latents = [name for w in given for name in "az" if f"['{name}']" in str(w.message)]
    assert latents == ([] if pins else ["a", "z"])


def test_error_instead_of_warning_stays_one():
    svi = svi_of(sliced)
    for _ in range(2):
        with pytest.raises(MisalignedSubsampleWarning):
            init(svi)


def test_copies_are_guides_of_their_own_and_none_is_kept():
    before = len(warn._looked_at)
    guide = dynamic_subsample(AutoNormal(sliced))
    other = copy.deepcopy(guide)
    for own in (guide, other):
        with warned() as given:
            init(svi_of(sliced, own))
            init(svi_of(sliced, own))
        assert len(given) == 1
    del own, guide, other
    gc.collect()
    assert len(warn._looked_at) <= before


def test_model_that_needs_concrete_values_is_left_alone():
    def model(x, rows):
        if x.sum() > 0:
            sliced(x, rows)

    init(svi_of(model))


def discrete(x, rows):
    with plate(x, rows) as idx:
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(k, 1), obs=TRUTH[idx])


def guide_of_discrete(x, rows):
    with plate(x, rows):
        logits = numpyro.param("logits", jnp.zeros(N), event_dim=0)
        numpyro.sample("k", dist.Bernoulli(logits=logits))


def test_score_function_in_a_subsampled_plate():
    def guide(x, rows):
        guide_of_discrete(x, rows)

    svi = svi_of(discrete, guide, "SubsampleSVI", TraceGraph_ELBO())
    init(svi, TRUTH)
    with pytest.warns(UserWarning, match=r"'n', 8 / 4, twice .* site 'k'") as given:
        state = init(svi)
        jax.eval_shape(svi.update, state, TRUTH[:B], jnp.arange(B))
    assert len(given) == 1
    enumerated = TraceEnum_ELBO(max_plate_nesting=1)
    init(svi_of(discrete, guide_of_discrete, "SubsampleSVI", enumerated))
    init(svi_of(indexing, AutoNormal, "SubsampleSVI", TraceGraph_ELBO()))


def test_constant_observations_are_no_data_of_other_rows():
    def model(size):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.zeros(len(idx)))

    svi_of(model).init(jax.random.key(0), 4)


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


def own_plate(groups, size=10):
    return numpyro.plate("ratings", size, subsample_size=5)


GROUP, Y = jnp.array([0, 0, 1, 2, 2]), jnp.ones(5)


def warnings_of(model, count=None, size=3):
    guide = AutoDelta(handlers.block(model, hide=["y"]))
    svi = svi_of(model, guide, "SubsampleSVI")
    rows = {"groups": jnp.arange(size)}
    counts = None if count is None else {"groups": count}
    batch = told(GROUP, Y, jnp.array(3), rows=rows, counts=counts)
    with gathered(UnscaledSubsampleWarning) as given:
        for _ in range(2):
            svi.init(jax.random.key(0), batch)
    return [str(warning.message) for warning in given]


def test_data_of_groups_without_a_scale():
    (message,) = warnings_of(of_groups(plate_of_batch))
    scale = "handlers.scale(scale=8 / count)"
    for part in ("'y'", "'groups'", "3 of its 8 rows", scale):
        assert part in message


def test_scale_of_another_plate():
    (message,) = warnings_of(of_groups(partial(own_plate, size=20)))
    assert "the scale of its own plates, 4, and not that of 'groups', 2.667" in message


def test_scale_that_cannot_follow_the_count():
    constant = of_groups(scaled_by(lambda groups: 8 / 3))
    assert warnings_of(constant) == []
    (message,) = warnings_of(constant, count=2)
    assert "constant scale, which cannot follow the count" in message


SCALED = {
    "by the groups": (scaled_by(lambda groups: 8 / groups), 3),
    "a subsampled plate of its own": (own_plate, 4),
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
    masked = handlers.mask(AutoNormal(local), mask=False)
    svi = svi_of(local, masked, "context")
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
        args = X[:3], jnp.array([0, 9, 1])
        Predictive(predicting, SAMPLES)(jax.random.key(0), *args)


# ------------------------------------------------------------------ places


@pytest.mark.parametrize("how", ["eager", "jit", "fit"])
def test_warnings_stand_at_the_users_line(how):
    svi = svi_of(hierarchy(), form="SubsampleSVI")
    with gathered(MisalignedSubsampleWarning) as given:
        if how == "fit":
            svi.fit(jax.random.key(0), [X[:3]], 1, progress_bar=False)
        elif how == "eager":
            svi.init(jax.random.key(0), X[:3])
        else:
            jax.jit(svi.init)(jax.random.key(0), X[:3])
    assert {warning.filename for warning in given} == {__file__}


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
    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    batch = minibatch(X[ROWS], rows={"stars": ROWS}, capacity=capacity)
    with gathered(UnscaledSubsampleWarning) as given:
        svi.init(jax.random.key(0), batch)
    return [str(warning.message) for warning in given]


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
