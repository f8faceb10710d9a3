"""Predictions and log likelihoods of batches, against NumPyro's and exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module
from numpyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, init_to_value
from numpyro.infer import log_likelihood as numpyros_log_likelihood
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
)
from scipy import stats

from checks import assert_close, assert_equal, assert_same_mean, compilations
from models import guide_list, hierarchy, independent
from numpyro_dynamic_subsample import SubsampleSVI, minibatch
from numpyro_dynamic_subsample.batches.minibatch import as_minibatch

N, NOISE, DRAWS = 10, 0.5, 20_000
LOC, SCALE = np.linspace(-2, 3, N), np.linspace(0.2, 1.5, N)
MU = 0.7, 0.4
KEY = jax.random.key(1)
QUIET = {"progress_bar": False}


def model(x, y=None):
    """Gives `moved` per row, and `offset`, which is one for all."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("offset", mu + 1)
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.deterministic("moved", z + x)
        numpyro.sample("y", dist.Normal(z + x, NOISE), obs=y)


def whole(x=None, y=None):
    x = np.zeros(N, "float32") if x is None else x
    return minibatch(x, *(() if y is None else (y,)), rows={"n": np.arange(N)})


def svi_of(model, guide, loss=None, first=None):
    svi = SubsampleSVI(model, guide, optax.sgd(0.1), loss or Trace_ELBO())
    state = svi.init(KEY, whole(y=np.zeros(N)) if first is None else first)
    return svi, state


@pytest.fixture(scope="module")
def known():
    """A guide whose posterior is known: Normal(LOC, SCALE) for each row."""
    svi, _ = svi_of(model, AutoNormal(model))
    params = {"mu_auto_loc": MU[0], "mu_auto_scale": MU[1]}
    params |= {"z_auto_loc": LOC, "z_auto_scale": SCALE}
    return svi, {name: jnp.asarray(value) for name, value in params.items()}


def assert_moments(draws, mean, sd):
    """Within five standard errors."""
    np.testing.assert_array_less(
        np.abs(draws.mean(0) - mean), 5 * sd / np.sqrt(len(draws))
    )
    np.testing.assert_array_less(
        np.abs(draws.std(0) / sd - 1), 5 / np.sqrt(2 * len(draws))
    )


def assert_correlations(draws, expected):
    found = np.corrcoef(draws.reshape(len(draws), -1).T)
    np.testing.assert_allclose(found, expected, atol=5 / np.sqrt(len(draws)))


def batch_of(rows, *data, **options):
    rows = np.asarray(rows)
    return minibatch(10.0 * rows, *data, rows={"n": rows}, **options)


def chunks_of(rows, size, y=None):
    """Chunks in which the last one may be padded."""
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield batch_of(some, *(() if y is None else (y[some],)), capacity=size)


# ------------------------------------------------------------------ exact moments


@pytest.mark.parametrize("data", ["with data", "without data"])
def test_predictive_distribution_is_exact(known, data):
    svi, params = known
    y = (np.full(4, 1e6),) if data == "with data" else ()
    rows = np.array([7, 0, 1, 3])
    batch = batch_of(rows, *y, capacity=6)
    draws = svi.predict(KEY, params, batch, num_samples=DRAWS)
    assert {name: d.shape for name, d in draws.items()} == {
        "y": (DRAWS, 4),
        "moved": (DRAWS, 4),
        "offset": (DRAWS,),
    }
    sd = SCALE[rows]
    assert_moments(draws["moved"], LOC[rows] + 10 * rows, sd)
    assert_moments(draws["y"], LOC[rows] + 10 * rows, np.hypot(sd, NOISE))
    assert_moments(draws["offset"], MU[0] + 1, MU[1])
    assert_correlations(draws["y"], np.eye(4))


def test_a_row_that_is_in_a_batch_twice_has_one_latent(known):
    """One person under two treatments: one latent, and two observations."""
    svi, params = known
    options = {"num_samples": DRAWS, "return_sites": ["z", "y"]}
    draws = svi.predict(KEY, params, batch_of([7, 0, 7], capacity=4), **options)
    np.testing.assert_array_equal(draws["z"][:, 0], draws["z"][:, 2])
    expected = np.eye(3)
    expected[0, 2] = expected[2, 0] = SCALE[7] ** 2 / (SCALE[7] ** 2 + NOISE**2)
    assert_correlations(draws["y"], expected)


@pytest.mark.parametrize("count", [3, 25])
def test_unseen_rows_come_from_the_prior(known, count):
    """Also more of them than the plate has; given mu, they are Normal(mu, 1)."""
    svi, params = known
    batch = minibatch(np.arange(2.0), rows={"n": None}, capacity=count)
    draws = svi.predict(KEY, params, batch, num_samples=DRAWS, unseen=["n"])
    assert set(draws) == {"y", "moved", "offset", "z"}
    assert draws["y"].shape == (DRAWS, 2)
    sd = np.hypot(MU[1], 1)
    assert_moments(draws["z"], MU[0], sd)
    assert_moments(draws["y"], MU[0] + np.arange(2.0), np.hypot(sd, NOISE))
    # Their common mean makes them depend on each other, and on nothing else.
    together = np.column_stack([draws["z"], draws["offset"]])
    covariance = np.full((3, 3), MU[1] ** 2) + np.diag([1, 1, 0])
    deviations = np.sqrt(np.diag(covariance))
    assert_correlations(together, covariance / np.outer(deviations, deviations))


@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize(
    ("guide_class", "scope"),
    [(AutoDiagonalNormal, ""), (AutoDelta, ""), (AutoDelta, "s/")],
)
def test_unseen_rows_with_other_guides_and_names(guide_class, scope, count):
    """Plates go by the names that handlers outside see."""
    scoped = handlers.scope(model, prefix="s") if scope else model
    first = minibatch(np.zeros(N), np.zeros(N), rows={f"{scope}n": np.arange(N)})
    svi, state = svi_of(scoped, guide_class(scoped), first=first)
    plate = f"{scope}n"
    batches = [minibatch(np.zeros(count), rows={plate: None})] * 2
    options = {"num_samples": 1000, "unseen": [plate], **QUIET}
    draws = svi.predict(KEY, state, batches, **options)
    z, mu = draws[f"{scope}z"], draws[f"{scope}offset"] - 1
    assert z.shape == draws[f"{scope}y"].shape == (1000, 2 * count)
    assert_moments(z - mu[:, None], 0, 1)
    assert_correlations(z - mu[:, None], np.eye(2 * count))


def test_unseen_rows_of_a_plate_that_asks_for_no_size():
    def model(y=None, *, x):
        with numpyro.plate("n", N):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(x + z, 0.1), obs=y)

    x = np.zeros(N, "float32")
    first = minibatch(x, x=x, rows={"n": np.arange(N)})
    svi, state = svi_of(model, AutoNormal(model), first=first)
    for count in (3, N + 4):
        new = minibatch(x=np.full(count, 5, "float32"), rows={"n": None})
        y = svi.predict(KEY, state, new, 2000, unseen=["n"])["y"]
        assert y.shape == (2000, count)
        np.testing.assert_allclose(y.mean(0), 5, atol=0.15)


def test_amortised_guide_encodes_rows_that_it_has_not_met():
    """A batch that names no rows is all that it needs; the prior is not asked."""

    def guide(x, y=None):
        numpyro.sample("mu", dist.Delta(0.0))
        with numpyro.plate("n", N, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("slope", 2.0) * x, 1.0))

    x = np.array([0.0, 1.0, 3.0])
    svi, state = svi_of(model, guide, first=minibatch(x, x, rows={"n": None}))
    batches = [minibatch(part, rows={"n": None}, capacity=2) for part in (x[:2], x[2:])]
    draws = svi.predict(KEY, state, batches, num_samples=DRAWS, **QUIET)
    assert_moments(draws["y"], 3 * x, np.hypot(1, NOISE))


def list_of_guides(model):
    return guide_list(model, {"mu": AutoNormal, "z": AutoMultivariateNormal})


GUIDES = {
    "mean field": AutoNormal,
    "multivariate": AutoMultivariateNormal,
    "flow": AutoIAFNormal,
    "Laplace": AutoLaplaceApproximation,
    "DAIS": AutoDAIS,
    "list": list_of_guides,
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_latents_are_those_of_sample_posterior(make):
    """Each guide starts at random values, which differ from row to row."""
    model = hierarchy(N, noise=NOISE)
    y = np.linspace(-1, 2, N).astype("float32")
    svi, state = svi_of(model, make(model), first=whole(y))
    rows, names = np.array([7, 0, 3]), ["mu", "z"]
    options = {"num_samples": 2000, "return_sites": names}
    draws = svi.predict(KEY, state, batch_of(rows), **options)
    params = svi.get_params(state)
    with handlers.substitute(data={"n": jnp.asarray(rows)}):
        of_guide = svi.guide.sample_posterior(KEY, params, sample_shape=(2000,))

    def together(draws):
        return np.column_stack([np.asarray(draws[name]) for name in names])

    one, other = together(draws), together(of_guide)
    assert_same_mean(one, other)
    np.testing.assert_allclose(one.std(0) / other.std(0), 1, atol=0.1)
    np.testing.assert_allclose(np.corrcoef(one.T), np.corrcoef(other.T), atol=0.12)


# ------------------------------------------------------------------ many batches


@settings(max_examples=5)
@given(st.permutations(range(N)), st.integers(1, N - 1))
def test_chunks_equal_one_call_where_draws_do_not_depend_on_the_batch(rows, size):
    svi, state = JOINT
    rows, names = np.array(rows), ["z", "moved", "offset"]
    options = {"num_samples": 5, "return_sites": names}
    one = svi.predict(KEY, state, batch_of(rows), **options)
    chunks = svi.predict(KEY, state, chunks_of(rows, size), **options, **QUIET)
    assert_close(chunks, one, rtol=1e-5, atol=1e-5)


JOINT = svi_of(model, AutoDiagonalNormal(model))


def test_chunks_share_what_is_global_and_nothing_else(known):
    svi, params = known
    rows = np.array([2, 5, 1, 5, 2])
    options = {"num_samples": DRAWS, "return_sites": ["mu", "z", "y"], **QUIET}
    draws = svi.predict(KEY, params, chunks_of(rows, 2), **options)
    assert draws["z"].shape == draws["y"].shape == (DRAWS, 5)
    assert draws["mu"].shape == (DRAWS,)
    assert_moments(draws["z"], LOC[rows], SCALE[rows])
    assert_correlations(draws["y"], np.eye(5))
    assert_correlations(draws["z"], np.eye(5))
    first = svi.predict(KEY, params, batch_of(rows[:2]), **options)
    np.testing.assert_array_equal(draws["mu"], first["mu"])


def walk(scale, per_row):
    """Three steps, each of rows or of all; NumPyro's scan makes their keys."""

    def step(carry, _):
        if not per_row:
            carry = numpyro.sample("w", dist.Normal(carry, scale))
            return carry, carry
        with numpyro.plate("n", N, subsample_size=2):
            return carry, numpyro.sample("w", dist.Normal(0, scale))

    return scan(step, 0.0, jnp.arange(3))[1]


def of_scan(per_row, in_guide):
    """Rows are sums of three draws, or share a global sum of variance 14."""

    def model(x):
        total = walk(1.0, per_row).sum(0)
        with numpyro.plate("n", N, subsample_size=2):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(total + z, 0.01))

    def guide(x):
        scale = numpyro.param("scale", 1.0)
        if in_guide:
            walk(scale, per_row)
        with numpyro.plate("n", N, subsample_size=2):
            numpyro.sample("z", dist.Normal(0, scale))

    return model, guide


def of_keys(x):
    """Keys that the model makes by itself, for its rows."""
    with numpyro.plate("n", N, subsample_size=2):
        noise = jax.random.normal(numpyro.prng_key(), (2,))
        numpyro.sample("y", dist.Normal(noise, 0.01))


@pytest.mark.parametrize(
    ("model", "guide", "common"),
    [
        (*of_scan(per_row=True, in_guide=True), 0),
        (*of_scan(per_row=True, in_guide=False), 0),
        (*of_scan(per_row=False, in_guide=True), 14 / 15),
        (*of_scan(per_row=False, in_guide=False), 14 / 15),
        (of_keys, lambda x: numpyro.param("scale", 1.0), 0),
    ],
)
def test_rows_have_in_common_what_is_global(model, guide, common):
    """Within batches, and between them."""
    batches = [
        minibatch(np.zeros(2), rows={"n": np.array(r)}) for r in ([0, 1], [3, 2])
    ]
    svi, state = svi_of(model, guide, first=batches[0])
    options = {"num_samples": DRAWS, "return_sites": ["y"], **QUIET}
    y = svi.predict(KEY, state, batches, **options)["y"]
    assert_correlations(y, np.full((4, 4), common) + (1 - common) * np.eye(4))


# ------------------------------------------------------------------ NumPyro's answers


def crossed(x, y=None):
    with numpyro.plate("items", 4, dim=-2):
        a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", N, subsample_size=len(x), dim=-1):
        z = numpyro.sample("z", dist.Normal(0, 1))
    with numpyro.plate("items", 4, dim=-2):
        with numpyro.plate("n", N, subsample_size=len(x), dim=-1):
            numpyro.deterministic("sum", a + z)
            numpyro.sample("y", dist.Normal(a + z, 1), obs=y)


def nested(x, y=None):
    with numpyro.plate("groups", 3):
        g = numpyro.sample("g", dist.Normal(0, 1))
        with numpyro.plate("n", N, subsample_size=len(x), dim=-2):
            z = numpyro.sample("z", dist.Normal(g, 1))
            numpyro.deterministic("twice", 2 * z)
            numpyro.sample(
                "y", dist.Normal(z, 1), obs=None if y is None else y[:, None]
            )


def events(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)):
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.deterministic("log", jnp.log(p))
        with handlers.mask(mask=jnp.asarray(x) > 15):
            numpyro.sample("y", dist.Normal(p[:, 0], 1), obs=y)
        numpyro.factor("f", -(p[:, 1] ** 2))


def in_a_scan(x, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    plate = numpyro.plate("n", N, subsample_size=len(x))

    def step(carry, obs):
        with plate:
            w = numpyro.sample("w", dist.Normal(carry, 1))
            numpyro.sample("y", dist.Normal(w, 1), obs=obs)
        return w, w

    steps = None if y is None else jnp.stack([y, y + 1])
    scan(step, mu * jnp.ones(len(x)), steps, length=2)


@pytest.mark.parametrize("model", [model, crossed, nested, events, in_a_scan])
def test_sites_and_log_likelihoods_are_numpyros_on_the_same_draws(model):
    """NumPyro is given draws of the batch's rows, and of nothing else."""
    rows, key = np.array([8, 1, 4]), jax.random.key(3)
    y = np.linspace(-1, 1, 3).astype("float32")
    svi, state = svi_of(model, AutoNormal(model), first=batch_of(rows, y))
    batch = batch_of(rows, y)
    latents = [name.removesuffix("_auto_loc") for name in svi.get_params(state)]
    latents = [name for name in latents if not name.endswith("scale")]
    options = {"num_samples": 7}
    every = svi.predict(key, state, batch, **options)
    drawn = svi.predict(key, state, batch, return_sites=latents, **options)
    pinned = handlers.substitute(model, data={"n": jnp.asarray(rows)})
    expected = Predictive(pinned, drawn)(key, *batch.args)
    found = {name: every[name] for name in expected if name in every}
    names = [name for name in found if name != "y"]
    assert_close({n: found[n] for n in names}, {n: expected[n] for n in names}, 1e-5)
    likelihood = svi.log_likelihood(key, state, batch, **options)
    expected = numpyros_log_likelihood(pinned, drawn, *batch.args)
    assert_close(dict(likelihood), dict(expected), rtol=1e-4, atol=1e-4)


def test_log_likelihoods_of_chunks_are_cut_and_concatenated():
    svi, _ = svi_of(model, AutoDelta(model))
    params = {"mu_auto_loc": jnp.array(0.0), "z_auto_loc": jnp.asarray(LOC)}
    rows, y = np.array([8, 1, 4, 0, 9]), np.linspace(-1, 1, N)
    expected = stats.norm.logpdf(y[rows], LOC[rows] + 10 * rows, NOISE)
    chunks = svi.log_likelihood(
        KEY, params, list(chunks_of(rows, 2, y)), num_samples=3, **QUIET
    )
    np.testing.assert_allclose(chunks["y"], np.tile(expected, (3, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="observes nothing"):
        svi.log_likelihood(KEY, params, batch_of(rows))


def test_observed_values_and_conditions_hold_for_what_depends_on_them():
    def observed(d, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("n", N, subsample_size=len(d)):
            d = numpyro.sample("d", dist.Normal(0, 1), obs=d)
            z = numpyro.sample("z", dist.Normal(0, 1e3))
            numpyro.sample("y", dist.Normal(z + b * d, 1e-3), obs=y)

    held = handlers.condition(observed, data={"b": 100.0})
    values = {"z": jnp.arange(1.0 * N)}
    guide = AutoDelta(held, init_loc_fn=init_to_value(values=values))
    svi, state = svi_of(held, guide)
    batch = minibatch(np.array([50.0, 30.0]), rows={"n": np.array([5, 3])})
    draws = svi.predict(KEY, state, batch, num_samples=400)
    np.testing.assert_allclose(draws["y"], [[5005, 3003]] * 400, atol=0.01)
    # What is returned for an observed site is a draw of it.
    assert_moments(draws["d"], 0.0, 1.0)


# ------------------------------------------------------------------ enumeration

WEIGHT, APART = 0.3, 5.0


def mixture(x):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        one = dist.Bernoulli(WEIGHT)
        c = numpyro.sample("c", one, infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(z + APART * c, 1), obs=x)


@pytest.fixture(scope="module")
def enumerated():
    guide = AutoDelta(handlers.block(mixture, hide=["c"]))
    svi, _ = svi_of(mixture, guide, TraceEnum_ELBO(), first=whole())
    return svi, {"z_auto_loc": jnp.zeros(N)}


X = np.array([3.0, 2.2, 0.0])
JOINTLY = np.stack(
    [
        np.log(1 - WEIGHT) + stats.norm.logpdf(X),
        np.log(WEIGHT) + stats.norm.logpdf(X, APART),
    ]
)


def test_enumerated_latents_are_summed_out_of_log_likelihoods(enumerated):
    svi, params = enumerated
    batch = minibatch(X, rows={"n": np.array([3, 1, 2])}, capacity=4)
    found = svi.log_likelihood(KEY, params, batch, num_samples=2)["y"]
    expected = np.logaddexp(*JOINTLY)
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-5)


def test_enumerated_latents_are_drawn_given_the_data(enumerated):
    svi, params = enumerated
    batch = minibatch(X, rows={"n": np.array([3, 1, 2])}, capacity=4)
    draws = svi.predict(KEY, params, batch, num_samples=DRAWS, infer_discrete=True)
    odds = np.exp(JOINTLY[1] - np.logaddexp(*JOINTLY))
    error = np.sqrt(odds * (1 - odds) / DRAWS)
    np.testing.assert_array_less(np.abs(draws["c"].mean(0) - odds), 5 * error + 1e-4)
    # The returned data are draws given these.
    assert_moments(draws["y"] - APART * draws["c"], 0.0, 1.0)
    without = svi.predict(KEY, params, batch, num_samples=DRAWS)
    assert set(without) == {"y"}
    variance = 1 + APART**2 * WEIGHT * (1 - WEIGHT)
    np.testing.assert_allclose(without["y"].mean(0), WEIGHT * APART, atol=0.1)
    np.testing.assert_allclose(without["y"].var(0), variance, rtol=0.05)


# ------------------------------------------------------------------ nothing stale


def test_each_call_sees_what_is_there_now():
    data, factor = jnp.zeros(N), 1

    def indexing(x):
        with numpyro.plate("n", N, subsample_size=len(x)) as rows:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z * factor, 0.5), obs=data[rows])

    svi, _ = svi_of(indexing, AutoDelta(indexing), first=whole())
    params = {"z_auto_loc": jnp.ones(N)}

    def ask(scale=None):
        batch = minibatch(np.zeros(3), rows={"n": np.array([4, 1, 2])})
        return svi.log_likelihood(KEY, params, batch, num_samples=1)["y"][0, 0]

    def expected(datum, factor):
        return stats.norm.logpdf(datum, factor, 0.5)

    np.testing.assert_allclose(ask(), expected(0.0, 1), rtol=1e-5)
    data = data + 10
    np.testing.assert_allclose(ask(), expected(10.0, 1), rtol=1e-5)
    factor = 3.0
    np.testing.assert_allclose(ask(), expected(10.0, 3), rtol=1e-5)
    svi.model = lambda x: (numpyro.handlers.scale(indexing, scale=2.0)(x), None)[1]
    factor = 2
    np.testing.assert_allclose(ask(), expected(10.0, 2), rtol=1e-5)


def test_arrays_inside_compiled_functions_of_the_model_are_current():
    def of(table):
        look_up = jax.jit(lambda rows: table[rows])

        def model(x):
            with numpyro.plate("n", N, subsample_size=len(x)) as rows:
                numpyro.sample("y", dist.Normal(look_up(rows), 1e-4))

        svi, state = svi_of(model, lambda x: None, first=whole())
        batch = minibatch(np.zeros(2), rows={"n": np.array([3, 1])})
        return svi.predict(KEY, state, batch, num_samples=1)["y"][0]

    for table in (jnp.arange(1.0 * N), jnp.arange(1.0 * N) * 2):
        np.testing.assert_allclose(of(table), table[np.array([3, 1])], atol=1e-2)


def test_a_callback_is_the_models_own():
    def predicted(value):
        seen = []

        def model(x):
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            loc = jax.pure_callback(
                lambda: np.float32(value), shape, vmap_method="sequential"
            )
            jax.debug.callback(seen.append, loc)
            with numpyro.plate("n", N, subsample_size=len(x)):
                numpyro.sample("y", dist.Normal(loc, 1e-3))

        svi, state = svi_of(model, lambda x: None, first=whole())
        seen.clear()
        y = svi.predict(KEY, state, whole(), num_samples=2)["y"]
        jax.effects_barrier()
        assert seen
        assert set(map(float, seen)) == {value}
        return y

    for value in (1.0, 50.0):
        np.testing.assert_allclose(predicted(value), value, atol=0.1)


def test_arguments_that_are_the_same_in_all_batches_are_values():
    """Host code works on them, as in a step; equal ones of another type are others."""

    def typed(x, constant, table):
        loc = 100.0 if isinstance(constant, bool) else constant * len(set(table))
        with numpyro.plate("n", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(loc, 1e-3))

    options = {"constant": 1, "table": np.array([3, 3])}
    loss = Trace_ELBO()
    svi = SubsampleSVI(typed, lambda *_, **__: None, optax.sgd(0.1), loss, **options)
    state = svi.init(KEY, whole())
    for constant, expected in ((1, 1.0), (True, 100.0), (1.0, 1.0), (2.0, 2.0)):
        svi.static_kwargs["constant"] = constant
        y = svi.predict(KEY, state, whole(), num_samples=1)["y"]
        np.testing.assert_allclose(y, expected, atol=0.1)


def test_one_compilation_for_each_shape():
    runs = []

    def counted(x):
        runs.append(len(x))
        independent(x, N)

    rows = {"n": np.arange(2)}
    first = minibatch(np.zeros(2), rows=rows)
    svi, state = svi_of(counted, AutoNormal(counted), first=first)

    def predict(rows, size, key=KEY):
        options = {"num_samples": 2, **QUIET}
        svi.predict(key, state, chunks_of(np.arange(rows), size), **options)

    predict(4, 4)
    runs.clear()
    predict(4, 4)
    one_call = len(runs)
    runs.clear()
    with compilations() as compiled:
        predict(N, 4, jax.random.key(7))
    assert len(runs) == one_call
    assert not compiled
    predict(N, 5)
    assert 5 in runs


# ------------------------------------------------------------------ what is given


def test_all_that_holds_parameters_is_taken(known):
    svi, _ = JOINT
    batches = [whole(y=np.ones(N))]
    fit = svi.fit(KEY, batches, 3, **QUIET)
    ran = svi.run(KEY, 3, batches[0], **QUIET)
    for result in (fit, ran):
        given = [result, result.state, result.params]
        one, *others = (svi.predict(KEY, g, whole(), num_samples=3) for g in given)
        for other in others:
            assert_equal(one, other)


class Encoder(nn.Module):
    """Has parameters, dropout and batch statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dropout(0.5, deterministic=False)(x)[..., 0]


def close_to_latents(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1e-3), obs=y)


def test_losses_without_a_step_carry_the_mutable_state():
    """The loss of a step is computed with the same key, before it moves anything."""
    x = np.linspace(-1, 1, 4).astype("float32")
    batch = minibatch(x, x, rows={"n": None})
    svi, state = svi_of(close_to_latents, encoding, first=batch)
    np.testing.assert_allclose(
        svi.evaluate(state, batch), svi.update(state, batch)[1], rtol=1e-5
    )
    fit = svi.fit(KEY, [batch], 2, validation=[batch], **QUIET)
    assert np.isfinite(fit.validation_losses).all()


def encoding(x, y=None):
    net = flax_module(
        "net",
        Encoder(),
        jnp.ones((1, 1)),
        mutable=["batch_stats"],
        apply_rng=["dropout"],
    )
    keys = {"dropout": numpyro.prng_key()}
    with numpyro.plate("n", N, subsample_size=len(x)):
        numpyro.sample("z", dist.Normal(net(x[:, None], rngs=keys), 0.01))


def test_networks_keep_their_state_and_drop_out_row_by_row():
    """With dropout, a row is 0 or twice its input, whatever the other rows are."""
    halves = [np.linspace(-1, 1, 4), np.linspace(-1, 1, 4)]
    batches = [minibatch(x.astype("float32"), rows={"n": None}) for x in halves]
    svi, state = svi_of(close_to_latents, encoding, first=batches[0])
    options = {"num_samples": 2000, "return_sites": ["y"], **QUIET}
    y = svi.predict(KEY, state, batches, **options)["y"]
    assert_correlations(y, np.eye(8))
    np.testing.assert_allclose((np.abs(y[:, 0]) < 0.1).mean(), 0.5, atol=0.06)
    params = svi.get_params(state)
    with pytest.raises(ValueError, match=r"lack \['net\$state'\]"):
        svi.predict(KEY, params, batches, **QUIET)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoLaplaceApproximation])
def test_missing_parameters_are_named(guide_class):
    svi, state = svi_of(model, guide_class(model))
    params = svi.get_params(state)
    for name in params:
        wrong = {n + "s" if n == name else n: own for n, own in params.items()}
        with pytest.raises(ValueError, match=rf"lack \['{name}'\]"):
            svi.predict(KEY, wrong, whole(), num_samples=1)
    with pytest.raises(ValueError, match="not list"):
        svi.predict(KEY, [], whole())


def test_nothing_needs_compilation(known):
    svi, params = known
    compiled = svi.predict(KEY, params, whole(), num_samples=2)
    with jax.disable_jit():
        eager = svi.predict(KEY, params, whole(), num_samples=2)
    assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


def test_a_pin_around_counts_each_time(known):
    svi, params = known
    batch = minibatch(np.zeros(2), rows={"n": None})
    for rows in ([1, 2], [8, 9]):
        with handlers.substitute(data={"n": jnp.array(rows)}):
            draws = svi.predict(KEY, params, batch)
        np.testing.assert_allclose(draws["moved"].mean(0), LOC[rows], atol=0.3)


# ------------------------------------------------------------------ padding


def series(y):
    with numpyro.plate("n", N, subsample_size=len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.deterministic("path", jnp.stack([z, z, z, z]))
        with numpyro.plate("time", 4, dim=-2):
            numpyro.sample("y", dist.Normal(z, 1), obs=y.T)
        numpyro.deterministic("square", jnp.outer(z, z))
    numpyro.deterministic("level", 2 * z)
    numpyro.deterministic("mean", z.mean())
    numpyro.deterministic("nothing", jnp.ones(3))


@pytest.mark.parametrize(
    ("site", "shape"),
    [
        ("y", (4, 3)),
        ("path", (4, 3)),
        ("nothing", (3,)),
        ("square", None),
        ("level", None),
        ("mean", None),
    ],
)
def test_padding_never_comes_back(site, shape):
    """What cannot be cut is an error."""
    y = np.ones((3, 4), "float32")
    padded = minibatch(y, rows={"n": np.array([2, 0, 7])}, capacity=6)
    svi, state = svi_of(series, AutoNormal(series), first=padded)
    options = {"num_samples": 2, "return_sites": [site]}
    exact = minibatch(y, rows={"n": np.array([2, 0, 7])})
    assert set(svi.predict(KEY, state, exact, **options)) == {site}
    if shape:
        assert svi.predict(KEY, state, padded, **options)[site].shape == (2, *shape)
        return
    with pytest.raises(
        ValueError, match=rf"\['n'\] are padded, and site '{site}'.*capacity"
    ):
        svi.predict(KEY, state, padded, **options)


# Nothing is fitted, so the scale does not matter.
@pytest.mark.filterwarnings(
    "ignore::numpyro_dynamic_subsample.UnscaledSubsampleWarning"
)
def test_rows_with_their_ratings_and_a_plate_of_globals():
    """Ratings run along a plate of their own, of another length in each batch."""

    def ratings(row, item, y=None):
        with numpyro.plate("items", 4):
            a = numpyro.sample("a", dist.Normal(0, 1))
        with numpyro.plate("n", N, subsample_size=3):
            z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("ratings", len(row)):
            numpyro.sample("y", dist.Normal(z[row] + a[item], 0.001), obs=y)

    batches = [
        minibatch(
            np.array(row),
            np.array(item),
            rows={"n": np.array(rows)},
            along={"ratings": (0, 1)},
            capacity={"n": 3, "ratings": 4},
        )
        for rows, row, item in [
            ([0, 5, 2], [0, 1, 2, 2], [3, 1, 0, 2]),
            ([9, 3], [0, 1, 1], [3, 2, 1]),
        ]
    ]
    first = minibatch(
        *batches[0].args,
        np.zeros(4),
        rows=batches[0].rows,
        along={"ratings": (0, 1, 2)},
    )
    svi, state = svi_of(ratings, AutoNormal(ratings), first=first)
    options = {"num_samples": 20, "return_sites": ["a", "z", "y"], **QUIET}
    draws = svi.predict(KEY, state, batches, **options)
    shapes = {name: own.shape for name, own in draws.items()}
    assert shapes == {"a": (20, 4), "z": (20, 5), "y": (20, 7)}
    row, item = [0, 1, 2, 2, 3, 4, 4], [3, 1, 0, 2, 3, 2, 1]
    expected = draws["z"][:, row] + draws["a"][:, item]
    np.testing.assert_allclose(draws["y"], expected, atol=0.01)


# ------------------------------------------------------------------ errors


def indexing(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)) as rows:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z + jnp.sin(rows), 1), obs=y)


def with_a_parameter(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)):
        w = numpyro.param("w", jnp.arange(1.0 * N), event_dim=0)
        numpyro.sample("y", dist.Normal(w, 1), obs=y)


def outside(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.deterministic("mean", z.mean())


def observed_only(x, y=None):
    numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("other", len(x)):
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def with_sites_of_its_data(x, y=None):
    model(x, y)
    if y is not None:
        numpyro.deterministic("residual", y - x)


def one(rows=None, unseen=(), count=3, return_sites=None, **options):
    rows = {"n": None} if rows is None else rows
    batch = minibatch(np.zeros(count), rows=rows, along={"n": 0}, **options)
    return batch, {"unseen": unseen, "return_sites": return_sites}


ROWS = {"n": np.arange(3)}
CHUNKS = [batch_of([0, 1]), batch_of([2, 3])]
TRANSPOSED = batch_of([0, 1, 2, 3], np.zeros((4, 4)))


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (model, one(), r"the rows of plate 'n' \(size 10\), and the batch does not"),
        (model, one(unseen=["m"]), r"unseen names a plate 'm'.*\['n'\]"),
        (model, one(ROWS | {"m": ROWS["n"]}), r"names a plate 'm'"),
        (model, one({"n": np.array([0, 1, 10])}), r"from 0 to 10"),
        (model, one(ROWS, return_sites=["w"]), r"'w'.*\['moved', 'mu'"),
        (indexing, one(unseen=["n"]), r"'y' .* plate 'n' .* does not have the unseen"),
        (with_a_parameter, one(unseen=["n"]), r"'y' depends on the rows of plate 'n'"),
        (with_a_parameter, one(unseen=["n"], count=N), r"'y' depends on the rows"),
        (outside, (CHUNKS, {}), r"'mean' stands outside of the plates"),
        (observed_only, ([np.ones(2)] * 2, {}), r"'y' has the rows of plate 'other'"),
        (
            with_sites_of_its_data,
            ([CHUNKS[0], batch_of([2, 3], np.ones(2))], {}),
            r"Batch 1 gives .*leave \['residual'\] out",
        ),
        (model, (np.zeros(3), {}), "one Minibatch or an iterable of them, not ndarray"),
        (crossed, (TRANSPOSED, {}), r"'y' .* runs along plate 'n' with axis 0, but"),
        (model, ([], {}), "no batch"),
        (model, (CHUNKS, {"num_samples": 0}), "whole number of at least 1, not 0"),
    ],
)
def test_errors(model, asked, message):
    first = as_minibatch((np.ones(2), np.ones(2))) if model is observed_only else None
    guide = (lambda *_: None) if model is with_a_parameter else AutoNormal(model)
    svi, state = svi_of(model, guide, first=first)
    batches, options = asked
    with pytest.raises(ValueError, match=message):
        svi.predict(KEY, state, batches, **{"num_samples": 2, **options, **QUIET})


def test_a_guide_that_needs_data_says_so():
    svi, state = svi_of(
        close_to_latents, AutoSemiDAIS(close_to_latents, close_to_latents, K=2)
    )
    with pytest.raises(ValueError, match=r"AutoSemiDAIS .* lacks those .*\['y'\]"):
        svi.predict(KEY, state, batch_of([1, 2]), num_samples=2)
    batch = minibatch(np.zeros(12), np.zeros(12), rows={"n": None})
    with pytest.raises(ValueError, match="12 unseen rows"):
        svi.predict(KEY, state, batch, num_samples=2, unseen=["n"])


def test_enumerated_latents_that_cannot_be_served_are_errors(enumerated):
    svi, params = enumerated
    batch = minibatch(X, rows={"n": np.array([3, 1, 2])})
    with pytest.raises(ValueError, match=r"'c' is enumerated.*infer_discrete=True"):
        svi.predict(KEY, params, batch, return_sites=["c"])

    def of_all(x):
        c = numpyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with numpyro.plate("n", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(APART * c, 1), obs=x)

    svi, state = svi_of(of_all, lambda x: None, TraceEnum_ELBO(), first=whole())
    with pytest.raises(ValueError, match=r"'c' stands outside of the plates \['n'\]"):
        svi.predict(KEY, state, batch, infer_discrete=True)
    with pytest.raises(ValueError, match=r"'y' cannot be taken row by row.*'c'"):
        svi.log_likelihood(KEY, state, batch)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(("rows", "draws"), [(64, 1000), (100_000, 50)])
def test_memory_is_bounded_whatever_the_plate_and_the_batch_are(
    rows, draws, monkeypatch
):
    """That of a block of draws, besides the result."""
    size, memory = 1_000_000, []

    def model(x):
        independent(x, size)

    batch = minibatch(np.zeros(rows, "float32"), rows={"n": np.arange(rows)})
    svi, state = svi_of(model, AutoNormal(model), first=batch)
    params = svi.get_params(state)
    compile_program = jax.stages.Lowered.compile

    def compiled(lowered, *options):
        program = compile_program(lowered, *options)
        memory.append(program.memory_analysis())
        return program

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    svi.predict(KEY, params, batch, num_samples=draws)
    (of_draws,) = memory
    assert of_draws.output_size_in_bytes <= (draws + 1) * rows * 4 + 1000
    assert of_draws.temp_size_in_bytes < 2**25 + 8 * rows * 4
