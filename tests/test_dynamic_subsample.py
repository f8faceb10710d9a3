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
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
)
from numpyro.primitives import Messenger

from models import (
    N,
    X,
    initialised,
    local,
    one_latent,
    rows_moved,
    rows_plate,
    sliced_and_pinned,
    svi_of,
)
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
    guide = dynamic_subsample(inner)
    guide.create_plates = rows_plate
    guide.scale_constraint = dist.constraints.positive  # of the class
    assert inner.create_plates is rows_plate
    assert inner.scale_constraint is dist.constraints.positive
    assert not [name for name in vars(inner) if name.startswith("__")]


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


@pytest.mark.parametrize("size", [1, 6])
def test_hand_written_guide(size):
    svi = svi_of(one_latent, hand_written)
    state = svi.init(jax.random.key(0), 2)
    assert len(rows_moved(svi, state, size, name="loc")) == size


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


@pytest.mark.parametrize(
    ("guide_class", "form"),
    [
        (AutoDiagonalNormal, dynamic_subsample),
        (AutoNormal, lambda guide: guide),
        (AutoGuideList, dynamic_subsample),
    ],
)
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


def test_mcmc_in_a_context_has_values_of_its_batch():
    rows = jnp.array([0, 0, 0, 1, 2, 3, 4, 5])

    def draws():
        kernel = NUTS(sliced_and_pinned)
        mcmc = MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
        mcmc.run(jax.random.key(0), X[rows], rows)
        return mcmc.get_samples()["z"]

    plain = draws()
    with dynamic_subsample():
        np.testing.assert_array_equal(draws(), plain)


def test_guide_with_attributes_of_its_own():
    class Own(AutoNormal):
        rows = _rows = _model = "own"

    inner = Own(one_latent)
    inner._rows = "set"
    guide = dynamic_subsample(inner)
    assert (inner.rows, inner._rows, inner._model) == ("own", "set", "own")
    assert guide.rows == "own"


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        ("wrapper", TraceEnum_ELBO(max_plate_nesting=1)),
        ("wrapped scope", Trace_ELBO()),
        ("context", TraceEnum_ELBO(max_plate_nesting=1)),
    ],
)
def test_names_that_a_scope_changes(form, loss):
    guide = AutoDelta(one_latent)
    if form == "wrapper":
        guide = dynamic_subsample(guide)
    guide = handlers.scope(guide, prefix="a")
    if form == "wrapped scope":
        guide = dynamic_subsample(guide)
    svi = SVI(handlers.scope(one_latent, prefix="a"), guide, optax.sgd(0.1), loss)
    with dynamic_subsample():
        state = svi.init(jax.random.key(0), 4)
        before = svi.get_params(state)["a/z_auto_loc"]
        after = svi.get_params(jax.jit(lambda state: svi.update(state, 3))(state)[0])
    rows = np.flatnonzero(after["a/z_auto_loc"] != before)
    assert len(rows) == 3
    mu = svi.get_params(state)["a/mu_auto_loc"]
    slope = N / 3 * ((before - mu) + (before - X))
    np.testing.assert_allclose(
        after["a/z_auto_loc"][rows], (before - 0.1 * slope)[rows], rtol=1e-4
    )


NO_GUIDES = {
    "a class": (AutoNormal, r"got the class AutoNormal.*AutoNormal\(model\)"),
    "a kernel": (NUTS(local), "got NUTS, which has no guide"),
    "an SVI": (svi_of(local, form="context"), "Wrap its guide before"),
    "a model": (local, r"not know the model.*If this is the model.*AutoNormal\(model"),
    "a number": (3, "got 3, which cannot be called"),
}


@pytest.mark.parametrize(("guide", "message"), NO_GUIDES.values(), ids=NO_GUIDES)
def test_what_is_no_guide(guide, message):
    with pytest.raises(ValueError, match=message):
        dynamic_subsample(guide)


def test_guide_without_a_model():
    with pytest.raises(ValueError, match="does not know the model.*model=model"):
        dynamic_subsample(hand_written)
    with pytest.raises(ValueError, match="does not know the model.*model=model"):
        dynamic_subsample()(hand_written)


@pytest.mark.parametrize("where", ["guide", "model"])
def test_exceptions_of_the_users_pass_through(where):
    fail = False

    def failing_model(rows):
        if fail and where == "model":
            raise ZeroDivisionError("in the model")
        one_latent(rows)

    def failing_guide(rows):
        hand_written(rows)
        if fail and where == "guide":
            raise ZeroDivisionError("in the guide")

    guide = dynamic_subsample(failing_guide, model=failing_model)
    seeded = handlers.seed(guide, 0)
    seeded(3)
    fail = True
    with pytest.raises(ZeroDivisionError, match=f"in the {where}"):
        seeded(3)
    fail = False
    assert handlers.trace(seeded).get_trace(3)["z"]["value"].shape == (3,)
