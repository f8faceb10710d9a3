"""What cannot be served says so, and leaves everything as it was."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.autoguide import AutoNormal

from models import plate_of
from numpyro_dynamic_subsample import dynamic_subsample


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
        r"plate 'n' \(size 8\).*subsample of 0 rows.*at least one",
    ),
    "too many": ({"rows": 9}, r"plate 'n' \(size 8\).*subsample of 9 rows.*whole data"),
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
