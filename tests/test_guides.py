"""What single guides, objectives and settings need beyond the matrix."""

from functools import partial

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond
from numpyro.contrib.einstein import RBFKernel, SteinVI
from numpyro.contrib.funsor import config_enumerate
from numpyro.contrib.module import flax_module, random_flax_module
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
)
from numpyro.infer.reparam import LocScaleReparam

from checks import assert_equal, assert_same_mean
from models import N, X, local, one_latent, rows_moved, rows_plate, svi_of
from numpyro_dynamic_subsample import dynamic_subsample


def losses(svi, state, size, draws=1000, **kwargs):
    keys = jax.random.split(jax.random.key(5), draws)
    evaluate = jax.vmap(lambda k: svi.evaluate(state._replace(rng_key=k), size))
    return np.asarray(jax.jit(evaluate)(keys), float)


def test_multivariate_normal_recovers_the_exact_posterior_from_batches():
    """Normal mean, normal rows, normal noise: all rows are correlated."""
    guide = dynamic_subsample(AutoMultivariateNormal(one_latent))
    steps = 2000
    optim = optax.adam(optax.exponential_decay(0.05, steps, 1e-3))
    svi = SVI(one_latent, guide, optim, Trace_ELBO(num_particles=4))
    state = svi.init(jax.random.key(0), 4)
    step = jax.jit(lambda s, _: svi.update(s, 4))
    state, _ = jax.lax.scan(step, state, length=steps)
    # Of (mu, z): prior precision plus likelihood precision.
    to_difference = np.hstack([-np.ones((N, 1)), np.eye(N)])
    to_rows = to_difference + np.eye(N, N + 1) * 0
    to_rows[:, 0] = 0
    precision = np.zeros((N + 1, N + 1))
    precision[0, 0] = 1
    precision += to_difference.T @ to_difference + to_rows.T @ to_rows
    covariance = np.linalg.inv(precision)
    mean = covariance @ (to_rows.T @ np.asarray(X))
    posterior = guide.get_posterior(svi.get_params(state))
    np.testing.assert_allclose(posterior.mean, mean, atol=0.1)
    np.testing.assert_allclose(posterior.covariance_matrix, covariance, atol=0.1)
    assert covariance[0, 1] > 0.05


@pytest.mark.parametrize(("first", "size"), [(3, 1), (3, N), (N, 4)])
def test_semi_dais_equals_one_initialised_at_that_size(first, size):
    def guide_for():
        return AutoSemiDAIS(rows_only, rows_only, subsample_plate="n", K=2)

    def rows_only(size):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.LogNormal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    def loss(guide, first):
        svi = SVI(rows_only, guide, optax.sgd(0.1), Trace_ELBO())

        @jax.jit
        def run(key):
            state = svi.init(key, first)
            return svi.evaluate(state._replace(rng_key=key), size)

        return run(jax.random.key(0))

    guide = guide_for()
    ours = loss(dynamic_subsample(guide), first)
    # The log density is scaled in another order.
    np.testing.assert_allclose(ours, loss(guide_for(), size), rtol=1e-6)
    assert guide._local_plate == ("n", N, first)


def mixture(size, *, marginal=False):
    p = numpyro.sample("p", dist.Beta(2, 2))
    with rows_plate(size) as idx:
        z = numpyro.sample("z", dist.Normal(0, 1))
        if marginal:
            components = dist.Normal(jnp.stack([z, z + 3], -1), 1)
            weights = dist.CategoricalProbs(jnp.stack([1 - p, p]))
            y = dist.MixtureSameFamily(weights, components)
        else:
            y = dist.Normal(z + 3 * numpyro.sample("k", dist.Bernoulli(p)), 1)
        numpyro.sample("y", y, obs=X[idx])


def test_enumerated_mixture_equals_the_marginal_one():
    """With the rows shared, which NumPyro's TraceEnum_ELBO draws anew for the model."""
    enumerated = config_enumerate(mixture)
    marginal = partial(mixture, marginal=True)
    pairs = [
        (enumerated, handlers.block(enumerated, hide=["k"]), TraceEnum_ELBO()),
        (marginal, marginal, Trace_ELBO()),
    ]
    found = []
    for model, continuous, loss in pairs:
        svi = svi_of(model, AutoNormal(continuous), "context", loss)

        @jax.jit
        def losses(key, svi=svi):
            state = svi.init(key, N)
            zeros = jax.tree.map(jnp.zeros_like, svi.optim.get_params(state[0]))
            state = state._replace(optim_state=svi.optim.init(zeros), rng_key=key)
            return [svi.evaluate(state, size) for size in (N, 3)]

        with dynamic_subsample():
            found.append(losses(jax.random.key(1)))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_losses_by_site_of_a_joint_guide_add_up():
    loss = Trace_ELBO(sum_sites=False)
    svi = svi_of(one_latent, AutoMultivariateNormal)
    state = svi.init(jax.random.key(0), 4)

    @jax.jit
    def both(state):
        svi.loss = loss
        by_site = svi.evaluate(state, 5)
        svi.loss = Trace_ELBO()
        return by_site, svi.evaluate(state, 5)

    by_site, whole = both(state)
    np.testing.assert_allclose(sum(by_site.values()), whole, rtol=1e-5)
    assert {"mu", "z", "y"} <= by_site.keys()


def test_multi_sample_guide():
    def guide(size):
        """Several samples of every latent, ahead of the plate."""
        with numpyro.plate("n", N, subsample_size=4):
            loc = numpyro.param("loc", jnp.ones(N), event_dim=0)
            numpyro.sample("z", dist.Normal(loc, 1).expand_by([7]).mask(True))

    loss = Trace_ELBO(multi_sample_guide=True)
    svi = svi_of(local, guide, loss=loss)
    state = svi.init(jax.random.key(0), 4)
    assert len(rows_moved(svi, state, 5, name="loc")) == 5


@pytest.mark.filterwarnings("ignore:Found auxiliary vars in the model:UserWarning")
@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
def test_stein_vi(guide_class):
    guide = dynamic_subsample(guide_class(one_latent))
    stein = SteinVI(one_latent, guide, numpyro.optim.Adagrad(0.1), RBFKernel(), 2, 2)

    @jax.jit
    def steps(key):
        state, loss = stein.update(stein.init(key, 4), 3)
        return stein.get_params(state), loss

    params, loss = steps(jax.random.key(0))
    assert jnp.isfinite(loss)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(params))


def test_stein_vi_refuses_what_it_refuses():
    guide = dynamic_subsample(AutoIAFNormal(one_latent))
    with pytest.raises(AssertionError, match="not compatible with AutoIAFNormal"):
        SteinVI(one_latent, guide, numpyro.optim.Adagrad(0.1), RBFKernel())


def test_mutable_state_and_flax_modules():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train=True):
            x = flax.linen.BatchNorm(use_running_average=not train)(x)
            return flax.linen.Dense(1)(x)[..., 0]

    def model(size):
        net = flax_module("net", Net(), input_shape=(2, 1), mutable=["batch_stats"])
        dense = flax.linen.Dense(1)
        other = random_flax_module("bnn", dense, dist.Normal(0, 1), input_shape=(1,))
        with rows_plate(size) as idx:
            x = X[idx][:, None]
            z = numpyro.sample("z", dist.Normal(net(x) + other(x)[..., 0], 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    svi = svi_of(model)
    state = svi.init(jax.random.key(0), 4)
    after, loss = jax.jit(lambda state: svi.update(state, 3))(state)
    assert jnp.isfinite(loss)
    before, after = (jax.tree.leaves(s.mutable_state) for s in (state, after))
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


AROUND = {
    "reparam": (
        partial(handlers.reparam, config={"z": LocScaleReparam(0)}),
        "z_decentered",
    ),
    "scale": (partial(handlers.scale, scale=0.5), "z"),
    "mask": (partial(handlers.mask, mask=True), "z"),
    "condition": (partial(handlers.condition, data={"mu": jnp.array(0.3)}), "z"),
    "block": (partial(handlers.block, hide=["mu"]), "z"),
    "scope": (partial(handlers.scope, prefix="s"), "s/z"),
}


@pytest.mark.parametrize(
    ("name", "guide_class"),
    [
        ("reparam", AutoNormal),
        ("scale", AutoDiagonalNormal),
        ("mask", AutoNormal),
        ("condition", AutoDiagonalNormal),
        ("block", AutoNormal),
        ("scope", AutoNormal),
        ("scope", AutoDiagonalNormal),
    ],
)
def test_handlers_around_the_model(name, guide_class):
    around, site = AROUND[name]
    svi = svi_of(around(one_latent), guide_class)
    state = svi.init(jax.random.key(0), 4)
    full, batch = (losses(svi, state, size, draws=400) for size in (N, 3))
    assert_same_mean(full, batch, errors=4, atol=1e-4)
    params = svi.get_params(state)
    drawn = svi.guide.sample_posterior(jax.random.key(0), params)
    assert drawn[site].shape == (N,)


def test_plate_under_cond():
    def model(size):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))

        def branch(_):
            with numpyro.plate("inner", 2):
                numpyro.sample("w", dist.Normal(0, 1), obs=jnp.zeros(2))

        cond(True, branch, branch, None)
        with handlers.scale(scale=N / len(idx)):
            numpyro.factor("y", -(((z - X[idx]) ** 2).sum()))

    svi = svi_of(model)
    state = svi.init(jax.random.key(0), 4)
    assert len(rows_moved(svi, state, 5)) == 5


class Shifted(AutoDiagonalNormal):
    def _get_posterior(self):
        base = super()._get_posterior()
        return dist.Normal(base.loc + 1.0, base.scale)


class Counting(AutoNormal):
    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


class FromScratch(AutoContinuous):
    def _get_posterior(self):
        loc = numpyro.param("loc", self._init_latent)
        return dist.Delta(loc, event_dim=1)


@pytest.mark.parametrize(
    ("guide_class", "form"),
    [
        (Shifted, "wrapper"),
        (Counting, "wrapper"),
        (Counting, "context"),
        (FromScratch, "context"),
    ],
)
def test_users_subclasses(guide_class, form):
    guide = guide_class(one_latent)
    svi = svi_of(one_latent, guide, form)
    with dynamic_subsample():
        state = svi.init(jax.random.key(0), 4)
        guide.calls = 0
        full, batch = (losses(svi, state, size) for size in (N, 3))
    assert_same_mean(full, batch, errors=4, atol=1e-4)
    if guide_class is Counting:
        assert guide.calls == 2


@pytest.mark.parametrize("whole_list_too", [False, True])
def test_parts_wrapped_one_by_one_share_rows(whole_list_too):
    def model(size):
        with rows_plate(size) as idx:
            a = numpyro.sample("a", dist.Normal(0, 1))
            b = numpyro.sample("b", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(a + b, 1), obs=X[idx] + 1)

    guide = AutoGuideList(model)
    for name, others in (("a", ["b", "y"]), ("b", ["a", "y"])):
        part = AutoDelta(handlers.block(model, hide=others), prefix=name)
        guide.append(dynamic_subsample(part))
    guide = dynamic_subsample(guide) if whole_list_too else guide
    svi = svi_of(model, guide, "context")
    state = svi.init(jax.random.key(0), 4)
    a, b = (rows_moved(svi, state, 3, name=name) for name in ("a_a_loc", "b_b_loc"))
    assert a == b and len(a) == 3


def test_joint_guide_with_data_that_broadcast_over_another_plate():
    def model(size):
        with numpyro.plate("k", 3, dim=-1):
            b = numpyro.sample("b", dist.Normal(0, 1))
            with numpyro.plate("n", N, subsample_size=size, dim=-2) as idx:
                z = numpyro.sample("z", dist.Normal(b, 1))
                numpyro.sample("y", dist.Normal(z, 1), obs=X[idx][:, None])

    svi = svi_of(model, AutoDiagonalNormal)
    loss = jax.jit(lambda key: svi.update(svi.init(key, 4), 3)[1])(jax.random.key(0))
    assert jnp.isfinite(loss)


@pytest.mark.parametrize("form", ["wrapper", "SubsampleSVI"])
def test_maximum_likelihood_without_latents(form):
    def model(size):
        loc = numpyro.param("loc", 0.0)
        numpyro.deterministic("twice", 2 * loc)
        with rows_plate(size) as idx:
            numpyro.sample("y", dist.Normal(loc, 1), obs=X[idx])

    svi = svi_of(model, AutoDelta, form)
    state = svi.init(jax.random.key(0), 4)
    assert svi.guide.median(svi.get_params(svi.update(state, 3)[0])) == {}


@pytest.mark.parametrize(
    ("form", "sized"), [("wrapper", False), ("context", False), ("context", True)]
)
def test_guide_with_plates_by_hand_is_left_alone(form, sized):
    """Bit for bit as in NumPyro, also where the model asks for no size."""

    def model(x):
        with numpyro.plate("n", N, subsample_size=3 if sized else None) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x[idx])

    def three_rows(x):
        return numpyro.plate("n", N, subsample_size=3)

    def steps(form):
        svi = svi_of(model, AutoNormal(model, create_plates=three_rows), form)
        state, loss = svi.update(svi.init(jax.random.key(0), X), X)
        assert svi.guide.create_plates is three_rows
        return svi.get_params(state), loss

    theirs = steps("context")
    with dynamic_subsample():
        assert_equal(steps(form), theirs)


def test_wrapped_guide_with_create_plates():
    guide = dynamic_subsample(AutoNormal(one_latent, create_plates=rows_plate))
    with handlers.seed(rng_seed=0):
        with pytest.raises(ValueError, match="has create_plates.*Leave create_plates"):
            guide(3)
