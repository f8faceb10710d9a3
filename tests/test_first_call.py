"""The first call of an autoguide: where rows start, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

from models import (
    TRUTH,
    N,
    X,
    guide_list,
    independent,
    one_latent,
    plate_of,
    rows_plate,
    sliced,
    sliced_and_pinned,
    svi_of,
)
from numpyro_dynamic_subsample import dynamic_subsample


def test_values_of_the_first_batch_to_start_from():
    init = init_to_value(values={"z": jnp.array([1.0, 2.0, 3.0])})
    by_hand = AutoNormal(one_latent, init_loc_fn=init, create_plates=rows_plate)
    starts = []
    for guide, form in [
        (AutoNormal(one_latent, init_loc_fn=init), "wrapper"),
        (by_hand, "context"),
    ]:
        svi = svi_of(one_latent, guide, form)
        starts.append(svi.get_params(svi.init(jax.random.key(0), 3))["z_auto_loc"])
    np.testing.assert_array_equal(*starts)


@pytest.mark.parametrize("first", [jnp.arange(N), jnp.arange(3), jnp.arange(N)[::-1]])
def test_supports_that_depend_on_the_row(first):
    """A guide would give rows the supports of others."""

    def model(rows):
        with plate_of(rows):
            numpyro.sample("z", dist.Uniform(0, 1 + TRUTH[rows]))

    guide = dynamic_subsample(AutoNormal(model))
    with handlers.seed(rng_seed=0):
        shuffled = first[0] != 0
        if len(first) == N and not shuffled:
            assert guide(first)["z"].shape == (N,)
        message = r"support of site 'z' depends on the row of plate 'n' \(size 8\)"
        with pytest.raises(ValueError, match=message):
            guide(first if shuffled else jnp.array([5, 1, 2]))


@pytest.mark.parametrize(
    ("guide_class", "first", "values"),
    [
        (AutoNormal, 4, X * 10),
        (AutoDelta, 4, 3.0),
        (AutoDelta, N, X * 10),
        (AutoDiagonalNormal, 4, X * 10),
        (AutoMultivariateNormal, 4, 3.0),
        (AutoMultivariateNormal, N, X * 10),
    ],
)
def test_rows_start_where_the_user_says(guide_class, first, values):
    """Values for all rows, although the first call is a batch: NumPyro's issue 2063."""

    def positive(size):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.LogNormal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    start = jnp.exp(jnp.broadcast_to(values, (N,)) / 10)
    init = init_to_value(values={"z": start})
    svi = svi_of(positive, guide_class(positive, init_loc_fn=init))
    params = svi.get_params(svi.init(jax.random.key(0), first))
    np.testing.assert_allclose(svi.guide.median(params)["z"], start, rtol=1e-5)


def test_init_params_of_all_rows():
    svi = svi_of(one_latent)
    state = svi.init(jax.random.key(0), 3, init_params={"z_auto_loc": X})
    np.testing.assert_array_equal(svi.get_params(state)["z_auto_loc"], X)


def test_first_call_of_a_joint_guide_with_a_sliced_batch():
    inner = AutoDiagonalNormal(independent)
    guide = dynamic_subsample(inner)
    state = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(inner).items()}
    for size in (1, 3):
        with handlers.seed(rng_seed=0):
            with pytest.raises(ValueError, match=r"plate 'n' \(size 8\).*svi.init"):
                guide(X[:size])
        assert vars(inner) == state
    svi = svi_of(independent, guide)
    state = svi.init(jax.random.key(0), X)
    with handlers.substitute(data={"n": jnp.arange(3)}):
        assert jnp.isfinite(svi.update(state, X[:3])[1])


def test_laplace_approximation_after_a_batch():
    def model(size=None):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, jnp.arange(1.0, N + 1)[idx]), obs=X[idx])

    svi = svi_of(model, AutoLaplaceApproximation)
    params = svi.get_params(svi.init(jax.random.key(0), 3))
    exact = 1 / (1 + 1 / np.arange(1.0, N + 1) ** 2)
    posterior = svi.guide.get_posterior(params)
    np.testing.assert_allclose(np.diag(posterior.covariance_matrix), exact, rtol=1e-4)


def test_list_starts_where_the_user_says():
    init = init_to_value(values={"z": X * 10})
    parts = {"mu": AutoDelta, "z": AutoDelta}
    guide = guide_list(one_latent, parts, hide=["y"], init_loc_fn=init)
    svi = svi_of(one_latent, guide)
    params = svi.get_params(svi.init(jax.random.key(0), 3))
    np.testing.assert_allclose(params["z_auto_loc"], X * 10)


@pytest.mark.parametrize(
    ("guide_class", "by"), [(AutoLaplaceApproximation, "model"), (AutoDAIS, "handler")]
)
def test_first_data_that_a_guide_keeps_must_be_in_order(guide_class, by):
    rows = jnp.arange(N)[::-1]
    guide = dynamic_subsample(
        guide_class(sliced_and_pinned if by == "model" else sliced)
    )
    pins = handlers.substitute(data={} if by == "model" else {"n": rows})
    message = rf"{guide_class.__name__} takes.*plate 'n' \(size 8\).*arange\(8\)"
    with pins, handlers.seed(rng_seed=0), pytest.raises(ValueError, match=message):
        guide(TRUTH[rows], rows)
    assert guide.prototype_trace is None
