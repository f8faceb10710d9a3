"""What steps are told, and what they refuse: rows, counts, arguments and settings."""

from functools import partial

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

from checks import assert_close, assert_equal, told
from models import N, hierarchy, one_latent, plate_of, rows_moved, svi_of
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample, minibatch

KEY = jax.random.key(0)
X = np.arange(8.0)
ROWS = np.array([5, 0, 3])
people = hierarchy(8, "people")


def batch(rows, count=3, **options):
    return minibatch(np.linspace(0, 1, count, dtype="f4"), rows=rows, **options)


@pytest.fixture(scope="module")
def fitted():
    svi = svi_of(people, form="SubsampleSVI")
    return svi, svi.init(KEY, batch({"people": np.arange(3)}))


def test_without_keywords_it_is_svi():
    """Bit for bit, with a plate that draws its rows."""

    def every_way(cls):
        guide = dynamic_subsample(AutoNormal(one_latent))
        svi = cls(one_latent, guide, optax.sgd(0.1), Trace_ELBO())
        state = svi.init(jax.random.key(1), 3)

        @jax.jit
        def steps(state):
            updates = (svi.update, svi.stable_update, svi.evaluate)
            return [update(state, 5) for update in updates]

        return state, steps(state)

    assert_equal(every_way(SubsampleSVI), every_way(SVI))


REFUSED = {
    "rows of no plate": ({"k": ROWS}, None, r"names a plate 'k'.*\['people'\]"),
    "count of no plate": (None, {"k": 2}, r"names a plate 'k'.*\['people'\]"),
    "count above": (None, {"people": 4}, r"'people' is 4, .*between 1 and 3"),
    "longer": ({"people": np.arange(4)}, None, r"4 rows.*'people'.*takes 3"),
    "shorter": ({"people": np.arange(2)}, None, r"2 rows.*'people'.*takes 3"),
    "out of range": ({"people": [0, 1, 8]}, None, r"run from 0 to 8, outside 0 to 7"),
    "float": ({"people": ROWS * 1.0}, None, r"vector of integers.*float"),
    "table": ({"people": ROWS[:, None]}, None, r"vector of integers.*\(3, 1\)"),
}


@pytest.mark.parametrize(("rows", "counts", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_and_counts_that_are_refused(fitted, rows, counts, message):
    svi, state = fitted
    told_so = told(X[:3], rows=rows, counts=counts)
    for step in (svi.update, svi.stable_update, svi.evaluate):
        with pytest.raises(ValueError, match=message):
            step(state, told_so)
    with pytest.raises(ValueError, match=message):
        svi.init(KEY, told_so)


def test_rows_that_the_model_pins_itself():
    def pinning(x):
        with plate_of(jnp.arange(len(x))):
            numpyro.sample("z", dist.Normal(0, 1))

    svi = svi_of(pinning, form="SubsampleSVI")
    with pytest.raises(ValueError, match="model pins the rows of plate 'n'"):
        svi.init(KEY, told(X[:4], rows={"n": np.arange(4)}))


@pytest.fixture(scope="module", params=[False, True], ids=["ordinary", "row-wise"])
def steps(request):
    """A compiled step, and a state that it starts from."""
    options = {"optim": optax.adam(0.1), "rowwise": request.param}
    svi = svi_of(hierarchy(), form="SubsampleSVI", **options)
    state = svi.init(KEY, told(X[ROWS], rows={"n": ROWS}))
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
    # What follows is NaN, too; and a list is as good as an array.
    assert jnp.isnan(
        step(bad, told(X[ROWS], rows={"n": [5, 0, 3]}, counts={"n": 3}))[1]
    )


def test_models_arguments_may_have_any_name():
    def model(x, indices, valid):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(indices.sum() + valid, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    batch = minibatch(X[ROWS], indices=ROWS, valid=2.0, rows={"n": ROWS})
    state = svi.init(jax.random.key(0), batch)
    by_name = svi.evaluate(state, batch)
    with handlers.substitute(data={"n": jnp.asarray(ROWS)}):
        by_position = svi.evaluate(state, X[ROWS], indices=ROWS, valid=2.0)
    np.testing.assert_allclose(by_name, by_position)


@pytest.mark.parametrize("form", ["wrapper", "context", "SubsampleSVI"])
def test_numpy_rows_in_substitute(form):
    svi = svi_of(hierarchy(), AutoDelta, form)
    pins = handlers.substitute(data={"n": ROWS})
    if form == "wrapper":
        message = r"plate 'n' \(size 8\) are of type ndarray.*jnp.asarray\(rows\)"
        with pins, pytest.raises(ValueError, match=message):
            svi.init(KEY, X[ROWS])
        return
    with dynamic_subsample(), pins:
        assert rows_moved(svi, svi.init(KEY, X[ROWS]), X[ROWS]) == sorted(ROWS)


def crossed(x, rows, columns):
    a = numpyro.plate("a", 6, subsample_size=len(rows), dim=-2)
    b = numpyro.plate("b", 4, subsample_size=len(columns), dim=-1)
    with a, b:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=x)


SETTINGS = [
    partial(jax.numpy_rank_promotion, "raise"),
    partial(jax.numpy_dtype_promotion, "strict"),
    jax.disable_jit,
]


@pytest.mark.parametrize("rowwise", [False, True], ids=["ordinary", "row-wise"])
def test_settings_of_jax_change_nothing(rowwise):
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
        svi = svi_of(crossed, form="SubsampleSVI", rowwise=rowwise)
        state, loss = jax.jit(svi.update)(svi.init(jax.random.key(0), batch), batch)
        return loss, svi.get_params(state)

    expected = step()
    for setting in SETTINGS if rowwise else SETTINGS[:2]:
        with setting():
            assert_close(step(), expected, rtol=1e-5, atol=1e-6)


METHODS = {
    "init": lambda svi, state, batch: svi.init(KEY, batch),
    "update": lambda svi, state, batch: svi.update(state, batch),
    "compiled": lambda svi, state, batch: jax.jit(svi.update)(state, batch),
    "evaluate": lambda svi, state, batch: svi.evaluate(state, batch),
    "fit": lambda svi, state, batch: svi.fit(KEY, [batch], progress_bar=False),
    "predict": lambda svi, state, batch: svi.predict(KEY, state, batch, 2),
    "likelihood": lambda svi, state, batch: svi.log_likelihood(KEY, state, batch, 2),
    "grow": lambda svi, state, batch: svi.grow(state, batch),
}


@pytest.mark.parametrize("method", METHODS)
def test_wrong_plate_is_named_with_the_right_one(fitted, method):
    # A warning of rows that are not pinned, which are that for the wrong name, would
    # be an error of its own here.
    svi, state = fitted
    if method == "init":
        svi = svi_of(people, form="SubsampleSVI")
    message = r"The batch names a plate 'peple' .*\['people'\]. Did you mean 'people'\?"
    for rows in (np.arange(3), None):
        with pytest.raises(ValueError, match=message):
            METHODS[method](svi, state, batch({"peple": rows}))


@pytest.mark.parametrize("method", METHODS)
def test_more_rows_than_the_plate_has(fitted, method):
    message = r"'people' \(size 8\).*subsample of 9 rows.*capacity of 8 or less.*size=8"
    for own in (
        batch({"people": np.arange(3)}, capacity=9),
        batch({"people": np.arange(9) % 8}, count=9),
    ):
        with pytest.raises(ValueError, match=message):
            METHODS[method](*fitted, own)


def test_padding_ends_where_the_message_says(fitted):
    svi, state = fitted
    padded = batch({"people": np.arange(3)}, capacity=9, size=8)
    assert np.isfinite(svi.update(state, padded)[1])


ARGUMENTS = {
    "no fit": (None, batch({"people": None}), "second .*, not NoneType"),
    "a batch": (batch({"people": None}), [], "second .*, not Minibatch"),
    "no batch": ("state", None, r"one Minibatch or .*, not NoneType: give minibatch\("),
    "data": ("state", X, "one Minibatch or .*, not ndarray: give"),
}


@pytest.mark.parametrize("method", ["predict", "log_likelihood"])
@pytest.mark.parametrize(
    ("given", "batches", "message"), ARGUMENTS.values(), ids=ARGUMENTS
)
def test_arguments_in_the_wrong_place(fitted, method, given, batches, message):
    svi, state = fitted
    given = state if isinstance(given, str) else given
    with pytest.raises(ValueError, match=message):
        getattr(svi, method)(KEY, given, batches)
    with pytest.raises(TypeError, match="random key.*Here it is the integer 0"):
        getattr(svi, method)(0, given, batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((AutoNormal(people), people, optax.sgd(0.1), Trace_ELBO()), "not AutoNormal"),
        ((people, AutoNormal(people), optax.sgd(0.1), Trace_ELBO), "Trace_ELBO\\(\\)"),
    ],
)
def test_arguments_in_another_order_and_classes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubsampleSVI(*arguments)
