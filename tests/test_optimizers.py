"""Which optimizers take steps on some rows alone is told from what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.optim import (
    SGD,
    Adagrad,
    Adam,
    ClippedAdam,
    Minimize,
    Momentum,
    RMSProp,
    RMSPropMomentum,
)
from optax import contrib

from checks import compilations
from numpyro_dynamic_subsample import SubsampleSVI

N, WIDTH = 7, 3
CLIP = optax.clip_by_global_norm(0.1)
SCHEDULE = optax.exponential_decay(0.05, 2, 0.5)
ACCEPTED = {
    "sgd": optax.sgd(0.1),
    "sgd with momentum and a schedule": optax.sgd(SCHEDULE, 0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "lion": optax.lion(0.1),
    "yogi": optax.yogi(0.1),
    "nadam": optax.nadam(0.1),
    "clip_by_global_norm, sgd": optax.chain(CLIP, optax.sgd(0.1)),
    "clip_by_global_norm, adam": optax.chain(CLIP, optax.adam(0.1)),
    "clip": optax.chain(optax.clip(1.0), optax.adam(0.1)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "numpyro's Adam": Adam(0.1),
    "numpyro's ClippedAdam": ClippedAdam(0.1),
    "numpyro's SGD": SGD(0.1),
    "numpyro's Momentum": Momentum(0.1, 0.9),
    "numpyro's Adagrad": Adagrad(0.1),
    "numpyro's RMSProp": RMSProp(0.1),
    "numpyro's RMSPropMomentum": RMSPropMomentum(0.1),
}
MIXES = r"mixes rows of plate 'n' \(size 7\): .* at \[1\].*Take .*optax.adam"
ONCE = "adds up the gradients of several steps.*optax.adam"
MORE = "takes no step from gradients and the loss alone.*optax.adam"
BLOCKS = optax.clip_by_block_rms(1.0)
REFUSED = {
    "adafactor": (optax.adafactor(0.1), MIXES),
    "adafactor, factored": (optax.adafactor(0.1, min_dim_size_to_factor=2), MIXES),
    "lamb": (optax.lamb(0.1), MIXES),
    "lars": (optax.lars(0.1), MIXES),
    "fromage": (optax.fromage(0.1), MIXES),
    "noisy_sgd": (optax.noisy_sgd(0.1, key=0), MIXES),
    "prodigy": (contrib.prodigy(0.1), MIXES),
    "dog": (contrib.dog(0.1), MIXES),
    "muon": (contrib.muon(0.1), MIXES),
    "adaptive_grad_clip": (
        optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
        MIXES,
    ),
    "clip_by_block_rms": (optax.chain(BLOCKS, optax.sgd(0.1)), MIXES),
    # After momentum, the norm is over rows that have no gradient, too.
    "clip_by_global_norm last": (optax.chain(optax.adam(0.1), CLIP), MIXES),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        ONCE,
    ),
    "lbfgs": (optax.lbfgs(), MORE),
    "Minimize": (Minimize(), "Minimize optimises all parameters together.*optax.adam"),
}


def guide(size):
    """Rows in a vector and in a matrix, beside a parameter without rows."""
    mu = numpyro.param("mu", 1.0)
    with numpyro.plate("n", N, subsample_size=size):
        vector = numpyro.param("vector", jnp.zeros(N), event_dim=0)
        matrix = numpyro.param("matrix", jnp.zeros((N, WIDTH)), event_dim=1)
        numpyro.sample("z", dist.Delta(mu + vector + matrix.sum(-1)))


def model(size):
    with numpyro.plate("n", N, subsample_size=size) as idx:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=jnp.arange(N)[idx])


def trace_a_step(optim):
    svi = SubsampleSVI(model, guide, optim, Trace_ELBO(), rowwise=True)
    state = jax.eval_shape(lambda key: svi.init(key, N), jax.random.key(0))
    jax.eval_shape(lambda state: svi.update(state, 2), state)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_treats_each_number_by_itself_is_accepted(name):
    trace_a_step(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_rows_is_refused(name):
    optim, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trace_a_step(optim)


def test_a_check_compiles_nothing():
    svi = SubsampleSVI(model, guide, optax.adam(0.3), Trace_ELBO(), rowwise=True)
    state = svi.init(jax.random.key(0), N)
    with compilations() as found:
        jax.eval_shape(lambda state: svi.update(state, 2), state)
    assert not found


def test_a_norm_of_gradients_is_that_of_the_ordinary_step():
    optim = ACCEPTED["clip_by_global_norm, sgd"]
    reached = []
    for rowwise in (True, False):
        svi = SubsampleSVI(model, guide, optim, Trace_ELBO(), rowwise=rowwise)
        state = svi.init(jax.random.key(0), N)
        for _ in range(3):
            state, _ = jax.jit(svi.update, static_argnums=1)(state, 2)
        reached.append(svi.get_params(state))
    for ours, theirs in zip(*map(jax.tree.leaves, reached), strict=True):
        assert (theirs != 0).any()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
