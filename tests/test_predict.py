"""Predictions and log likelihoods of batches, against exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from scipy import stats

from models import independent
from numpyro_dynamic_subsample import SubsampleSVI, minibatch
from numpyro_dynamic_subsample.steps.predict import Request

N, NOISE, DRAWS = 10, 0.5, 20_000
LOC, SCALE = np.linspace(-2, 3, N), np.linspace(0.2, 1.5, N)
MU = 0.7, 0.4


def model(x, y=None):
    """Gives `moved` per row, and `offset`, which is one for all."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("offset", mu + 1)
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.deterministic("moved", z + x)
        numpyro.sample("y", dist.Normal(z + x, NOISE), obs=y)


def svi_of(model, guide):
    svi = SubsampleSVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), jnp.zeros(N), jnp.zeros(N))
    return svi, state


@pytest.fixture(scope="module")
def fitted():
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


def x_of(rows):
    return 10.0 * jnp.asarray(rows)


@pytest.mark.parametrize("data", ["with data", "without data"])
def test_predictive_distribution_is_exact(fitted, data):
    svi, params = fitted
    rows = np.array([7, 0, 7, 3])
    y = (jnp.full(4, 1e6),) if data == "with data" else ()
    draws = svi.predict(
        jax.random.key(1),
        params,
        x_of(rows),
        *y,
        num_samples=DRAWS,
        indices={"n": rows},
        valid={"n": 3},
    )
    assert {name: d.shape for name, d in draws.items()} == {
        "y": (DRAWS, 3),
        "moved": (DRAWS, 3),
        "offset": (DRAWS,),
    }
    rows, sd = rows[:3], SCALE[rows[:3]]
    assert_moments(draws["moved"], LOC[rows] + x_of(rows), sd)
    assert_moments(draws["y"], LOC[rows] + x_of(rows), np.hypot(sd, NOISE))
    assert_moments(draws["offset"], MU[0] + 1, MU[1])


@pytest.mark.parametrize("count", [3, 25])
def test_unseen_rows_come_from_the_prior(fitted, count):
    """Also more of them than the plate has; given mu, they are Normal(mu, 1)."""
    svi, params = fitted
    draws = svi.predict(
        jax.random.key(1),
        params,
        jnp.arange(1.0 * count),
        num_samples=DRAWS,
        unseen=["n"],
        valid={"n": 2},
    )
    assert set(draws) == {"y", "moved", "offset", "z"}
    assert draws["y"].shape == (DRAWS, 2)
    sd = np.hypot(MU[1], 1)
    assert_moments(draws["z"], MU[0], sd)
    assert_moments(draws["y"], MU[0] + np.arange(2.0), np.hypot(sd, NOISE))
    # Their common mean makes them depend on each other, and on nothing else.
    np.testing.assert_allclose(np.cov(draws["z"].T)[0, 1], MU[1] ** 2, atol=0.05)
    np.testing.assert_allclose(
        np.cov(draws["z"][:, 0], draws["offset"])[0, 1], MU[1] ** 2, atol=0.05
    )


@pytest.mark.parametrize("guide_class", [AutoDiagonalNormal, AutoDelta])
def test_unseen_rows_with_other_guides(guide_class):
    svi, state = svi_of(model, guide_class(model))
    draws = svi.predict(
        jax.random.key(0), state, jnp.zeros(12), num_samples=2000, unseen=["n"]
    )
    assert draws["z"].shape == (2000, 12)
    assert_moments(draws["z"] - (draws["offset"] - 1)[:, None], 0, 1)


def batches_of(rows, size, y=None):
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        data = () if y is None else (y[some],)
        yield minibatch(x_of(some), *data, rows={"n": some}, capacity=size)


def test_chunks_equal_one_call_where_draws_do_not_depend_on_the_batch():
    rows = np.random.default_rng(0).permutation(N)
    svi, state = svi_of(model, AutoDiagonalNormal(model))
    key, names = jax.random.key(2), ["z", "moved", "offset"]
    options = {"num_samples": 5, "return_sites": names}
    whole = svi.predict(key, state, x_of(rows), indices={"n": rows}, **options)
    chunks = svi.predict_batches(
        key, state, batches_of(rows, 4), progress_bar=False, **options
    )
    for name in names:
        np.testing.assert_allclose(chunks[name], whole[name], rtol=1e-5)


def test_chunks_share_what_is_global_and_nothing_else(fitted):
    svi, params = fitted
    rows = np.array([2, 5, 2, 5, 2])
    draws = svi.predict_batches(
        jax.random.key(2),
        params,
        batches_of(rows, 2),
        num_samples=DRAWS,
        return_sites=["mu", "z", "y"],
        progress_bar=False,
    )
    assert draws["z"].shape == draws["y"].shape == (DRAWS, 5)
    assert draws["mu"].shape == (DRAWS,)
    assert_moments(draws["z"], LOC[rows], SCALE[rows])
    # Rows of different chunks have no randomness in common.
    np.testing.assert_allclose(np.corrcoef(draws["y"].T), np.eye(5), atol=0.05)
    np.testing.assert_allclose(np.corrcoef(draws["z"].T), np.eye(5), atol=0.05)
    first = svi.predict(
        jax.random.key(2),
        params,
        x_of(rows[:2]),
        num_samples=DRAWS,
        return_sites=["mu"],
        indices={"n": rows[:2]},
    )
    np.testing.assert_array_equal(draws["mu"], first["mu"])


def test_log_likelihood_is_that_of_the_draws():
    svi, _ = svi_of(model, AutoDelta(model))
    params = {"mu_auto_loc": jnp.array(0.0), "z_auto_loc": jnp.asarray(LOC)}
    rows, y = np.array([8, 1, 4, 0, 9]), np.linspace(-1, 1, N)
    expected = stats.norm.logpdf(y[rows], LOC[rows] + x_of(rows), NOISE)
    one = svi.log_likelihood(
        jax.random.key(0),
        params,
        x_of(rows),
        y[rows],
        num_samples=3,
        indices={"n": rows},
        valid={"n": 4},
    )
    chunks = svi.log_likelihood_batches(
        jax.random.key(0),
        params,
        list(batches_of(rows, 2, y)),
        num_samples=3,
        progress_bar=False,
    )
    assert one["y"].shape == (3, 4)
    np.testing.assert_allclose(one["y"], np.tile(expected[:4], (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(chunks["y"], np.tile(expected, (3, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="observes nothing"):
        svi.log_likelihood(jax.random.key(0), params, x_of(rows), indices={"n": rows})


def test_one_compilation_for_each_capacity():
    runs = []

    def counted(x):
        runs.append(len(x))
        independent(x, N)

    svi = SubsampleSVI(counted, AutoNormal(counted), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), jnp.zeros(2), indices={"n": jnp.arange(2)})
    list_of = lambda size: list(batches_of(np.arange(N), size))  # noqa: E731
    options = {"num_samples": 2, "progress_bar": False}
    svi.predict_batches(jax.random.key(0), state, list_of(4)[:1], **options)
    before = len(runs)
    svi.predict_batches(jax.random.key(0), state, list_of(4), **options)
    svi.predict_batches(jax.random.key(1), svi.get_params(state), list_of(4), **options)
    assert len(runs) == before
    svi.predict_batches(jax.random.key(0), state, list_of(5), **options)
    assert len(runs) > before


def indexing(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)) as rows:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z + jnp.sin(rows), 1), obs=y)


def outside(x, y=None):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.deterministic("mean", z.mean())
    numpyro.sample("y", dist.Normal(z.sum(), 1), obs=y if y is None else y.sum())


def observed_only(x, y=None):
    numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("other", len(x)):
        numpyro.sample("y", dist.Normal(x, 1), obs=y)


def chunked(svi, state, **options):
    some = [minibatch(x_of(r), rows={"n": r}) for r in np.arange(4).reshape(2, 2)]
    if svi.model is observed_only:
        some = [minibatch(batch.args[0], rows={"other": None}) for batch in some]
    svi.predict_batches(
        jax.random.key(0), state, some, num_samples=2, progress_bar=False, **options
    )


def one(**options):
    def ask(svi, state):
        svi.predict(jax.random.key(0), state, jnp.zeros(3), num_samples=2, **options)

    return ask


ROWS = {"n": jnp.arange(3)}


@pytest.mark.parametrize(
    ("model", "ask", "message"),
    [
        (model, one(), r"depends on the rows of plate 'n' \(size 10\), which nobody"),
        (model, one(unseen=["m"]), r"unseen names a plate 'm'.*\['n'\]"),
        (model, one(indices=ROWS | {"m": ROWS["n"]}), r"names a plate 'm'"),
        (model, one(indices={"n": jnp.array([0, 1, 10])}), r"from 0 to 10"),
        (model, one(indices=ROWS, valid={"n": 4}), r"'n' is 4, .* 1 and 3"),
        (model, one(indices=ROWS, return_sites=["w"]), r"'w'.*\['moved', 'mu'"),
        (
            indexing,
            one(unseen=["n"]),
            r"'y' depends on the rows of plate 'n' .* none of those",
        ),
        (outside, chunked, r"'mean' stands outside of the plates"),
        (observed_only, chunked, r"'y' has the rows of plate 'other'"),
    ],
)
def test_errors(model, ask, message):
    svi, state = svi_of(model, AutoNormal(model))
    with pytest.raises(ValueError, match=message):
        ask(svi, state)


def test_amortised_guide_needs_no_rows():
    def guide(x, y=None):
        numpyro.sample("mu", dist.Delta(0.0))
        with numpyro.plate("n", N, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("slope", 2.0) * x, 1.0))

    svi = SubsampleSVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    x = jnp.array([0.0, 1.0, 3.0])
    state = svi.init(jax.random.key(0), x, x)
    batches = [minibatch(part, rows={"n": None}, capacity=2) for part in (x[:2], x[2:])]
    draws = svi.predict_batches(
        jax.random.key(0), state, batches, num_samples=DRAWS, progress_bar=False
    )
    assert_moments(draws["y"], 3 * np.asarray(x), np.hypot(1, NOISE))


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

    svi = SubsampleSVI(ratings, AutoNormal(ratings), optax.sgd(0.1), Trace_ELBO())
    capacity = {"n": 3, "ratings": 4}
    batches = [
        minibatch(
            np.array(row),
            np.array(item),
            rows={"n": np.array(rows)},
            along={"ratings": (0, 1)},
            capacity=capacity,
        )
        for rows, row, item in [
            ([0, 5, 2], [0, 1, 2, 2], [3, 1, 0, 2]),
            ([9, 3], [0, 1, 1], [3, 2, 1]),
        ]
    ]
    state = svi.init(
        jax.random.key(0), *batches[0].args, jnp.zeros(4), indices=batches[0].pinned
    )
    draws = svi.predict_batches(
        jax.random.key(0),
        state,
        batches,
        num_samples=20,
        return_sites=["a", "z", "y"],
        progress_bar=False,
    )
    shapes = {name: own.shape for name, own in draws.items()}
    assert shapes == {"a": (20, 4), "z": (20, 5), "y": (20, 7)}
    row, item = [0, 1, 2, 2, 3, 4, 4], [3, 1, 0, 2, 3, 2, 1]
    expected = draws["z"][:, row] + draws["a"][:, item]
    np.testing.assert_allclose(draws["y"], expected, atol=0.01)


def test_a_pin_around_counts_each_time(fitted):
    svi, params = fitted
    for rows in ([1, 2], [8, 9]):
        with handlers.substitute(data={"n": jnp.array(rows)}):
            draws = svi.predict(jax.random.key(0), params, jnp.zeros(2))
        np.testing.assert_allclose(draws["moved"].mean(0), LOC[rows], atol=0.3)


def test_memory_is_that_of_the_batch():
    size = 1_000_000

    def model(x):
        independent(x, size)

    svi = SubsampleSVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
    rows = {"n": np.arange(64)}
    state = svi.init(jax.random.key(0), jnp.zeros(64), indices=rows)
    params = svi.get_params(state)
    options = {"num_samples": 1000, "indices": rows}
    svi.predict(jax.random.key(0), params, jnp.zeros(64), **options)
    (draws,) = svi._programs.values()
    static = Request(num_samples=1000), jax.tree.structure(((0,), {})), (None,)
    given = jax.random.key(0), params, 0, ([jnp.zeros(64)], rows, {})
    memory = draws.lower(static, *given).compile().memory_analysis()
    assert memory.output_size_in_bytes <= 1000 * 64 * 4 + 1000
    assert memory.temp_size_in_bytes < 1000 * 64 * 4
