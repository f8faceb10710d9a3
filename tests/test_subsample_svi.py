"""Steps with pinned rows and valid counts equal those of the batch without padding."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
)
from scipy.stats import norm

from checks import assert_close, assert_equal
from models import CASES, N, guide_list, independent, plate_of
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample, minibatch

CAPACITY = 6
ROWS = np.array([5, 0, 3])
TRUTH = np.arange(float(N)) - 2
STEP_SIZE = 0.1

# The first call is often made with a batch of rows that nobody names.
pytestmark = pytest.mark.filterwarnings(
    "ignore::numpyro_dynamic_subsample.MisalignedSubsampleWarning",
    # The density is compared, whatever the scale.
    "ignore::numpyro_dynamic_subsample.UnscaledSubsampleWarning",
)


@pytest.fixture(autouse=True, scope="module")
def in_64_bit():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def model(x):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 2))
        s = numpyro.sample("s", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Normal(z, s), obs=x)


def two_parts(model):
    return guide_list(model, {"mu s": AutoNormal, "z": AutoDelta}, hide=["y"])


def by_hand(model):
    def guide(x):
        loc = numpyro.param("mu_loc", 0.3)
        numpyro.sample("mu", dist.Normal(loc, 0.5))
        with numpyro.plate("n", N, subsample_size=2):
            z_loc = numpyro.param("z_loc", jnp.arange(0.0, N), event_dim=0)
            # Amortised: of the padded rows it sees what is in their place.
            numpyro.sample("z", dist.Normal(z_loc, 0.3))
            numpyro.sample("s", dist.LogNormal(0.1 * z_loc, 0.2))

    return guide


class Cubic(Transform):
    """A flow that cannot be inverted, so that its density needs intermediates."""

    domain = codomain = constraints.real

    def __call__(self, x):
        return x + x**3

    def call_with_intermediates(self, x):
        return self(x), [x]

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        (x,) = intermediates
        return jnp.log1p(3 * x**2)

    def tree_flatten(self):
        return (), ((), {})


def flow(model):
    def guide(x):
        numpyro.sample("mu", dist.Normal(numpyro.param("mu_loc", 0.3), 0.5))
        with numpyro.plate("n", N, subsample_size=2):
            loc = numpyro.param("z_loc", jnp.arange(0.0, N), event_dim=0)
            base = dist.Normal(loc / N, 0.3)
            numpyro.sample("z", dist.TransformedDistribution(base, Cubic()))
            numpyro.sample("s", dist.LogNormal(0.1 * loc, 0.2))

    return guide


def padded(rows, capacity=CAPACITY, padding=np.nan):
    """A batch with garbage, and rows that it does not hold, in its padding."""
    others = np.setdiff1d(np.arange(N), rows)
    x = np.append(TRUTH[rows], np.full(capacity - len(rows), padding))
    return x, np.append(rows, np.resize(others, capacity - len(rows)))


class Pair:
    """Compiled steps of one inference, without padding and with it."""

    def __init__(self, model, guide, loss, first=TRUTH[:4]):
        self.svi = SubsampleSVI(model, guide, optax.sgd(STEP_SIZE), loss)
        self.step = jax.jit(self.svi.update)
        self.state = self.svi.init(jax.random.key(1), first)

    def check(self, rows):
        theirs = self.step(self.state, TRUTH[rows], indices={"n": rows})
        x, indices = padded(rows)
        count = {"n": len(rows)}
        ours = self.step(self.state, x, indices={"n": indices}, valid=count)
        assert_close(ours, theirs)
        before, after = (self.svi.get_params(s) for s in (self.state, ours[0]))
        moved = jax.tree.map(lambda a, b: a != b, before, after)
        for name, of_row in moved.items():
            assert of_row.any()
            if of_row.shape == (N,):
                assert set(np.flatnonzero(of_row)) <= set(rows), name


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoDelta": AutoDelta,
    "AutoGuideList": two_parts,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "by hand": by_hand,
    "flow": flow,
}
OBJECTIVES = {
    "trace": Trace_ELBO,
    "graph": TraceGraph_ELBO,
    "enum": TraceEnum_ELBO,
}
COMBINATIONS = [
    *[(guide, "trace") for guide in GUIDES],
    ("AutoNormal", "graph"),
    ("AutoNormal", "enum"),
    ("AutoDelta", "enum"),
]


@pytest.mark.parametrize(("guide", "objective"), COMBINATIONS)
def test_step_equals_that_without_padding(guide, objective):
    # A joint guide needs all rows once.
    first = TRUTH if guide == "AutoMultivariateNormal" else TRUTH[:4]
    Pair(model, GUIDES[guide](model), OBJECTIVES[objective](), first).check(ROWS)


@pytest.fixture(scope="module")
def pair():
    return Pair(model, AutoNormal(model), TraceMeanField_ELBO(num_particles=2))


@settings(max_examples=20)
@given(order=st.permutations(range(N)), count=st.integers(1, CAPACITY))
def test_drawn_rows_and_counts(pair, order, count):
    pair.check(np.array(order[:count]))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_sites_apart(loss):
    svi = SubsampleSVI(model, AutoNormal(model), optax.sgd(0.1), loss(sum_sites=False))
    state = svi.init(jax.random.key(1), TRUTH)
    x, rows = padded(ROWS)
    evaluate = jax.jit(svi.evaluate)
    ours = evaluate(state, x, indices={"n": rows}, valid={"n": len(ROWS)})
    theirs = evaluate(state, TRUTH[ROWS], indices={"n": ROWS})
    assert ours.keys() == {"mu", "z", "s", "y"}
    assert_close(ours, theirs)


STUDENTS, LECTURERS = 7, 5


def ratings(student, lecturer, y):
    """Ragged: each student of the batch gives some ratings."""
    sd = numpyro.sample("sd", dist.HalfNormal(1))
    with numpyro.plate("lecturers", LECTURERS):
        d = numpyro.sample("d", dist.Normal(0, sd))
    students = numpyro.plate("students", STUDENTS, subsample_size=len(y))
    with students:
        s = numpyro.sample("s", dist.Normal(0, sd))
    # Scaled by hand: this plate is the batch itself.
    with numpyro.plate("ratings", len(student)):
        numpyro.sample("rated", dist.Normal(s[student] + d[lecturer], 1), obs=lecturer)
    with students:
        numpyro.sample("y", dist.Normal(s, 1), obs=y)


def table(y):
    """Nested, each plate with latents of its own."""
    with numpyro.plate("rows", STUDENTS, subsample_size=y.shape[0], dim=-2):
        z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("columns", y.shape[1]):
            numpyro.sample("y", dist.Normal(z, 1), obs=y)
    with numpyro.plate("columns", y.shape[1]):
        numpyro.sample("x", dist.Normal(0, 2), obs=y[0])


def ratings_batches():
    rng = np.random.default_rng(0)
    rows, lecturer, y = (
        np.array([4, 2, 6]),
        rng.integers(0, LECTURERS, 5),
        rng.normal(size=3),
    )
    args = np.array([0, 0, 1, 2, 2]), lecturer, y
    padded = minibatch(
        *args,
        rows={"students": rows},
        along={"ratings": (0, 1)},
        capacity="powers of two",
    )
    return (args, {"students": rows}), (padded.args, padded.pinned), padded.valid


def table_batches():
    y = np.random.default_rng(0).normal(size=(3, 2))
    rows = np.array([4, 2, 6])
    full = np.full((5, 4), np.nan)
    full[:3, :2] = y
    indices, valid = {"rows": np.append(rows, [0, 1])}, {"rows": 3, "columns": 2}
    return ((y,), {"rows": rows}), ((full,), indices), valid


PLATES = {
    "crossed": (ratings, AutoDelta, ratings_batches),
    "nested": (table, AutoDelta, table_batches),
}


@pytest.mark.parametrize(("model", "guide", "batches"), PLATES.values(), ids=PLATES)
def test_plates_with_counts_of_their_own(model, guide, batches):
    (args, indices), (padded_args, padded_indices), valid = batches()
    svi = SubsampleSVI(model, guide(model), optax.sgd(0.1), TraceMeanField_ELBO())
    state = svi.init(jax.random.key(1), *args, indices=indices)
    theirs = jax.jit(svi.update)(state, *args, indices=indices)
    step = jax.jit(svi.update)
    ours = step(state, *padded_args, indices=padded_indices, valid=valid)
    assert_close(ours, theirs)
    uncounted = step(state, *padded_args, indices=padded_indices)[1]
    assert not np.allclose(uncounted, theirs[1])


def mixture(x, where="guide", size=None):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(2)))
    infer = {"enumerate": "parallel"} if where == "model" else {}
    with numpyro.plate("n", size or len(x), subsample_size=size and len(x)):
        c = numpyro.sample("c", dist.Categorical(weights), infer=infer)
        numpyro.sample("y", dist.Normal(jnp.array([-1.0, 2.0])[c], 1), obs=x)


def mixture_guide(x, where="guide", size=None):
    alpha = numpyro.param("alpha", jnp.ones(2), constraint=constraints.positive)
    numpyro.sample("weights", dist.Delta(alpha / alpha.sum(), event_dim=1))
    if where == "guide":
        with numpyro.plate("n", size or len(x), subsample_size=size and len(x)):
            logits = numpyro.param("logits", jnp.array([0.1, 0.3]))
            infer = {"enumerate": "parallel"}
            numpyro.sample("c", dist.Categorical(logits=logits), infer=infer)


DISCRETE = {
    "enumerated in the guide": (TraceEnum_ELBO, "guide", None, True),
    "enumerated in the guide, subsampled": (TraceEnum_ELBO, "guide", N, True),
    "enumerated in the model": (TraceEnum_ELBO, "model", None, True),
    "enumerated in the model, count known": (TraceEnum_ELBO, "model", N, False),
    "score function": (TraceGraph_ELBO, "guide", N, True),
}


@pytest.mark.filterwarnings("ignore:TraceGraph_ELBO applies the scale:UserWarning")
@pytest.mark.parametrize(
    ("loss", "where", "size", "traced"), DISCRETE.values(), ids=DISCRETE
)
def test_discrete_sites(loss, where, size, traced):
    svi = SubsampleSVI(
        mixture, mixture_guide, optax.sgd(0.1), loss(), where=where, size=size
    )
    x, rows = padded(ROWS)
    full, part = ({"n": rows}, {"n": ROWS}) if size else (None, None)
    state = svi.init(jax.random.key(1), x, indices=full)
    count = {"n": len(ROWS)}
    step = jax.jit(svi.update)
    theirs = step(state, TRUTH[ROWS], indices=part)
    if traced:
        ours = step(state, x, indices=full, valid=count)
    else:
        ours = jax.jit(lambda s: svi.update(s, x, indices=full, valid=count))(state)
    assert_close(ours, theirs)


def test_without_keywords_it_is_svi():
    """Bit for bit, with a plate that draws its rows."""
    model = CASES["one latent"].model

    def every_way(cls):
        guide = dynamic_subsample(AutoNormal(model))
        svi = cls(model, guide, optax.sgd(0.1), Trace_ELBO())
        state = svi.init(jax.random.key(1), 3)

        @jax.jit
        def steps(state):
            updates = (svi.update, svi.stable_update, svi.evaluate)
            return [update(state, 5) for update in updates]

        return state, steps(state)

    assert_equal(every_way(SubsampleSVI), every_way(SVI))


def test_every_way_to_step():
    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    # NumPyro looks for initial values where the model runs on padding as on data.
    x, rows = padded(ROWS, padding=1.0)
    batch = {"indices": {"n": rows}, "valid": {"n": len(ROWS)}}
    start = svi.init(jax.random.key(1), x, **batch)
    state, losses = start, []
    update = jax.jit(svi.update)
    for _ in range(2):
        state, loss = update(state, TRUTH[ROWS], indices={"n": ROWS})
        losses.append(loss)
    assert_close(jax.jit(svi.evaluate)(start, x, **batch), losses[0])
    assert_close(jax.jit(svi.stable_update)(start, x, **batch)[1], losses[0])
    for bar in (True, False):
        run = svi.run(jax.random.key(1), 2, x, progress_bar=bar, **batch)
        assert_close((run.losses, run.state), (jnp.stack(losses), state))
    again = svi.run(
        None, 2, x, init_state=start, stable_update=True, progress_bar=False, **batch
    )
    assert_close((again.losses, again.state), (jnp.stack(losses), state))


def test_rows_drawn_once_for_guide_and_model():
    """Also under the objective whose replay leaves plates out."""

    def indexing():
        with numpyro.plate("n", N, subsample_size=3) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(TRUTH)[idx])

    svi = SubsampleSVI(indexing, AutoDelta(indexing), optax.sgd(0.1), TraceEnum_ELBO())
    state = svi.init(jax.random.key(1))
    before = svi.get_params(state)["z_auto_loc"]
    after = svi.get_params(jax.jit(svi.update)(state)[0])["z_auto_loc"]
    gradient = N / 3 * (2 * before - TRUTH)
    expected = np.where(after == before, before, before - 0.1 * gradient)
    assert (after != before).sum() == 3
    assert_close(after, expected)


def counted(model):
    """The model, and the shapes that it is run with while JAX traces."""
    shapes = []

    def counting(x):
        shapes.append(x.shape)
        model(x)

    return counting, shapes


def test_compilations_for_fifty_sizes():
    size = 60

    def observed(x):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("n", size, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(mu, 1), obs=x)

    svi = SubsampleSVI(observed, AutoDelta(observed), optax.sgd(1e-3), Trace_ELBO())
    rng = np.random.default_rng(0)
    start = svi.init(jax.random.key(0), np.zeros(4))
    mu = float(svi.get_params(start)["mu_auto_loc"])
    for capacity, most in ((50, 1), ("powers of two", 7)):
        traced = []

        @jax.jit
        def loss(state, batch, traced=traced):
            traced.append(batch.args[0].shape)
            return svi.evaluate(state, batch)

        for count in range(1, 51):
            x = rng.normal(size=count)
            rows = {"n": np.arange(count)}
            batch = minibatch(x, rows=rows, capacity=capacity, size=size)
            prior = norm.logpdf(mu)
            likelihood = size / count * norm.logpdf(x, mu).sum()
            assert_close(loss(start, batch), -(prior + likelihood))
        assert len(traced) == most


def test_growing_batch_in_one_scan():
    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    rows = np.array([6, 1, 7, 2, 0, 4])
    start = svi.init(jax.random.key(0), TRUTH)
    counts = np.array([1, 2, 4, 6])

    @jax.jit
    def train(state, counts):
        def step(state, n):
            x = jnp.asarray(TRUTH)[rows]
            return svi.update(
                state, x, indices={"n": jnp.asarray(rows)}, valid={"n": n}
            )

        return jax.lax.scan(step, state, counts)

    state, losses = start, []
    update = jax.jit(svi.update)
    for n in counts:
        state, loss = update(state, TRUTH[rows[:n]], indices={"n": rows[:n]})
        losses.append(loss)
    assert_close(train(start, counts), (state, jnp.stack(losses)))


def test_loop_of_the_docstring():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 7, size=600)
    rows_of_batches = [rng.permutation(N)[:size] for size in sizes]
    optim = optax.adam(optax.exponential_decay(0.3, 600, 1e-2))

    def normal(x):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 10))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    normal, shapes = counted(normal)
    svi = SubsampleSVI(normal, AutoDelta(normal), optim, Trace_ELBO())
    rows = rows_of_batches[0]
    state = svi.init(jax.random.key(0), TRUTH[rows], indices={"n": rows})
    step = jax.jit(svi.update, donate_argnums=0)
    shapes.clear()
    with warnings.catch_warnings():
        # Whether a backend makes use of donated memory is up to it.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        for rows in rows_of_batches:
            batch = minibatch(TRUTH[rows], rows={"n": rows}, capacity=6)
            state, _ = step(state, batch)
    assert set(shapes) == {(6,)}
    z = svi.get_params(state)["z_auto_loc"]
    np.testing.assert_allclose(z, TRUTH / 1.01, atol=0.05)


@pytest.mark.parametrize("size", [CAPACITY, N])
@pytest.mark.parametrize("asked", [False, True])
def test_capacity_of_the_whole_plate(asked, size):
    """Indexed data follow the batch's rows, and the scale is N / n if asked for."""

    def indexing(length):
        with numpyro.plate("n", size, subsample_size=length if asked else None) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(TRUTH)[idx])

    svi = SubsampleSVI(indexing, AutoDelta(indexing), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), size)
    rows = np.append([4, 2], np.zeros(size - 2, int))
    step = jax.jit(svi.update, static_argnums=1)
    before = svi.get_params(state)["z_auto_loc"]
    after, _ = step(state, size, indices={"n": rows}, valid={"n": 2})
    scale = size / 2 if asked else 1
    gradient = scale * (2 * before - TRUTH[:size])
    expected = before.at[np.array([4, 2])].add(-0.1 * gradient[np.array([4, 2])])
    assert_close(svi.get_params(after)["z_auto_loc"], expected)


def pinning(x):
    with plate_of(jnp.arange(len(x))):
        numpyro.sample("z", dist.Normal(0, 1))


def whole(x):
    with numpyro.plate("n", N):
        numpyro.sample("z", dist.Normal(0, 1))


def subsampling(x):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        data = numpyro.subsample(jnp.asarray(TRUTH), event_dim=0)
        numpyro.sample("y", dist.Normal(z, 1), obs=data)


X4, R4 = np.zeros(4), np.arange(4)
REFUSED = {
    "indices of no plate": (
        independent,
        X4,
        {"k": R4},
        None,
        r"indices names.*'k'.*\['n'\]",
    ),
    "count of no plate": (
        independent,
        X4,
        None,
        {"k": 2},
        r"valid names.*'k'.*\['n'\]",
    ),
    "count above": (independent, X4, None, {"n": 5}, r"'n' is 5, .*between 1 and 4"),
    "count below": (
        independent,
        X4,
        {"n": R4},
        {"n": 0},
        r"'n' is 0, .*between 1 and 4",
    ),
    "count is a float": (
        independent,
        X4,
        None,
        {"n": 2.0},
        "'n' must be an integer scalar",
    ),
    "longer": (independent, X4, {"n": np.arange(5)}, None, r"5 rows.*'n'.*takes 4"),
    "shorter": (independent, X4, {"n": np.arange(3)}, None, r"3 rows.*'n'.*takes 4"),
    "shorter, no subsample": (whole, X4, {"n": R4}, None, r"4 rows.*'n'.*takes 8"),
    "out of range": (independent, X4, {"n": [0, 1, 2, 8]}, None, r"run from 0 to 8"),
    "negative": (independent, X4, {"n": [0, 1, 2, -1]}, None, r"run from -1 to 2"),
    "float": (independent, X4, {"n": R4 * 1.0}, None, r"vector of integers.*float"),
    "table": (
        independent,
        X4,
        {"n": R4[:, None]},
        None,
        r"vector of integers.*\(4, 1\)",
    ),
    "model pins": (pinning, X4, {"n": R4}, None, r"model pins the rows of plate 'n'"),
}


@pytest.mark.parametrize(
    ("model", "x", "indices", "valid", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_is_refused(model, x, indices, valid, message):
    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), x)
    for step in (svi.update, svi.stable_update, svi.evaluate):
        with pytest.raises(ValueError, match=message):
            step(state, x, indices=indices, valid=valid)
    with pytest.raises(ValueError, match=message):
        svi.init(jax.random.key(0), x, indices=indices, valid=valid)


def test_permutation_of_all_rows_without_a_count():
    """What is refused with padding is none of its business without."""
    svi = SubsampleSVI(
        subsampling, AutoDelta(subsampling), optax.sgd(0.1), Trace_ELBO()
    )
    state = svi.init(jax.random.key(0), np.zeros(N))
    plain = svi.evaluate(state, np.zeros(N))
    reverse = {"n": np.arange(N)[::-1]}
    assert_close(svi.evaluate(state, np.zeros(N), indices=reverse), plain)


def test_renyi():
    svi = SubsampleSVI(
        independent, AutoNormal(independent), optax.sgd(0.1), RenyiELBO()
    )
    state = svi.init(jax.random.key(0), X4, indices={"n": R4})
    assert np.isfinite(jax.jit(svi.evaluate)(state, X4, indices={"n": R4}))
    with pytest.raises(ValueError, match=r"RenyiELBO.*\['n'\].*without padding"):
        svi.update(state, X4, indices={"n": R4}, valid={"n": 3})


def of_all(x):
    return numpyro.sample("mu", dist.Normal(0, 1)), x


def of_row(given):
    mu, x = given
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def of_all_and_row(x):
    of_row(of_all(x))


def semi_dais(**kwargs):
    # More HMC steps draw their momenta in another order, by step and not by row.
    guide = AutoSemiDAIS(of_all_and_row, of_row, AutoNormal(of_all), K=1, **kwargs)
    return SubsampleSVI(of_all_and_row, guide, optax.sgd(0.1), Trace_ELBO())


def test_auto_semi_dais():
    svi = semi_dais()
    state = svi.init(jax.random.key(0), X4)
    step = jax.jit(svi.update)
    x, rows = padded(ROWS, padding=-3.0)
    ours = step(state, x, indices={"n": rows}, valid={"n": len(ROWS)})
    assert_close(ours, step(state, TRUTH[ROWS], indices={"n": ROWS}))


def test_auto_semi_dais_with_a_local_guide():
    def local_guide(given):
        with numpyro.plate("n", N, subsample_size=len(given[1])):
            loc = numpyro.param("loc", jnp.zeros(N), event_dim=0)
            numpyro.sample("z", dist.Normal(loc, 1))

    svi = semi_dais(local_guide=local_guide)
    message = r"AutoSemiDAIS with a local_guide.*\['n'\].*Use another guide"
    with pytest.raises(ValueError, match=message):
        svi.init(jax.random.key(0), X4, valid={"n": 3})


def analytic(x):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1), infer={"kl": "analytic"})
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def analytic_guide(x):
    with numpyro.plate("n", N, subsample_size=len(x)):
        loc = numpyro.param("loc", jnp.ones(N), event_dim=0)
        numpyro.sample("z", dist.Normal(loc, 1), infer={"kl": "analytic"})


def test_enumeration_that_needs_a_known_scale():
    svi = SubsampleSVI(
        mixture, mixture_guide, optax.sgd(0.1), TraceEnum_ELBO(), where="model", size=N
    )
    state = svi.init(jax.random.key(0), X4)
    message = r"'c' in plate 'n' \(4 rows\) is enumerated in the model.*in the guide"
    with pytest.raises(ValueError, match=message):
        jax.jit(svi.update)(state, X4, valid={"n": 3})


def test_analytic_kl_needs_a_known_scale():
    svi = SubsampleSVI(analytic, analytic_guide, optax.sgd(0.1), TraceEnum_ELBO())
    state = svi.init(jax.random.key(0), X4)
    message = r"'z' in plate 'n' \(4 rows\) has an analytic KL.*leave out infer"
    with pytest.raises(ValueError, match=message):
        jax.jit(svi.update)(state, X4, valid={"n": 3})
    x, rows = padded(ROWS)
    # Eager, so that the count is known.
    ours = svi.evaluate(state, x, indices={"n": rows}, valid={"n": 3})
    assert_close(ours, svi.evaluate(state, TRUTH[ROWS], indices={"n": ROWS}))
    svi.loss = Trace_ELBO()
    jax.jit(svi.update)(state, X4, valid={"n": 3})
