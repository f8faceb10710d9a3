"""Programs that are a little unusual, as users write them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
)
from numpyro.infer.util import log_density

from models import TRUTH, N, X, one_latent, plate_of, rows_plate, sliced_and_pinned
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample

PERMUTATION = jnp.array([3, 1, 5, 0, 4, 2, 7, 6])


def trained(model, guide, context, name="z_auto_loc"):
    """Train on one batch of all rows in another order."""
    svi = SVI(model, guide, optax.sgd(0.25), Trace_ELBO())
    args = TRUTH[PERMUTATION], PERMUTATION

    def train():
        state = svi.init(jax.random.key(0), *args)
        steps = jax.lax.scan(lambda s, _: svi.update(s, *args), state, length=40)
        return svi.get_params(steps[0])[name]

    if not context:
        return train()
    with dynamic_subsample():
        return train()


def with_condition_fn(x, rows):
    def choose(site):
        return jnp.array(1.0) if site["name"] == "s" else None

    def model():
        s = numpyro.sample("s", dist.LogNormal(0, 1))
        with plate_of(rows):
            z = numpyro.sample("z", dist.Normal(0, 10))
            numpyro.sample("y", dist.Normal(z, s), obs=x)

    handlers.condition(model, condition_fn=choose)()


def with_substitute_inside(x, rows):
    handlers.substitute(sliced_and_pinned, data={"z": 10 * TRUTH})(x, rows)


MODELS = [sliced_and_pinned, with_condition_fn, with_substitute_inside]


@pytest.mark.parametrize("context", [False, True], ids=["wrapper", "context"])
@pytest.mark.parametrize("model", MODELS)
def test_rows_are_taken_once_whoever_gives_other_sites(model, context):
    guide = AutoDelta(handlers.block(sliced_and_pinned, hide=["s"]))
    guide = guide if context else dynamic_subsample(guide)
    np.testing.assert_allclose(trained(model, guide, context), TRUTH / 1.01, atol=0.01)


def merged(auto):
    return lambda x, rows: auto(x, rows)


def list_with_a_function(auto):
    guide = AutoGuideList(sliced_and_pinned)
    guide.append(merged(auto))
    return guide


AROUND = {
    "partial": lambda auto: partial(auto),
    "function": merged,
    "part of a list": list_with_a_function,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_joint_guides_inside_of_functions(around):
    guide = around(AutoDiagonalNormal(sliced_and_pinned, init_scale=1e-3))
    guide = dynamic_subsample(guide, model=sliced_and_pinned)
    found = trained(sliced_and_pinned, guide, False, "auto_loc")
    np.testing.assert_allclose(found, TRUTH / 1.01, atol=1.0)


def test_data_that_the_model_takes_only_later():
    def model(x, rows, more=False):
        with plate_of(rows):
            z = numpyro.sample("z", dist.Normal(0, 1))
            x = x + numpyro.subsample(TRUTH, event_dim=0) if more else x
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = SVI(model, dynamic_subsample(AutoDelta(model)), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), X, PERMUTATION)
    svi.evaluate(state, X, PERMUTATION)
    with pytest.raises(ValueError, match="All 8 rows of plate 'n' are pinned"):
        svi.evaluate(state, X, PERMUTATION, more=True)


def test_mcmc_in_a_context_has_values_of_its_batch():
    rows = jnp.array([0, 0, 0, 1, 2, 3, 4, 5])

    def means():
        mcmc = MCMC(
            NUTS(sliced_and_pinned), num_warmup=200, num_samples=200, progress_bar=False
        )
        mcmc.run(jax.random.key(0), X[rows], rows)
        return mcmc.get_samples()["z"].mean(0)

    plain = means()
    with dynamic_subsample():
        np.testing.assert_array_equal(means(), plain)


def test_log_density_of_samples_of_all_rows():
    args = (X[PERMUTATION], PERMUTATION)
    with dynamic_subsample():
        found, _ = log_density(sliced_and_pinned, args, {}, {"z": TRUTH})
    exact = dist.Normal(0, 10).log_prob(TRUTH) + dist.Normal(TRUTH, 1).log_prob(X)
    np.testing.assert_allclose(found, exact.sum(), rtol=1e-5)


def wants_value(x=None):
    if x is None:
        raise ValueError("need x")
    one_latent(len(x))


def wants_assertion(x=None):
    assert x is not None
    one_latent(len(x))


def wants_keyword(**batch):
    one_latent(len(batch["x"]))


@pytest.mark.parametrize("model", [wants_value, wants_assertion, wants_keyword])
def test_guide_without_the_arguments_that_the_model_wants(model):
    svi = SVI(model, dynamic_subsample(AutoNormal(model)), optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), x=X[:3]))
    drawn = Predictive(svi.guide, params=params, num_samples=2)(jax.random.key(0))
    assert drawn["z"].shape == (2, N)


def test_posterior_of_a_model_with_assertions():
    def model(x, rows):
        with plate_of(rows) as idx:
            assert len(idx) == len(x)
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.deterministic("gap", z - x)
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    guide = dynamic_subsample(AutoNormal(model))
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), X[:3], jnp.arange(3)))
    with pytest.warns(UserWarning, match=r"\['gap'\]"):
        assert guide.median(params)["z"].shape == (N,)


def test_plate_name_at_two_dims():
    def model(size):
        with numpyro.plate("n", N, subsample_size=size, dim=-1) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("n", N, subsample_size=size, dim=-2):
            numpyro.sample("y", dist.Normal(z[:, None], 1), obs=X[idx][:, None])

    svi = SVI(model, dynamic_subsample(AutoDelta(model)), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), 4)
    update = jax.jit(svi.update, static_argnums=1)
    after = svi.get_params(update(state, 3)[0])["z_auto_loc"]
    assert (after != svi.get_params(state)["z_auto_loc"]).sum() == 3


def test_function_that_reads_what_a_plates_message_has():
    def look(site):
        assert "fn" in site
        assert "scale" in site

    guide = dynamic_subsample(AutoDelta(one_latent))
    with handlers.seed(rng_seed=0), handlers.substitute(substitute_fn=look):
        assert guide(3)["z"].shape == (3,)


def test_values_of_the_first_batch_to_start_from():
    init = init_to_value(values={"z": jnp.array([1.0, 2.0, 3.0])})
    guides = [
        dynamic_subsample(AutoNormal(one_latent, init_loc_fn=init)),
        AutoNormal(one_latent, init_loc_fn=init, create_plates=rows_plate),
    ]
    starts = []
    for guide in guides:
        svi = SVI(one_latent, guide, optax.sgd(0.1), Trace_ELBO())
        starts.append(svi.get_params(svi.init(jax.random.key(0), 3))["z_auto_loc"])
    np.testing.assert_array_equal(*starts)


def test_guide_with_attributes_of_its_own():
    class Own(AutoNormal):
        rows = _rows = _model = "own"

    inner = Own(one_latent)
    inner._rows = "set"
    guide = dynamic_subsample(inner)
    assert (inner.rows, inner._rows, inner._model) == ("own", "set", "own")
    assert guide.rows == "own"


def test_joint_guide_with_data_that_broadcast_over_another_plate():
    def model(size):
        with numpyro.plate("k", 3, dim=-1):
            b = numpyro.sample("b", dist.Normal(0, 1))
            with numpyro.plate("n", N, subsample_size=size, dim=-2) as idx:
                z = numpyro.sample("z", dist.Normal(b, 1))
                numpyro.sample("y", dist.Normal(z, 1), obs=X[idx][:, None])

    guide = dynamic_subsample(AutoDiagonalNormal(model))
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    loss = jax.jit(lambda key: svi.update(svi.init(key, 4), 3)[1])(jax.random.key(0))
    assert jnp.isfinite(loss)


def test_note_of_an_earlier_program_is_not_kept():
    context = dynamic_subsample()
    with context, handlers.seed(rng_seed=0):
        sliced_and_pinned(X, PERMUTATION)
    with pytest.raises(ValueError, match="unrelated") as raised, context:
        raise ValueError("unrelated")
    assert not hasattr(raised.value, "__notes__")


def test_argument_of_all_rows_is_no_data_of_rows():
    grid = jnp.linspace(0, 1, 5)

    def model(grid, size):
        with numpyro.plate("n", N, subsample_size=size):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.factor("smooth", -((z[:, None] * grid) ** 2).sum(-1))

    svi = SVI(model, dynamic_subsample(AutoNormal(model)), optax.sgd(0.1), Trace_ELBO())
    svi.init(jax.random.key(0), grid, 3)


@pytest.mark.parametrize("form", [SVI, SubsampleSVI])
def test_maximum_likelihood_without_latents(form):
    def model(size):
        loc = numpyro.param("loc", 0.0)
        numpyro.deterministic("twice", 2 * loc)
        with rows_plate(size) as idx:
            numpyro.sample("y", dist.Normal(loc, 1), obs=X[idx])

    guide = dynamic_subsample(AutoDelta(model))
    svi = form(model, guide, optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), 4)
    assert guide.median(svi.get_params(svi.update(state, 3)[0])) == {}


@pytest.mark.parametrize("first", [jnp.arange(N), jnp.arange(3), PERMUTATION])
def test_supports_that_depend_on_the_row(first):
    """A guide would give rows the supports of others."""

    def model(rows):
        with plate_of(rows):
            numpyro.sample("z", dist.Uniform(0, 1 + TRUTH[rows]))

    guide = dynamic_subsample(AutoNormal(model))
    with handlers.seed(rng_seed=0):
        if len(first) == N and first[0] == 0:
            assert guide(first)["z"].shape == (N,)
        message = r"support of site 'z' depends on the row of plate 'n' \(size 8\)"
        with pytest.raises(ValueError, match=message):
            guide(first if first is PERMUTATION else jnp.array([5, 1, 2]))
