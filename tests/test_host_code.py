"""Programs that plain NumPyro runs, run here too: host code, names, effects."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, init_to_value
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoNormal,
)

from checks import told
from models import N, X, guide_list, one_latent, plate_of, rows_plate
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample

FORMS = ["wrapper", "context"]


def svi_of(model, guide=None, form="wrapper", **kwargs):
    guide = AutoNormal(model) if guide is None else guide
    guide = dynamic_subsample(guide) if form == "wrapper" else guide
    return SVI(model, guide, optax.sgd(0.1), Trace_ELBO(), **kwargs)


def moved(svi, state, *args):
    before = svi.get_params(state)
    # The arguments stay concrete, as host code wants them.
    after = svi.get_params(jax.jit(lambda state: svi.update(state, *args))(state)[0])
    return {name: int((after[name] != before[name]).sum()) for name in before}


# ------------------------------------------------------------------ host code


def boolean_index(x, g):
    return x[x > -10].sum() + g.sum()


def shape_from_data(x, g):
    return jnp.zeros(g.max() + 1).sum()


def python_set(x, g):
    return len(set(g.tolist()))


def edited_copy(x, g):
    x = np.array(x)
    x[0] = 3.0
    return x.sum()


def f_string(x, g):
    assert f"{float(x.sum()):.2f}"
    return int(g[0])


HOST_CODE = [boolean_index, shape_from_data, python_set, edited_copy, f_string]


@pytest.mark.parametrize("host_code", HOST_CODE)
def test_a_check_never_stops_a_program(host_code):
    def model(x, g, size=4):
        offset = host_code(x, g)
        with numpyro.plate("n", N, subsample_size=size):
            z = numpyro.sample("z", dist.Normal(offset, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(x[:size]))

    svi = svi_of(model)
    x, g = np.arange(8.0), np.arange(8)
    state = svi.init(jax.random.key(0), x, g)
    assert moved(svi, state, x, g, 3)["z_auto_loc"] == 3


def test_constant_observations_are_no_data_of_other_rows():
    def model(size):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.zeros(len(idx)))

    svi_of(model).init(jax.random.key(0), 4)


@pytest.mark.parametrize("setting", [numpyro.validation_enabled, jax.debug_nans])
def test_reading_validates_and_debugs_no_made_up_value(setting):
    """A latent of any value would be no scale, and its logarithm not finite."""

    def model(size):
        a = numpyro.sample("a", dist.Normal(5, 0.1))
        scale = jnp.sqrt(a - 3)
        numpyro.sample("b", dist.Normal(0, scale))
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, scale))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    init = init_to_value(values={"a": jnp.array(5.0)})
    svi = svi_of(model, AutoDelta(model, init_loc_fn=init))
    with setting(True):
        state = svi.init(jax.random.key(0), 4)
        assert moved(svi, state, 3)["z_auto_loc"] == 3


def test_model_that_catches_exceptions():
    def model(size):
        try:
            plate = rows_plate(size)
        except Exception:
            plate = None
        assert plate is not None
        with plate as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    svi = svi_of(model)
    assert moved(svi, svi.init(jax.random.key(0), 4), 3)["z_auto_loc"] == 3


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("form", [*FORMS, "wrapped scope"])
@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)])
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


# ------------------------------------------------------------------ effects


def test_effects_of_a_model_happen_once_more_unless_all_rows_are_named():
    counts = []

    def model(x):
        jax.debug.callback(lambda: counts.append(1))
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    rows = jnp.arange(3)
    state = svi.init(jax.random.key(0), told(X[:3], rows={"n": rows}))
    step = jax.jit(lambda s: svi.evaluate(s, told(X[:3], rows={"n": rows})))
    for _ in range(2):
        counts.clear()
        step(state).block_until_ready()
        jax.effects_barrier()
    assert len(counts) == 1


# ------------------------------------------------------------------ posterior methods


def sliced(x):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("double mu", 2 * mu)
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.deterministic("gap", z - x)
        numpyro.sample("y", dist.Normal(z, 1), obs=x)
    numpyro.deterministic("sum of z", z.sum())


@pytest.mark.filterwarnings(
    "ignore::numpyro_dynamic_subsample.MisalignedSubsampleWarning"
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDelta])
def test_deterministic_sites_that_need_no_rows_are_kept(guide_class, form):
    svi = svi_of(sliced, guide_class(sliced), form)
    with dynamic_subsample():
        state = svi.init(jax.random.key(0), X[:3])
        params = svi.get_params(state)
        with pytest.warns(UserWarning, match=r"\['gap', 'sum of z'\]: the model"):
            drawn = svi.guide.sample_posterior(
                jax.random.key(1), params, sample_shape=(2, 3)
            )
    assert drawn.keys() == {"mu", "z", "double mu"}
    assert drawn["z"].shape == (2, 3, N)
    np.testing.assert_allclose(drawn["double mu"], 2 * drawn["mu"], rtol=1e-6)


def test_laplace_approximation_after_a_batch():
    def model(size=None):
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, jnp.arange(1.0, N + 1)[idx]), obs=X[idx])

    svi = svi_of(model, AutoLaplaceApproximation(model))
    params = svi.get_params(svi.init(jax.random.key(0), 3))
    exact = 1 / (1 + 1 / np.arange(1.0, N + 1) ** 2)
    posterior = svi.guide.get_posterior(params)
    np.testing.assert_allclose(np.diag(posterior.covariance_matrix), exact, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [3, N])
def test_guide_without_the_models_arguments_gives_all_rows(form, first):
    svi = svi_of(one_latent, form=form)
    with dynamic_subsample():
        params = svi.get_params(svi.init(jax.random.key(0), first))
        drawn = Predictive(svi.guide, params=params, num_samples=2)(jax.random.key(0))
    assert drawn["z"].shape == (2, N)


# ------------------------------------------------------------------ settings of guides


def test_list_starts_where_the_user_says():
    init = init_to_value(values={"z": X * 10})
    parts = {"mu": AutoDelta, "z": AutoDelta}
    guide = guide_list(one_latent, parts, hide=["y"], init_loc_fn=init)
    svi = svi_of(one_latent, guide)
    params = svi.get_params(svi.init(jax.random.key(0), 3))
    np.testing.assert_allclose(params["z_auto_loc"], X * 10)


def test_setting_an_attribute_of_the_class_sets_the_guides():
    inner = AutoNormal(one_latent)
    guide = dynamic_subsample(inner)
    guide.scale_constraint = dist.constraints.positive
    assert inner.scale_constraint is dist.constraints.positive
    assert not [name for name in vars(inner) if name.startswith("__")]


# ------------------------------------------------------------------ create_plates


def sized_by_the_guide(x):
    """As numpyro_forecast does: the model asks for no size."""
    with numpyro.plate("n", N) as idx:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=x[idx])


def three_rows(x):
    return numpyro.plate("n", N, subsample_size=3)


@pytest.mark.parametrize("form", FORMS)
def test_create_plates_decides_where_the_model_asks_for_no_size(form):
    def steps(served):
        guide = AutoNormal(sized_by_the_guide, create_plates=three_rows)
        guide = dynamic_subsample(guide) if served and form == "wrapper" else guide
        svi = SVI(sized_by_the_guide, guide, optax.sgd(0.1), Trace_ELBO())
        state = svi.init(jax.random.key(0), X)
        state, loss = svi.update(state, X)
        return svi.get_params(state), loss, guide.create_plates

    theirs = steps(False)
    with dynamic_subsample():
        ours = steps(True)
    for name in theirs[0]:
        np.testing.assert_array_equal(ours[0][name], theirs[0][name])
    assert ours[1:] == theirs[1:]


# ------------------------------------------------------------------ guides unserved


def frozen(x):
    with numpyro.plate("n", N, subsample_size=4):
        loc = numpyro.param("loc", jnp.zeros(N), event_dim=0)
        numpyro.sample("z", dist.Normal(loc + 0 * x, 1))


# ------------------------------------------------------------------ drawn rows


def test_two_autoguides_share_drawn_rows_with_an_enumerating_objective():
    """Each latent is its own datum less the other; drawn apart, they could not be."""

    def model(size):
        with rows_plate(size) as idx:
            a = numpyro.sample("a", dist.Normal(0, 100))
            b = numpyro.sample("b", dist.Normal(0, 100))
            numpyro.sample("ya", dist.Normal(a, 0.1), obs=10 * X[idx])
            numpyro.sample("yb", dist.Normal(b, 0.1), obs=-10 * X[idx])

    parts = [AutoDelta(handlers.block(model, hide=hide)) for hide in (["b"], ["a"])]

    def guide(size):
        return {**parts[0](size), **parts[1](size)}

    svi = SVI(model, guide, optax.sgd(1e-3), TraceEnum_ELBO(max_plate_nesting=1))
    with dynamic_subsample():
        state = svi.init(jax.random.key(0), 3)
        params = {"a_auto_loc": 10 * X, "b_auto_loc": -10 * X}
        state = state._replace(optim_state=svi.optim.init(params))
        evaluate = jax.jit(lambda key: svi.evaluate(state._replace(rng_key=key), 3))
        losses = [evaluate(jax.random.key(k)) for k in range(4)]
    each = dist.Normal(0, 100).log_prob(0.0) + dist.Normal(0, 0.1).log_prob(0.0)
    np.testing.assert_allclose(losses, -2 * N * each, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_plate_made_outside_of_a_scan_and_entered_inside(form):
    """The pattern of NumPyro's test of subsampling guides, without create_plates."""

    def model(batch, rows):
        plate = plate_of(rows)

        def step(last, y):
            with plate:
                state = numpyro.sample("state", dist.Normal(last, 1))
                numpyro.sample("obs", dist.Normal(state, 1), obs=y)
            return state, None

        scan(step, jnp.zeros(len(rows)), batch)

    svi = svi_of(model, form=form)
    table = np.random.default_rng(0).normal(size=(5, N))
    with dynamic_subsample():
        rows = jnp.array([3, 1])
        state = svi.init(jax.random.key(0), table[:, :2], rows)
        for rows in (jnp.array([3, 1]), jnp.array([7, 0, 2, 5])):
            before = svi.get_params(state)["state_auto_loc"]
            state, _ = jax.jit(svi.update)(state, table[:, rows], rows)
            after = svi.get_params(state)["state_auto_loc"]
            changed = np.flatnonzero((after != before).any(0))
            np.testing.assert_array_equal(changed, np.sort(rows))


def test_warnings_are_not_lost():
    guide = copy.deepcopy(dynamic_subsample(AutoNormal(sliced)))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        svi_of(sliced, guide).init(jax.random.key(0), X[:3])
    assert len(given) == 1
