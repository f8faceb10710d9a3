"""What cannot be served says so, and leaves everything as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from models import hierarchy, plate_of
from numpyro_dynamic_subsample import (
    MisalignedSubsampleWarning,
    SubsampleSVI,
    dynamic_subsample,
    minibatch,
)


def model(rows=3, size=8, name="n", dim=None, pins=None):
    pins = {} if pins is None else {name: pins}
    with handlers.substitute(data=pins):
        plate = numpyro.plate(name, size, subsample_size=rows, dim=dim)
    with plate:
        numpyro.sample("z", dist.Normal(0, 1))


def pinning_two_rows(rows):
    with plate_of(jnp.arange(2)):
        numpyro.sample("z", dist.Normal(0, 1))


CASES = {
    "full size": (
        {"size": 9},
        r"^Give plate 'n' the number of rows.*size 9, .*made for 8 rows.*new guide",
    ),
    "no rows": (
        {"rows": 0},
        r"^Plate 'n' \(size 8\).*subsample of 0 rows.*at least one",
    ),
    "too many": (
        {"rows": 9},
        r"^Plate 'n' \(size 8\).*subsample of 9 rows.*whole data",
    ),
    "gone": ({"name": "m"}, r"plate 'n' that the model no longer has.*\['m'\].*model="),
    "rows above": (
        {"pins": jnp.array([0, 8])},
        r"'n' \(size 8\) run from 0 to 8.*clamp",
    ),
    "rows below": ({"pins": jnp.array([-1, 2])}, r"run from -1 to 2, outside 0 to 7"),
    "float rows": ({"pins": jnp.array([1.0, 2.0])}, r"vector of integers.*float"),
    "table of rows": ({"pins": jnp.array([[1]])}, r"vector of integers.*\(1, 1\)"),
    "too many pins": ({"pins": jnp.arange(9) % 8}, r"subsample of 9 rows"),
}


@pytest.mark.parametrize("form", ["wrapper", "context"])
@pytest.mark.parametrize(("kwargs", "message"), CASES.values(), ids=CASES)
def test_model_that_the_guide_cannot_follow(kwargs, message, form):
    inner = AutoNormal(model)
    guide = dynamic_subsample(inner) if form == "wrapper" else inner
    with handlers.seed(rng_seed=0), dynamic_subsample():
        guide()
        state = dict(vars(inner))
        with pytest.raises(ValueError, match=message):
            guide(**kwargs)
        assert vars(inner) == state
        assert guide(rows=5)["z"].shape == (5,)


@pytest.mark.parametrize("rows", [0, 9])
def test_first_call_is_checked_too(rows):
    guide = dynamic_subsample(AutoNormal(model))
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match="between 1 and 8"):
        guide(rows=rows)
    assert guide.prototype_trace is None


def test_pins_around_the_call_are_checked():
    guide = dynamic_subsample(AutoNormal(model))
    pins = handlers.substitute(data={"n": jnp.array([1, 2, 11])})
    with handlers.seed(rng_seed=0), pins:
        with pytest.raises(ValueError, match="run from 1 to 11, outside 0 to 7"):
            guide()


def test_wrapped_guide_with_create_plates():
    def create_plates(rows=3):
        return numpyro.plate("n", 8, subsample_size=3)

    guide = dynamic_subsample(AutoNormal(model, create_plates=create_plates))
    with handlers.seed(rng_seed=0):
        with pytest.raises(ValueError, match="has create_plates.*Leave create_plates"):
            guide(rows=3)


def test_guide_that_pins_other_rows():
    guide = dynamic_subsample(pinning_two_rows, model=model)
    with handlers.seed(rng_seed=0):
        assert guide(2) is None
        with pytest.raises(ValueError, match=r"pins 2 rows of plate 'n'.*asks for 3"):
            guide(3)


def test_guide_without_a_model():
    with pytest.raises(ValueError, match="does not know the model.*model=model"):
        dynamic_subsample(pinning_two_rows)
    with pytest.raises(ValueError, match="does not know the model.*model=model"):
        dynamic_subsample()(pinning_two_rows)


@pytest.mark.parametrize("where", ["guide", "model"])
def test_exceptions_of_the_users_pass_through(where):
    fail = False

    def failing_model(rows):
        if fail and where == "model":
            raise ZeroDivisionError("in the model")
        model(rows)

    def failing_guide(rows):
        with numpyro.plate("n", 8, subsample_size=2):
            numpyro.sample("z", dist.Normal(0, 1))
            if fail and where == "guide":
                raise ZeroDivisionError("in the guide")

    guide = dynamic_subsample(failing_guide, model=failing_model)
    seeded = handlers.seed(guide, 0)
    seeded(3)
    fail = True
    with pytest.raises(ZeroDivisionError, match=f"in the {where}"):
        seeded(3)
    fail = False
    assert handlers.trace(seeded).get_trace(3)["z"]["value"].shape == (3,)


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


@pytest.mark.parametrize("what", ["batches", "validation"])
def test_what_is_no_loader(fitted, what):
    batches = {"batches": [batch({"people": np.arange(3)})]} | {what: 3}
    with pytest.raises(ValueError, match=f"{what} must be a list .*, not int"):
        fitted[0].fit(KEY, **batches, progress_bar=False)


def test_plain_loader_is_told_of_minibatch():
    svi = SubsampleSVI(people, AutoNormal(people), optax.sgd(0.1), Trace_ELBO())
    message = r"pin the rows that it holds: minibatch\(..., rows={'people': rows}\)"
    with pytest.warns(MisalignedSubsampleWarning, match=message):
        svi.fit(KEY, [Y[:4], Y[4:]], progress_bar=False)
