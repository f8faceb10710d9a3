"""A plate gains rows in the middle of a fit."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
)
from numpyro.infer.initialization import init_to_value

from checks import assert_equal, told
from models import hierarchy, independent, svi_of
from numpyro_dynamic_subsample import SubsampleSVI

OLD, NEW = 5, 8


def data(size):
    return jnp.sin(jnp.arange(float(size)))


def local(x, size, rows=None):
    rows = len(x) if rows is None else rows
    scale = numpyro.param("noise", 1.0, constraint=constraints.positive)
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("w", dist.Normal(mu, 1), obs=x)
    with numpyro.plate("n", size, subsample_size=rows):
        z = numpyro.sample("z", dist.LogNormal(mu, 1))
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("y", dist.Normal(z + p[..., 0], scale), obs=x)


def guide_list(model):
    guide = AutoGuideList(model)
    hidden = handlers.block(model, hide=["mu", "w", "y", "noise"])
    guide.append(AutoNormal(hidden))
    guide.append(AutoMultivariateNormal(handlers.block(model, expose=["mu"])))
    return guide


def by_hand(model):
    def guide(x, size):
        numpyro.sample("mu", dist.Delta(numpyro.param("mu_loc", 0.3)))
        with numpyro.plate("n", size, subsample_size=len(x)):
            p = numpyro.param(
                "p_loc",
                jnp.ones((size, 3)) / 3,
                constraint=constraints.simplex,
                event_dim=1,
            )
            numpyro.sample("p", dist.Delta(p, event_dim=1))
            loc = numpyro.param("loc", jnp.arange(1.0, 1 + size), event_dim=0)
            numpyro.sample("z", dist.LogNormal(loc, 1))

    return guide


def semi_dais(model):
    return AutoSemiDAIS(model, model, subsample_plate="n", K=2)


def compiled(method, **static):
    """A method on a batch, compiled with some arguments of the model as they are."""

    @jax.jit
    def run(state, x, rows):
        return method(state, told(x, **static, rows=rows))

    return run


def step(svi, state, x, size, rows):
    return compiled(svi.update, size=size)(state, x, {"n": rows})[0]


def fitted(svi, rows):
    """A state after one step."""
    state = svi.init(jax.random.key(0), told(data(OLD)[rows], OLD, rows={"n": rows}))
    return step(svi, state, data(OLD)[rows], OLD, rows)


def leading(tree, like):
    """The part of arrays that is as large as other ones."""
    return jax.tree.map(lambda a, b: a[tuple(map(slice, jnp.shape(b)))], tree, like)


# Also where the parameters of new rows start, as far as that is not random.
GUIDES = {
    "AutoNormal": (AutoNormal, local, {"z_auto_scale": 0.1, "p_auto_scale": 0.1}),
    "list": (guide_list, local, {"z_auto_scale": 0.1}),
    "AutoSemiDAIS": (semi_dais, independent, {"auto_z_0_loc": 0.0, "auto_gamma": 0.9}),
    "by hand": (by_hand, local, {"loc": np.arange(OLD + 1, NEW + 1), "p_loc": 1 / 3}),
}
OPTIM = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)),
    "accumulating": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "numpyro": numpyro.optim.Adam(0.1),
}


@pytest.mark.parametrize(
    ("guide", "optim", "batch"),
    [
        ("AutoNormal", "adam", [7, 1]),
        ("list", "chain", [7, 1]),
        ("AutoSemiDAIS", "adam", [7, 1]),
        ("by hand", "numpyro", range(NEW)),
        ("by hand", "accumulating", [0, 1]),
    ],
)
def test_old_rows_stay_and_new_rows_are_fresh(guide, optim, batch):
    batch = jnp.array(batch)
    make, model, starts = GUIDES[guide]
    svi = SubsampleSVI(model, make(model), OPTIM[optim], Trace_ELBO())
    state = fitted(svi, jnp.array([4, 0, 3]))
    params = svi.get_params(state)

    same = svi.grow(state, told(data(OLD)[:2], OLD, rows={"n": jnp.array([3, 1])}))
    assert_equal(same, state)

    grown = svi.grow(state, told(data(NEW)[batch], NEW, rows={"n": batch}))
    assert_equal(leading(grown, state), state)
    new_params = svi.get_params(grown)
    assert_equal(leading(new_params, params), params)
    lengths = {name: jnp.shape(value)[:1] for name, value in new_params.items()}
    of_rows = {name for name in params if jnp.shape(params[name])[:1] == (OLD,)}
    assert of_rows
    assert {name for name in lengths if lengths[name] == (NEW,)} == of_rows
    for name, start in starts.items():
        np.testing.assert_allclose(new_params[name][OLD:], start, rtol=1e-6)

    # The fit goes on, and touches the rows of its batch only.
    rows = jnp.array([7, 2])
    step(svi, grown, data(NEW)[rows], NEW, rows)
    with pytest.raises(ValueError, match="of the whole data set, here 8.*size 5"):
        svi.grow(grown, told(data(OLD)[:2], OLD, rows={"n": jnp.array([3, 1])}))
    if guide != "by hand":
        answer = svi.guide.sample_posterior(
            jax.random.key(0),
            new_params,
            *([data(NEW), NEW] * (guide == "AutoSemiDAIS")),
        )
        assert len(answer["z"]) == NEW


def test_grows_before_the_step_that_needs_it():
    svi = svi_of(independent, form="SubsampleSVI", optim=optax.sgd(0.1))
    rows = {"n": jnp.arange(3)}
    state = svi.init(jax.random.key(0), told(data(OLD)[:3], OLD, rows=rows))
    with pytest.raises(ValueError, match="size 8.* 5 rows.*call the method grow"):
        svi.update(state, told(data(NEW)[:3], NEW, rows=rows))


@pytest.mark.parametrize("given", [OLD, NEW])
@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDelta])
def test_values_of_all_rows(guide_class, given):
    values = {"z": 10.0 + jnp.arange(OLD)}
    guide = guide_class(independent, init_loc_fn=init_to_value(values=values))
    svi = svi_of(independent, guide, "SubsampleSVI")
    state = fitted(svi, jnp.array([2, 4]))
    svi.guide.init_loc_fn = init_to_value(values={"z": 10.0 + jnp.arange(given)})
    before = guide.init_loc_fn
    grown = svi.grow(state, told(data(NEW)[6:], NEW, rows={"n": jnp.array([6, 7])}))
    new = svi.get_params(grown)["z_auto_loc"][OLD:]
    if given == NEW:
        np.testing.assert_array_equal(new, 10.0 + jnp.arange(OLD, NEW))
    else:
        assert (jnp.abs(new) <= 2).all()
    assert guide.init_loc_fn is before
    again = svi.init(jax.random.key(3), data(NEW), NEW)
    start = svi.get_params(again)["z_auto_loc"]
    np.testing.assert_array_equal(start[:OLD], values["z"])
    np.testing.assert_array_equal(start[OLD:], new)


def test_nested_and_crossed_plates():
    def model(x, sizes, taken):
        a = numpyro.plate("a", sizes[0], subsample_size=taken[0], dim=-2)
        b = numpyro.plate("b", sizes[1], subsample_size=taken[1], dim=-1)
        with a:
            za = numpyro.sample("za", dist.Normal(0, 1))
        with b:
            zb = numpyro.sample("zb", dist.Normal(0, 1).expand([2]).to_event(1))
        with a, b:
            z = numpyro.sample("z", dist.Normal(za + zb.sum(-1), 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = svi_of(model, form="SubsampleSVI")
    rows = {"a": jnp.array([3, 1]), "b": jnp.array([0, 2, 4])}
    state = svi.init(
        jax.random.key(0), told(jnp.ones((2, 3)), (4, 5), (2, 3), rows=rows)
    )
    update = compiled(svi.update, sizes=(4, 5), taken=(2, 3))
    state, _ = update(state, jnp.ones((2, 3)), rows)
    grown = svi.grow(state, told(jnp.ones((2, 3)), (7, 6), (2, 3), rows=rows))
    assert_equal(leading(grown, state), state)
    shapes = {n: p.shape for n, p in svi.get_params(grown).items() if "loc" in n}
    assert shapes == {
        "za_auto_loc": (7, 1),
        "zb_auto_loc": (6, 2),
        "z_auto_loc": (7, 6),
    }


def fixed_size(x, size):
    with numpyro.plate("n", OLD, subsample_size=len(x)):
        loc = numpyro.param("loc", jnp.zeros(OLD), event_dim=0)
        numpyro.sample("z", dist.Normal(loc, 1))


def by_index(x, size):
    with numpyro.plate("n", size, subsample_size=len(x)) as rows:
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(size))[rows], 1))


def across_rows(x, size):
    with numpyro.plate("n", size, subsample_size=len(x)):
        share = numpyro.param(
            "share", jnp.ones(size) / size, constraint=constraints.simplex, event_dim=0
        )
        numpyro.sample("z", dist.Normal(share, 1))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (AutoDiagonalNormal(independent), r"one joint .* 'n' \(size 5\).* to 8 rows"),
        (AutoDAIS(independent), r"one joint distribution"),
        (AutoLaplaceApproximation(independent), r"one joint distribution"),
        (fixed_size, r"plate 'n' the number of rows .* it has size 8.*5 rows"),
        (by_index, r"'loc'.*\(5,\).*\(8,\).*event_dim"),
        (across_rows, r"'share'.*\(4,\).*\(7,\)"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_errors_change_nothing(guide, message):
    svi = svi_of(independent, guide, "SubsampleSVI")
    state = svi.init(jax.random.key(0), data(OLD), OLD)
    before = dict(vars(guide)), svi.constrain_fn
    with pytest.raises(ValueError, match=message):
        svi.grow(state, data(NEW), NEW)
    assert (dict(vars(guide)), svi.constrain_fn) == before
    assert_equal(svi.grow(state, data(OLD), OLD), state)
    jax.jit(lambda state: svi.update(state, data(OLD), OLD))(state)


def test_failing_growth_leaves_an_autoguide_as_it_was():
    svi = svi_of(independent, form="SubsampleSVI", optim=optax.adam(0.1))
    state = svi.init(jax.random.key(0), data(OLD), OLD)
    before = dict(vars(svi.guide.fn)), svi.constrain_fn
    other = svi_of(local, form="SubsampleSVI", optim=optax.adam(0.1))
    of_other = other.init(jax.random.key(0), data(OLD), OLD)
    with pytest.raises(ValueError, match="other parameters"):
        svi.grow(of_other, data(NEW), NEW)
    assert (dict(vars(svi.guide.fn)), svi.constrain_fn) == before
    jax.jit(lambda state: svi.update(state, data(OLD), OLD))(state)


def test_grown_fit_ends_at_the_exact_posterior():
    """y ~ Normal(z, 1) with z ~ Normal(0, 1) has the posterior Normal(y/2, 1/2)."""
    guide = AutoNormal(independent)
    loss = Trace_ELBO(num_particles=20)
    optim = optax.adam(optax.piecewise_constant_schedule(0.05, {1000: 0.1}))
    svi = SubsampleSVI(independent, guide, optim, loss, rowwise=True)
    rng = np.random.default_rng(0)
    state = svi.init(jax.random.key(0), told(data(4), OLD, rows={"n": jnp.arange(4)}))
    for size, steps in [(OLD, 300), (NEW, 1200)]:
        if size == NEW:
            state = svi.grow(
                state, told(data(NEW)[4:], NEW, rows={"n": jnp.arange(4, 8)})
            )
        update = compiled(svi.update, size=size)
        for _ in range(steps):
            rows = rng.choice(size, 4, replace=False)
            state, _ = update(state, data(size)[rows], {"n": rows})
    params = svi.get_params(state)
    np.testing.assert_allclose(params["z_auto_loc"], data(NEW) / 2, atol=0.06)
    np.testing.assert_allclose(params["z_auto_scale"], np.sqrt(0.5), atol=0.06)


def test_new_rows_are_folded_in_with_the_rest_held_fixed():
    """Given mu, z has the posterior Normal((mu + 4 y) / 5, 1 / 5)."""

    def model(x, size):
        hierarchy(size, noise=0.5)(x)

    def labels(params):
        return {n: "rows" if n.startswith("z_") else "others" for n in params}

    def svi_of(guide, optim, **options):
        return SubsampleSVI(model, guide, optim, Trace_ELBO(40), **options)

    svi = svi_of(AutoNormal(model), optax.adam(0.1))
    new = jnp.arange(OLD, NEW)
    batch = (data(NEW)[OLD:], NEW)
    state = fitted(svi, jnp.arange(OLD))
    state = svi.grow(state, told(*batch, rows={"n": new}))
    before = svi.get_params(state)
    schedule = optax.piecewise_constant_schedule(0.1, {300: 0.1})
    optims = {"rows": optax.adam(schedule), "others": optax.set_to_zero()}
    optim = optax.multi_transform(optims, labels)
    fold = svi_of(svi.guide, optim, rowwise=True)
    state = fold.init(
        jax.random.key(1), told(*batch, rows={"n": new}), init_params=before
    )
    update = compiled(fold.update, size=NEW)
    for _ in range(600):
        state, _ = update(state, data(NEW)[OLD:], {"n": new})
    params = fold.get_params(state)
    for name, value in before.items():
        old = value[:OLD] if value.ndim else value
        kept = params[name][:OLD] if value.ndim else params[name]
        np.testing.assert_allclose(kept, old, rtol=1e-5)
    expected = (before["mu_auto_loc"] + 4 * data(NEW)[OLD:]) / 5
    np.testing.assert_allclose(params["z_auto_loc"][OLD:], expected, atol=0.05)
    np.testing.assert_allclose(params["z_auto_scale"][OLD:], 5**-0.5, atol=0.05)
