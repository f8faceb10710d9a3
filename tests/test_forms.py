"""The wrapper, the context and the decorator, and what passes through them."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer.autoguide import AutoDelta, AutoGuide, AutoGuideList, AutoNormal
from numpyro.primitives import Messenger

from models import N, X, initialised, one_latent, rows_plate
from numpyro_dynamic_subsample import dynamic_subsample


def rows_of(guide, size, *args):
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(size, *args)
    return trace["n"]["value"]


def hand_written(size):
    """A guide whose plate is frozen at 4 rows."""
    numpyro.sample("mu", dist.Delta(numpyro.param("m", 0.0)))
    with numpyro.plate("n", N, subsample_size=4):
        loc = numpyro.param("loc", jnp.zeros(N), event_dim=0)
        numpyro.sample("z", dist.Normal(loc, 1))


def test_wrapper_looks_like_the_guide():
    inner = AutoNormal(one_latent, prefix="q")
    guide = initialised(dynamic_subsample(inner))
    assert isinstance(guide, AutoNormal)
    assert isinstance(guide, Messenger)
    assert not isinstance(guide, AutoDelta)
    assert guide.__class__.__name__ == "AutoNormal"
    assert guide.model is one_latent
    assert guide.prefix == "q"
    assert guide.init_loc_fn is inner.init_loc_fn
    assert guide.prototype_trace is inner.prototype_trace
    assert "dynamic_subsample" in repr(guide)
    assert repr(inner) in repr(guide)
    assert guide
    params = {"mu_q_loc": 0.0, "mu_q_scale": 1.0}
    params |= {"z_q_loc": X, "z_q_scale": jnp.ones(N)}
    np.testing.assert_array_equal(guide.median(params)["z"], X)
    assert guide.quantiles(params, [0.1, 0.9])["z"].shape == (2, N)
    assert guide.sample_posterior(jax.random.key(0), params)["z"].shape == (N,)
    with pytest.raises(AttributeError, match="no_such_thing"):
        guide.no_such_thing  # noqa: B018
    with pytest.raises(TypeError, match="has no len"):
        len(guide)


def test_setting_an_attribute_sets_the_guides():
    inner = AutoNormal(one_latent)
    dynamic_subsample(inner).create_plates = rows_plate
    assert inner.create_plates is rows_plate


def test_wrapped_list():
    guide = dynamic_subsample(AutoGuideList(one_latent))
    parts = [
        AutoNormal(handlers.block(one_latent, hide=["mu"])),
        AutoNormal(handlers.block(one_latent, hide=["z"])),
    ]
    for part in parts:
        guide.append(part)
    assert list(guide) == parts
    assert len(guide) == 2
    assert guide[1] is parts[1]


def test_wrapping_twice_is_wrapping_once():
    inner = AutoNormal(one_latent)
    twice = dynamic_subsample(dynamic_subsample(inner))
    assert twice.fn is inner
    overridden = dynamic_subsample(dynamic_subsample(hand_written, model=one_latent))
    assert overridden.fn is hand_written
    assert len(rows_of(overridden, 5)) == 5


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_copies_go_on_following(duplicate):
    guide = duplicate(dynamic_subsample(AutoNormal(one_latent)))
    assert len(rows_of(initialised(guide), 5)) == 5
    assert isinstance(guide, AutoNormal)


def test_deepcopy_is_independent():
    guide = dynamic_subsample(AutoNormal(one_latent))
    initialised(copy.deepcopy(guide))
    assert guide.prototype_trace is None


def test_decorator():
    @dynamic_subsample(model=one_latent)
    def guide(size):
        hand_written(size)

    assert guide.__name__ == "guide"
    assert len(rows_of(guide, 6)) == 6


@pytest.mark.parametrize("size", [1, 4, 6, N])
def test_hand_written_guide(size):
    guide = dynamic_subsample(hand_written, model=one_latent)
    svi = SVI(one_latent, guide, optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), 2)
    after = svi.get_params(jax.jit(svi.update, static_argnums=1)(state, size)[0])
    assert (after["loc"] != 0).sum() == size


def test_model_overrides_the_guides_own():
    def of_half_the_size(size):
        one_latent(size // 2)

    guide = initialised(AutoNormal(one_latent))
    assert len(rows_of(dynamic_subsample(guide, model=of_half_the_size), 6)) == 3


@pytest.mark.parametrize(
    "around",
    [
        lambda guide: handlers.scale(guide, 0.5),
        lambda guide: handlers.mask(guide, mask=True),
        lambda guide: handlers.block(guide, hide=["mu"]),
        lambda guide: handlers.seed(guide, 3),
    ],
    ids=["scale", "mask", "block", "seed"],
)
@pytest.mark.parametrize("first", [4, N])
def test_handlers_around_the_guide_inside_and_outside(around, first):
    guide = initialised(AutoNormal(one_latent), first)
    inside, outside = dynamic_subsample(around(guide)), around(dynamic_subsample(guide))
    assert len(rows_of(inside, 5)) == len(rows_of(outside, 5)) == 5


def test_context_serves_guides_made_outside_and_inside():
    outside = initialised(AutoNormal(one_latent))

    with dynamic_subsample():

        class Own(AutoNormal):
            def __call__(self, *args, **kwargs):
                return super().__call__(*args, **kwargs)

        assert len(rows_of(outside, 5)) == 5
        assert len(rows_of(initialised(Own(one_latent)), 5)) == 5
    assert len(rows_of(outside, 4)) == 4
    with pytest.warns(UserWarning, match="subsample_size does not match"):
        handlers.replay(
            handlers.seed(one_latent, 0),
            handlers.trace(handlers.seed(outside, 0)).get_trace(5),
        )(5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_nested_contexts_do_the_work_once(wrapped, monkeypatch):
    runs = []

    def model(size):
        runs.append(size)
        one_latent(size)

    guide = initialised(AutoNormal(model))
    guide = dynamic_subsample(guide) if wrapped else guide
    rows_of(dynamic_subsample(guide), 5)
    runs.clear()
    with dynamic_subsample(), dynamic_subsample() as inner:
        assert len(rows_of(guide, 5)) == 5
        assert runs == [5]
        assert isinstance(inner, dynamic_subsample)
    assert len(rows_of(dynamic_subsample(guide), 6)) == 6
    assert runs == [5, 6]


def test_context_around_a_jitted_update():
    svi = SVI(one_latent, AutoDelta(one_latent), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), 4)
    with dynamic_subsample():
        after, _ = jax.jit(svi.update, static_argnums=1)(state, 6)
    moved = svi.get_params(after)["z_auto_loc"] != svi.get_params(state)["z_auto_loc"]
    assert moved.sum() == 6


def test_guide_of_global_latents_costs_no_run_of_the_model():
    runs = []

    def model(size):
        runs.append(size)
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with rows_plate(size) as idx:
            numpyro.sample("y", dist.Normal(mu, 1), obs=X[idx])

    guide = initialised(dynamic_subsample(AutoNormal(model)))
    runs.clear()
    with handlers.seed(rng_seed=0):
        guide(6)
    assert not runs


@pytest.mark.parametrize(
    "guide_class",
    [autoguide.AutoDiagonalNormal, AutoNormal, AutoDelta, AutoGuideList],
)
@pytest.mark.parametrize("form", [dynamic_subsample, lambda guide: guide])
def test_log_density_at_two_sizes(guide_class, form):
    """The script of NumPyro's issue 1739."""

    def model(n, x=None, subsample_size=None):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("n", n, subsample_size=subsample_size):
            numpyro.sample("x", dist.Normal(mu, 1), obs=x)

    x = jnp.zeros(10)
    guide = form(guide_class(model))
    with dynamic_subsample(), handlers.seed(rng_seed=0):
        guide(10, x)
        trace = handlers.trace(guide).get_trace()
        replayed = handlers.replay(model, trace)
        for args in ((10, x), (10, x[:3], 3)):
            density, _ = numpyro.infer.util.log_density(replayed, args, {}, {})
            assert jnp.isfinite(density)


def test_classes_are_restored_when_contexts_end_in_any_order():
    calls = {cls: vars(cls)["__call__"] for cls in (AutoNormal, AutoDelta)}
    with pytest.raises(KeyError, match="from the block"):
        with dynamic_subsample(), dynamic_subsample():
            assert vars(AutoNormal)["__call__"] is not calls[AutoNormal]
            raise KeyError("from the block")
    assert all(vars(cls)["__call__"] is call for cls, call in calls.items())
    assert "__init_subclass__" not in vars(AutoGuide)
