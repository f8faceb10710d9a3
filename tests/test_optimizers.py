"""Which optimizers take steps on some rows alone is told from what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from models import svi_of

N, WIDTH = 7, 3
CLIP = optax.clip_by_global_norm(0.1)
DECAY = optax.add_decayed_weights(0.1)
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
    "clip, clip_by_global_norm": optax.chain(optax.clip(1.0), CLIP, optax.adam(0.1)),
    "zero_nans, clip_by_global_norm": optax.chain(
        optax.zero_nans(), CLIP, optax.sgd(0.1)
    ),
    "clip_by_global_norm, decay": optax.chain(CLIP, DECAY, optax.sgd(0.1)),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1)),
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
MIXES = r"mixes rows of plate 'n' \(size 7\): .* at \[[01]\].*Take .*optax.adam"
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
    "decay before clip_by_global_norm": (
        optax.chain(DECAY, CLIP, optax.sgd(0.1)),
        MIXES,
    ),
    # After momentum, the norm is over rows that have no gradient, too.
    "clip_by_global_norm last": (optax.chain(optax.adam(0.1), CLIP), MIXES),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        ONCE,
    ),
    "apply_every": (optax.chain(optax.apply_every(2), optax.sgd(0.1)), ONCE),
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
    svi = svi_of(model, guide, "SubsampleSVI", optim=optim, rowwise=True)
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
    svi = svi_of(model, guide, "SubsampleSVI", optim=optax.adam(0.3), rowwise=True)
    state = svi.init(jax.random.key(0), N)
    with compilations() as found:
        jax.eval_shape(lambda state: svi.update(state, 2), state)
    assert not found


def test_a_norm_of_gradients_is_that_of_the_ordinary_step():
    optim = ACCEPTED["clip_by_global_norm, sgd"]
    reached = []
    for rowwise in (True, False):
        svi = svi_of(model, guide, "SubsampleSVI", optim=optim, rowwise=rowwise)
        state = svi.init(jax.random.key(0), N)
        for _ in range(3):
            state, _ = jax.jit(svi.update, static_argnums=1)(state, 2)
        reached.append(svi.get_params(state))
    for ours, theirs in zip(*map(jax.tree.leaves, reached), strict=True):
        assert (theirs != 0).any()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


TRANSFORMATIONS = {
    "scale": optax.scale(30.0),
    "clip": optax.clip(0.5),
    "clip_by_global_norm": CLIP,
    "clip_by_block_rms": BLOCKS,
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "add_decayed_weights": DECAY,
    "trace": optax.trace(0.9),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_param_block_norm": optax.scale_by_param_block_norm(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "centralize": optax.centralize(),
    "zero_nans": optax.zero_nans(),
    "add_noise": optax.add_noise(1.0, 0.5, 0),
}


def is_accepted(optim):
    try:
        trace_a_step(optim)
    except ValueError:
        return False
    return True


@settings(max_examples=12)
@given(
    names=st.lists(st.sampled_from(sorted(TRANSFORMATIONS)), min_size=1, max_size=3),
    count=st.integers(1, N - 1),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_a_step_of_what_is_accepted_depends_on_no_other_row(names, count, seed, scale):
    optim = optax.chain(*map(TRANSFORMATIONS.get, names), optax.scale(-0.1))
    if not is_accepted(optim):
        return
    draw = np.random.default_rng(seed)
    rows = draw.permutation(N)[:count]

    def numbers():
        shapes = {"mu": (), "vector": (N,), "matrix": (N, WIDTH)}
        return {n: jnp.array(scale * draw.normal(size=s)) for n, s in shapes.items()}

    def of_rows(tree):
        return jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, tree)

    # Steps in which all rows have gradients, and then one of a batch.
    params, state = numbers(), optim.init(numbers())
    for _ in range(2):
        _, state = optim.update(numbers(), state, params)
    outside = np.isin(np.arange(N), rows, invert=True)
    gradients = jax.tree.map(
        lambda leaf: leaf.at[outside].set(0) if leaf.ndim else leaf, numbers()
    )
    ordinary = optim.update(gradients, state, params)
    apart = optim.update(*map(of_rows, (gradients, state, params)))
    for ours, theirs in zip(
        jax.tree.leaves(apart), jax.tree.leaves(of_rows(ordinary)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * scale)
