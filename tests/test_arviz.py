"""What comes out of a fit, in arviz; and leave-one-out, against its exact value."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from arviz_base import from_dict, from_numpyro_svi
from arviz_stats import loo
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from scipy import stats
from scipy.special import logsumexp

from numpyro_dynamic_subsample import SubsampleSVI, minibatch

N, WIDE, APART, NOISE = 300, 10.0, 1.0, 0.5
KEY = jax.random.key(0)
Y = np.random.default_rng(0).normal(0.3, np.hypot(APART, NOISE), N).astype("float32")


def people(y):
    mu = numpyro.sample("mu", dist.Normal(0, WIDE))
    with numpyro.plate("people", N, subsample_size=len(y)):
        z = numpyro.sample("z", dist.Normal(mu, APART))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y)


def of_mu(precision, total):
    """Posterior mean and variance of mu, of some data."""
    variance = 1 / (1 / WIDE**2 + precision)
    return variance * total, variance


OF_ROW = APART**2 + NOISE**2


def exact_elpd():
    mean, variance = of_mu((N - 1) / OF_ROW, (Y.sum() - Y) / OF_ROW)
    return stats.norm.logpdf(Y, mean, np.sqrt(variance + OF_ROW)).sum()


@pytest.fixture(scope="module")
def fitted():
    """The exact posteriors of mu, and of each z at the mean of mu."""
    svi = SubsampleSVI(people, AutoNormal(people), optax.sgd(0.1), Trace_ELBO())
    batch = minibatch(Y, rows={"people": np.arange(N)})
    svi.init(KEY, batch)
    mean, variance = of_mu(N / OF_ROW, Y.sum() / OF_ROW)
    local = 1 / (1 / APART**2 + 1 / NOISE**2)
    params = {"mu_auto_loc": mean, "mu_auto_scale": np.sqrt(variance)}
    params["z_auto_loc"] = local * (mean / APART**2 + Y / NOISE**2)
    params["z_auto_scale"] = np.full(N, np.sqrt(local))
    return svi, {n: jnp.asarray(own) for n, own in params.items()}, batch


def loo_of(likelihood):
    """Leave-one-out by importance sampling; it asks for some posterior, too."""
    one_chain = {"y": likelihood[None]}
    groups = {"log_likelihood": one_chain, "posterior": one_chain}
    return loo(from_dict(groups), pointwise=True)


def test_leave_one_out_with_latents_of_rows_takes_these_from_the_model(fitted):
    svi, params, batch = fitted
    unseen = svi.log_likelihood(KEY, params, batch, 4000, unseen=["people"])["y"]
    elpd = (logsumexp(unseen, 0) - np.log(len(unseen))).sum()
    assert abs(elpd - exact_elpd()) < 3
    # The latents of the guide have seen the row that is left out.
    with pytest.warns(UserWarning, match="Pareto"):
        seen = loo_of(svi.log_likelihood(KEY, params, batch, 1000)["y"])
    assert seen.elpd > exact_elpd() + 80
    assert (seen.pareto_k > 0.7).mean() > 0.5


def test_leave_one_out_without_latents_of_rows():
    def regression(y):
        mu = numpyro.sample("mu", dist.Normal(0, WIDE))
        with numpyro.plate("people", N, subsample_size=len(y)):
            numpyro.sample("y", dist.Normal(mu, np.sqrt(OF_ROW)), obs=y)

    guide = AutoNormal(regression)
    svi = SubsampleSVI(regression, guide, optax.sgd(0.1), Trace_ELBO())
    batches = [
        minibatch(Y[rows], rows={"people": rows}, capacity=128)
        for rows in np.split(np.arange(N), [128, 256])
    ]
    svi.init(KEY, batches[0])
    mean, variance = of_mu(N / OF_ROW, Y.sum() / OF_ROW)
    params = {"mu_auto_loc": jnp.asarray(mean)}
    params["mu_auto_scale"] = jnp.asarray(np.sqrt(variance))
    found = loo_of(svi.log_likelihood(KEY, params, batches, progress_bar=False)["y"])
    assert abs(found.elpd - exact_elpd()) < 0.3


@pytest.mark.parametrize("way", ["fit", "run"])
def test_arviz_takes_what_fit_and_run_return(way):
    svi = SubsampleSVI(people, AutoDelta(people), optax.sgd(0.01), Trace_ELBO())
    batch = minibatch(Y, rows={"people": np.arange(N)})
    if way == "fit":
        result = svi.fit(KEY, [batch], 2, progress_bar=False)
    else:
        result = svi.run(KEY, 2, batch, progress_bar=False)
    found = from_numpyro_svi(svi, svi_result=result, model_args=(Y,), num_samples=10)
    assert found["posterior"]["z"].sizes["sample"] == 10
    np.testing.assert_allclose(
        found["posterior"]["z"].isel(sample=0), result.params["z_auto_loc"], rtol=1e-5
    )
    np.testing.assert_array_equal(found["observed_data"]["y"], Y)
