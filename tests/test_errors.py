"""What cannot be served says so, and leaves everything as it was."""

import jax
import numpy as np
import optax
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from models import hierarchy
from numpyro_dynamic_subsample import (
    SubsampleSVI,
    minibatch,
)

# ------------------------------------------------------------------ of SubsampleSVI

KEY = jax.random.key(0)
Y = np.linspace(0, 1, 8, dtype="float32")
people = hierarchy(8, "people")


@pytest.fixture(scope="module")
def fitted():
    svi = SubsampleSVI(people, AutoNormal(people), optax.sgd(0.1), Trace_ELBO())
    return svi, svi.init(KEY, batch({"people": np.arange(3)}))


def batch(rows, count=3, **options):
    return minibatch(np.resize(Y, count), rows=rows, **options)


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
@pytest.mark.parametrize("rows", [np.arange(3), None], ids=["rows", "None"])
def test_wrong_plate_is_named_with_the_right_one(fitted, method, rows):
    # A warning of rows that are not pinned, which are that for the wrong name, would
    # be an error of its own here.
    svi, state = fitted
    if method == "init":
        svi = SubsampleSVI(people, AutoNormal(people), optax.sgd(0.1), Trace_ELBO())
    message = r"The batch names a plate 'peple' .*\['people'\]. Did you mean 'people'\?"
    with pytest.raises(ValueError, match=message):
        METHODS[method](svi, state, batch({"peple": rows}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padded", [False, True], ids=["batch", "capacity"])
def test_more_rows_than_the_plate_has(fitted, method, padded):
    too_many = {"people": np.arange(3 if padded else 9) % 8}
    options = {"capacity": 9} if padded else {"count": 9}
    message = r"'people' \(size 8\).*subsample of 9 rows.*capacity of 8 or less.*size=8"
    with pytest.raises(ValueError, match=message):
        METHODS[method](*fitted, batch(too_many, **options))


def test_padding_ends_where_the_message_says(fitted):
    svi, state = fitted
    padded = batch({"people": np.arange(3)}, capacity=9, size=8)
    assert np.isfinite(svi.update(state, padded)[1])


ARGUMENTS = {
    "no fit": (None, batch({"people": None}), "second .*, not NoneType"),
    "a batch": (batch({"people": None}), [], "second .*, not Minibatch"),
    "no batch": ("state", None, r"one Minibatch or .*, not NoneType: give minibatch\("),
    "data": ("state", Y, "one Minibatch or .*, not ndarray: give"),
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
