"""Plates of guide and model in one call: they agree, or an error says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from models import (
    TRUTH,
    N,
    X,
    indexing,
    latent_and_obs,
    one_latent,
    pinned_plate,
    plate_of,
    rows_moved,
    rows_plate,
    sliced_and_pinned,
    svi_of,
)
from numpyro_dynamic_subsample import dynamic_subsample


def model(rows=3, size=8, name="n", dim=None, pins=None):
    pins = {} if pins is None else {name: jnp.array(pins)}
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
    "rows above": ({"pins": [0, 8]}, r"'n' \(size 8\) run from 0 to 8.*clamp"),
    "rows below": ({"pins": [-1, 2]}, r"run from -1 to 2, outside 0 to 7"),
    "float rows": ({"pins": [1.0, 2.0]}, r"vector of integers.*float"),
    "table of rows": ({"pins": [[1]]}, r"vector of integers.*\(1, 1\)"),
    "too many pins": ({"pins": [0] * 9}, r"subsample of 9 rows"),
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


def test_guide_that_pins_other_rows():
    guide = dynamic_subsample(pinning_two_rows, model=model)
    with handlers.seed(rng_seed=0):
        assert guide(2) is None
        with pytest.raises(ValueError, match=r"pins 2 rows of plate 'n'.*asks for 3"):
            guide(3)


def test_model_that_asks_for_another_size():
    def asking(size):
        return handlers.substitute(lambda: indexing(range(size), None), data={})

    svi = svi_of(asking(3), AutoDelta(asking(4)), "context")
    message = r"asks plate 'n' \(size 8\) for 3 rows, but the guide .* took 4\. Name"
    with pytest.raises(ValueError, match=message), dynamic_subsample():
        svi.init(jax.random.key(0))


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)])
def test_pins_in_guide_and_model_that_differ(loss):
    """The guide's own model pins rows that are next to those of the batch."""

    def off_by_one(x, rows):
        with pinned_plate(x, (rows + 1) % N):
            latent_and_obs(x)

    rows = jnp.array([2, 3, 4, 5])
    key, args = jax.random.key(0), (TRUTH[rows], rows)
    svi = svi_of(sliced_and_pinned, AutoDelta(off_by_one), "context", loss)
    with dynamic_subsample():
        message = r"pins rows \[2 3 4 5\] .* took \[3 4 5 6\]"
        with pytest.raises(ValueError, match=message):
            svi.evaluate(svi.init(key, *args), *args)
        svi = svi_of(sliced_and_pinned, AutoDelta, "context", loss)
        svi.evaluate(svi.init(key, *args), *args)


def test_plate_name_at_two_dims():
    def model(size):
        with numpyro.plate("n", N, subsample_size=size, dim=-1) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("n", N, subsample_size=size, dim=-2):
            numpyro.sample("y", dist.Normal(z[:, None], 1), obs=X[idx][:, None])

    svi = svi_of(model, AutoDelta)
    assert len(rows_moved(svi, svi.init(jax.random.key(0), 4), 3)) == 3


def test_function_that_reads_what_a_plates_message_has():
    def look(site):
        assert "fn" in site
        assert "scale" in site

    guide = dynamic_subsample(AutoDelta(one_latent))
    with handlers.seed(rng_seed=0), handlers.substitute(substitute_fn=look):
        assert guide(3)["z"].shape == (3,)


def test_two_autoguides_share_drawn_rows_with_an_enumerating_objective():
    """Each latent is its own datum less the other; drawn apart, they could not be."""

    def model(size):
        with rows_plate(size) as idx:
            a = numpyro.sample("a", dist.Normal(0, 100))
            b = numpyro.sample("b", dist.Normal(0, 100))
            numpyro.sample("ya", dist.Normal(a, 0.1), obs=10 * X[idx])
            numpyro.sample("yb", dist.Normal(b, 0.1), obs=-10 * X[idx])

    parts = [AutoDelta(handlers.block(model, hide=hide)) for hide in (["b"], ["a"])]

    def guide(size):
        return {**parts[0](size), **parts[1](size)}

    svi = svi_of(model, guide, "context", TraceEnum_ELBO(max_plate_nesting=1))
    with dynamic_subsample():
        state = svi.init(jax.random.key(0), 3)
        params = {"a_auto_loc": 10 * X, "b_auto_loc": -10 * X}
        state = state._replace(optim_state=svi.optim.init(params))
        evaluate = jax.jit(lambda key: svi.evaluate(state._replace(rng_key=key), 3))
        losses = [evaluate(jax.random.key(k)) for k in range(4)]
    each = dist.Normal(0, 100).log_prob(0.0) + dist.Normal(0, 0.1).log_prob(0.0)
    np.testing.assert_allclose(losses, -2 * N * each, rtol=1e-2)
