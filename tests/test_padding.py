"""The handler that lets only the valid rows count."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_dynamic_subsample.batches.padding import valid_rows

N = 8
Y = jnp.asarray(np.random.default_rng(0).normal(size=(N, 3)))


def model(y, size=N, subsample_size=None, name="n"):
    with numpyro.plate(name, size, subsample_size=subsample_size, dim=-2):
        z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("m", y.shape[1]):
            numpyro.sample("y", dist.Normal(z, 2), obs=y)


def density(y, counts=None, **kwargs):
    with valid_rows(counts or {}):
        z = {"z": jnp.linspace(-1, 1, y.shape[0])[:, None]}
        return log_density(model, (y,), kwargs, z)[0]


def unpadded(n, m, size=N, subsample_size=None):
    z = jnp.linspace(-1, 1, N)[:n, None]
    prior = dist.Normal(0, 1).log_prob(z).sum()
    likelihood = dist.Normal(z, 2).log_prob(Y[:n, :m]).sum()
    return (size / n if subsample_size else 1.0) * (prior + likelihood)


@pytest.mark.parametrize("subsample_size", [None, N])
@pytest.mark.parametrize("jit", [False, True])
def test_density_of_nested_plates(subsample_size, jit):
    """A plate that takes all rows has a scale only if it was asked for a subsample."""

    def padded(counts):
        y = Y.at[5:].set(jnp.nan).at[:, 2:].set(jnp.nan)
        return density(y, counts, subsample_size=subsample_size)

    value = (jax.jit(padded) if jit else padded)({"n": 5, "m": 2})
    np.testing.assert_allclose(value, unpadded(5, 2, N, subsample_size), rtol=1e-6)


def test_plates_that_are_not_named_are_untouched():
    value = density(Y, {"m": np.int32(2)})
    np.testing.assert_allclose(value, unpadded(N, 2), rtol=1e-6)
    assert (
        density(Y)
        == log_density(model, (Y,), {}, {"z": jnp.linspace(-1, 1, N)[:, None]})[0]
    )


def test_scale_keeps_the_type_of_the_log_density():
    def scale(n):
        with valid_rows({"n": n}), handlers.seed(rng_seed=0), handlers.trace() as trace:
            with numpyro.plate("n", 16, subsample_size=N):
                numpyro.sample("z", dist.Normal(jnp.float16(0), jnp.float16(1)))
        site = trace["z"]
        return site["scale"] * site["fn"].log_prob(site["value"].astype("float16"))

    assert jax.jit(scale)(np.int32(3)).dtype == "float16"
    assert scale(3).dtype == "float16"


def test_masks_of_the_model_still_hold():
    given = jnp.arange(N) % 2 == 0

    def masked():
        with numpyro.plate("n", N):
            numpyro.sample("y", dist.Normal(0, 1).mask(given), obs=Y[:, 0])

    with valid_rows({"n": 5}):
        value = log_density(masked, (), {}, {})[0]
    expected = dist.Normal(0, 1).log_prob(Y[jnp.array([0, 2, 4]), 0]).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_events_factors_and_observations_without_an_axis():
    def several(x, size):
        with numpyro.plate("n", size):
            numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1), obs=x)
            numpyro.factor("f", x.sum(1))
            numpyro.sample("one", dist.Normal(0, 1), obs=0.5)

    with valid_rows({"n": 5}):
        value = log_density(several, (Y.at[5:].set(jnp.nan), N), {}, {})[0]
    expected = log_density(several, (Y[:5], 5), {}, {})[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("padding", [np.nan, 0.0, -1.0])
def test_gradient_of_observations_outside_of_their_support(padding):
    """Also where the observed value goes on into the model."""

    def grad(y, size):
        def loss(shape):
            def positive():
                with numpyro.plate("n", size):
                    first = numpyro.sample("a", dist.Gamma(shape, 1.0), obs=y)
                    numpyro.sample("b", dist.Gamma(shape * jnp.log(first) ** 2), obs=y)

            return log_density(positive, (), {}, {})[0]

        return jax.grad(loss)(1.5)

    y = jnp.exp(Y[:, 0])
    with valid_rows({"n": 5}):
        value = grad(y.at[5:].set(padding), N)
    np.testing.assert_allclose(value, grad(y[:5], 5), rtol=1e-5)


def test_scan():
    """Plates that are made outside of a scan and entered inside."""

    def series(y, size):
        plate = numpyro.plate("n", size)

        def step(loc, y):
            with plate:
                numpyro.sample("y", dist.Normal(loc, 1), obs=y)
            return loc + 1, None

        scan(step, 0.0, y)

    with valid_rows({"n": 5}):
        value = log_density(series, (Y.T.at[:, 5:].set(jnp.nan), N), {}, {})[0]
    expected = log_density(series, (Y.T[:, :5], 5), {}, {})[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def made_in_scan():
    def step(carry, y):
        with numpyro.plate("n", N):
            numpyro.sample("y", dist.Normal(0, 1), obs=y)
        return carry, None

    scan(step, 0.0, Y.T)


def flat():
    with numpyro.plate("n", N):
        numpyro.sample("z", dist.Normal(0, 1))


COUNTS = {
    "zero": ({"n": 0}, r"plate 'n' is 0, but must be between 1 and 8.*Skip"),
    "negative": ({"n": np.int32(-1)}, "is -1"),
    "above": ({"n": jnp.array(9)}, r"is 9, .*larger capacity"),
    "float": ({"n": 3.0}, r"plate 'n' must be an integer scalar.*type float"),
    "bool": ({"n": True}, "integer scalar.*type bool"),
    "vector": ({"n": np.array([3])}, r"integer scalar.*shape \(1,\)"),
    "unknown": ({"n": 3, "k": 3}, r"names a plate 'k'.*does not have.*\['n'\]"),
}


@pytest.mark.parametrize(("counts", "message"), COUNTS.values(), ids=COUNTS)
def test_counts_that_are_refused(counts, message):
    with pytest.raises(ValueError, match=message), valid_rows(counts):
        handlers.seed(flat, 0)()


def test_plate_that_cannot_be_seen():
    with pytest.raises(ValueError, match="'n' .8 rows. is made where.*body of a scan"):
        with valid_rows({"n": 3}), handlers.seed(rng_seed=0):
            made_in_scan()


@pytest.mark.parametrize("inside", ["model", "guide"])
def test_site_outside_of_the_plate_on_one_side(inside):
    def outside():
        numpyro.plate("n", N)
        numpyro.sample("z", dist.Normal(0, 1).expand([N]))

    pair = (flat, outside) if inside == "model" else (outside, flat)
    message = rf"'z' stands in plate 'n' .*count 3.* in the {inside}, but outside"
    with pytest.raises(ValueError, match=message), valid_rows({"n": 3}):
        Trace_ELBO().loss(jax.random.key(0), {}, *pair)
