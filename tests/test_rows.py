"""Which rows of local latents a batch uses, and that they meet their own data."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from models import (
    TRUTH,
    N,
    guide_list,
    indexing,
    latent_and_obs,
    pinned_plate,
    plate,
    plate_of,
    sliced_and_pinned,
    subsampling,
    two_latents,
)
from numpyro_dynamic_subsample import dynamic_subsample









def two_parts(model):
    return guide_list(model, {"z y_z": AutoDelta, "a y_a": AutoDelta})


def list_in_list(model):
    def inner(part):
        return guide_list(part, {"a y_a": AutoDelta})

    return guide_list(model, {"z y_z": AutoDelta, "a y_a": inner})


def with_callable(model):
    def part(x, rows):
        with numpyro.plate("n", N, subsample_size=2):
            loc = numpyro.param("a_auto_loc", jnp.full(N, 0.5), event_dim=0)
            return {"a": numpyro.sample("a", dist.Delta(loc))}

    return guide_list(model, {"z y_z": AutoDelta, "a y_a": lambda _: part})


LISTS = [two_parts, list_in_list, with_callable]


@pytest.mark.parametrize("parts", LISTS)
def test_parts_of_a_list_share_their_rows(parts):
    """With hand-written plates each part of a list draws rows of its own."""
    guide = dynamic_subsample(parts(two_latents))
    svi = SVI(two_latents, guide, optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), range(3), None)
    before = svi.get_params(state)
    for size in (3, 5):
        moved = svi.get_params(svi.update(state, range(size), None)[0])
        a, z = (moved[k] != before[k] for k in ("a_auto_loc", "z_auto_loc"))
        assert a.sum() == size
        np.testing.assert_array_equal(a, z)




ROWS = [jnp.array([6, 1, 3]), jnp.array([2]), jnp.arange(N)[::-1]]


def latents(guide, params, rows, make):
    guide = handlers.substitute(handlers.seed(guide, 0), params)
    trace = handlers.trace(guide).get_trace(TRUTH[rows], rows, make)
    return trace["n"]["value"], trace["z"]["value"], trace["z"]["scale"]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=["some", "one", "all"])
@pytest.mark.parametrize("where", ["in the model", "around the call"])
def test_pinned_rows_are_the_guides(where, rows, traced):
    guide = dynamic_subsample(AutoDelta(indexing))
    with handlers.seed(rng_seed=0):
        guide(TRUTH[:4], jnp.arange(4), pinned_plate)
    params = {"z_auto_loc": TRUTH * 10}

    def run(rows):
        if where == "in the model":
            return latents(guide, params, rows, pinned_plate)
        with handlers.substitute(data={"n": rows}):
            return latents(guide, params, rows, plate)

    taken, z, scale = (jax.jit(run) if traced else run)(rows)
    np.testing.assert_array_equal(taken, rows)
    np.testing.assert_array_equal(z, rows * 10)
    assert (scale or 1) == N / len(rows)


@pytest.mark.filterwarnings("ignore:subsample_size does not match:UserWarning")
@pytest.mark.parametrize("length", [2, 6, N])
def test_pins_of_another_length_than_the_model_asks_for(length):
    """As in the model, so in the guide the pinned rows win."""

    def asks_for_four():
        indexing(range(4), None)

    guide = dynamic_subsample(AutoDelta(asks_for_four))
    svi = SVI(asks_for_four, guide, optax.sgd(0.5), Trace_ELBO())
    state = svi.init(jax.random.key(0))
    rows = jnp.arange(N)[::-1][:length]
    before = svi.get_params(state)["z_auto_loc"]
    with handlers.substitute(data={"n": rows}):
        after = svi.get_params(svi.update(state)[0])["z_auto_loc"]
    # One step of gradient descent on the exact gradient of the pinned rows.
    grad = N / length * (before / 100 + before - TRUTH)
    expected = before.at[rows].add(-0.5 * grad[rows])
    np.testing.assert_allclose(after, expected, rtol=1e-4)


def test_permutation_that_a_model_both_keeps_and_follows():
    def mixed(rows):
        with plate_of(rows) as idx:
            latent_and_obs(numpyro.subsample(TRUTH, event_dim=0) + TRUTH[idx])

    guide = dynamic_subsample(AutoDelta(mixed))
    with handlers.seed(rng_seed=0):
        guide(jnp.arange(4))
        with pytest.raises(ValueError, match="All 8 rows of plate 'n' are pinned"):
            guide(jnp.arange(N)[::-1])


def test_numpyros_own_pattern_without_create_plates():
    """The pinned batches of NumPyro's ``test_subsample_guide``, the last one smaller,
    with latents in a scan."""

    def model(batch, rows, full_size):
        drift = numpyro.sample("drift", dist.LogNormal(-1, 0.5))
        data = plate_of(rows, full_size, name="data")

        def transition(z, y):
            with data:
                z = numpyro.sample("state", dist.Normal(z, drift))
                y = numpyro.sample("obs", dist.Bernoulli(logits=z), obs=y)
            return z, y

        start = jnp.zeros(len(rows))
        return scan(transition, start, batch, length=3)[1]

    def by_hand(batch, rows, full_size):
        return plate_of(rows, full_size, name="data")

    data = handlers.seed(model, 0)(None, jnp.arange(10), 10)
    losses = {}
    for guide in (
        dynamic_subsample(AutoNormal(model)),
        AutoNormal(model, create_plates=by_hand),
    ):
        svi = SVI(model, guide, optax.adam(0.02), Trace_ELBO())
        state = svi.init(jax.random.key(0), data[:, :4], jnp.arange(4), 10)
        update = jax.jit(svi.update, static_argnums=3)
        for rows in (jnp.arange(4), jnp.arange(4, 8), jnp.arange(8, 10)):
            state, loss = update(state, data[:, rows], rows, 10)
            losses.setdefault(type(guide), []).append(loss)
    assert losses[dynamic_subsample] == losses[AutoNormal]
