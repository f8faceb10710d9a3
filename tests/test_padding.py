"""Only the valid rows of a padded batch count: in the handler, and in steps."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.infer import (
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
from numpyro.infer.util import log_density

from checks import assert_close, pad, told
from models import N, guide_list, independent, svi_of
from numpyro_dynamic_subsample import dynamic_subsample
from numpyro_dynamic_subsample.batches.padding import mask_padding


@contextmanager
def counting(counts):
    """As a step does: a context tells which rows are pinned."""
    with mask_padding(counts), dynamic_subsample():
        yield


Y = jnp.asarray(np.random.default_rng(0).normal(size=(N, 3)))


def nested(y, size=N, subsample_size=None, name="n"):
    with numpyro.plate(name, size, subsample_size=subsample_size, dim=-2):
        z = numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("m", y.shape[1]):
            numpyro.sample("y", dist.Normal(z, 2), obs=y)


def density(y, counts=None, **kwargs):
    with counting(counts or {}):
        z = {"z": jnp.linspace(-1, 1, y.shape[0])[:, None]}
        return log_density(nested, (y,), kwargs, z)[0]


def unpadded(n, m, size=N, subsample_size=None):
    z = jnp.linspace(-1, 1, N)[:n, None]
    prior = dist.Normal(0, 1).log_prob(z).sum()
    likelihood = dist.Normal(z, 2).log_prob(Y[:n, :m]).sum()
    return (size / n if subsample_size else 1.0) * (prior + likelihood)


@pytest.mark.parametrize("subsample_size", [None, N])
@pytest.mark.parametrize("jit", [False, True])
def test_density_of_nested_plates(subsample_size, jit):
    """A plate that takes all rows has a scale only if it was asked for a subsample."""

    def padded(counts):
        y = Y.at[5:].set(jnp.nan).at[:, 2:].set(jnp.nan)
        return density(y, counts, subsample_size=subsample_size)

    value = (jax.jit(padded) if jit else padded)({"n": 5, "m": 2})
    np.testing.assert_allclose(value, unpadded(5, 2, N, subsample_size), rtol=1e-6)


def test_plates_that_are_not_named_are_untouched():
    value = density(Y, {"m": np.int32(2)})
    np.testing.assert_allclose(value, unpadded(N, 2), rtol=1e-6)
    assert (
        density(Y)
        == log_density(nested, (Y,), {}, {"z": jnp.linspace(-1, 1, N)[:, None]})[0]
    )


def test_scale_keeps_the_type_of_the_log_density():
    def scale(n):
        with counting({"n": n}), handlers.seed(rng_seed=0), handlers.trace() as trace:
            with numpyro.plate("n", 16, subsample_size=N):
                numpyro.sample("z", dist.Normal(jnp.float16(0), jnp.float16(1)))
        site = trace["z"]
        return site["scale"] * site["fn"].log_prob(site["value"].astype("float16"))

    assert jax.jit(scale)(np.int32(3)).dtype == "float16"
    assert scale(3).dtype == "float16"


def test_masks_of_the_model_still_hold():
    given = jnp.arange(N) % 2 == 0

    def masked():
        with numpyro.plate("n", N):
            numpyro.sample("y", dist.Normal(0, 1).mask(given), obs=Y[:, 0])

    with counting({"n": 5}):
        value = log_density(masked, (), {}, {})[0]
    expected = dist.Normal(0, 1).log_prob(Y[jnp.array([0, 2, 4]), 0]).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_events_factors_and_observations_without_an_axis():
    def several(x, size):
        with numpyro.plate("n", size):
            numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1), obs=x)
            numpyro.factor("f", x.sum(1))
            numpyro.sample("one", dist.Normal(0, 1), obs=0.5)

    with counting({"n": 5}):
        value = log_density(several, (Y.at[5:].set(jnp.nan), N), {}, {})[0]
    expected = log_density(several, (Y[:5], 5), {}, {})[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("padding", [np.nan, 0.0, -1.0])
def test_gradient_of_observations_outside_of_their_support(padding):
    """Also where the observed value goes on into the model."""

    def grad(y, size):
        def loss(shape):
            def positive():
                with numpyro.plate("n", size):
                    first = numpyro.sample("a", dist.Gamma(shape, 1.0), obs=y)
                    numpyro.sample("b", dist.Gamma(shape * jnp.log(first) ** 2), obs=y)

            return log_density(positive, (), {}, {})[0]

        return jax.grad(loss)(1.5)

    y = jnp.exp(Y[:, 0])
    with counting({"n": 5}):
        value = grad(y.at[5:].set(padding), N)
    np.testing.assert_allclose(value, grad(y[:5], 5), rtol=1e-5)


def test_scan():
    """Plates that are made outside of a scan and entered inside."""

    def series(y, size):
        plate = numpyro.plate("n", size)

        def step(loc, y):
            with plate:
                numpyro.sample("y", dist.Normal(loc, 1), obs=y)
            return loc + 1, None

        scan(step, 0.0, y)

    with counting({"n": 5}):
        value = log_density(series, (Y.T.at[:, 5:].set(jnp.nan), N), {}, {})[0]
    expected = log_density(series, (Y.T[:, :5], 5), {}, {})[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def made_in_scan():
    def step(carry, y):
        with numpyro.plate("n", N):
            numpyro.sample("y", dist.Normal(0, 1), obs=y)
        return carry, None

    scan(step, 0.0, Y.T)


def flat():
    with numpyro.plate("n", N):
        numpyro.sample("z", dist.Normal(0, 1))


COUNTS = {
    "zero": ({"n": 0}, r"plate 'n' is 0, but must be between 1 and 8.*Skip"),
    "negative": ({"n": np.int32(-1)}, "is -1"),
    "above": ({"n": jnp.array(9)}, r"is 9, .*larger capacity"),
    "float": ({"n": 3.0}, r"plate 'n' must be an integer scalar.*type float"),
    "bool": ({"n": True}, "integer scalar.*type bool"),
    "vector": ({"n": np.array([3])}, r"integer scalar.*shape \(1,\)"),
    "unknown": ({"n": 3, "k": 3}, r"names a plate 'k'.*does not have.*\['n'\]"),
}


@pytest.mark.parametrize(("counts", "message"), COUNTS.values(), ids=COUNTS)
def test_counts_that_are_refused(counts, message):
    with pytest.raises(ValueError, match=message), counting(counts):
        handlers.seed(flat, 0)()


def test_plate_that_cannot_be_seen():
    with pytest.raises(ValueError, match="'n' .8 rows. is made where.*body of a scan"):
        with counting({"n": 3}), handlers.seed(rng_seed=0):
            made_in_scan()


@pytest.mark.parametrize("inside", ["model", "guide"])
def test_site_outside_of_the_plate_on_one_side(inside):
    def outside():
        numpyro.plate("n", N)
        numpyro.sample("z", dist.Normal(0, 1).expand([N]))

    pair = (flat, outside) if inside == "model" else (outside, flat)
    message = rf"'z' stands in plate 'n' .*count 3.* in the {inside}, but outside"
    with pytest.raises(ValueError, match=message), counting({"n": 3}):
        Trace_ELBO().loss(jax.random.key(0), {}, *pair)


# The first call is often made with a batch of rows that nobody names.
pytestmark = pytest.mark.filterwarnings(
    "ignore::numpyro_dynamic_subsample.MisalignedSubsampleWarning",
    # The density is compared, whatever the scale.
    "ignore::numpyro_dynamic_subsample.UnscaledSubsampleWarning",
)


CAPACITY = 6


ROWS = np.array([5, 0, 3])


TRUTH = np.arange(float(N)) - 2


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
        self.svi = svi_of(model, guide, "SubsampleSVI", loss)
        self.step = jax.jit(self.svi.update)
        self.state = self.svi.init(jax.random.key(1), first)

    def check(self, rows):
        theirs = self.step(self.state, told(TRUTH[rows], rows={"n": rows}))
        x, indices = padded(rows)
        count = {"n": len(rows)}
        ours = self.step(self.state, told(x, rows={"n": indices}, counts=count))
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


OBJECTIVES = {"trace": Trace_ELBO, "graph": TraceGraph_ELBO, "enum": TraceEnum_ELBO}


COMBINATIONS = [
    *[(guide, "trace") for guide in GUIDES if guide != "AutoNormal"],
    ("AutoNormal", "graph"),
    ("AutoNormal", "enum"),
]


@pytest.mark.parametrize(("guide", "objective"), COMBINATIONS)
def test_step_equals_that_without_padding(guide, objective):
    # A joint guide needs all rows once.
    first = TRUTH if guide == "AutoMultivariateNormal" else TRUTH[:4]
    Pair(model, GUIDES[guide](model), OBJECTIVES[objective](), first).check(ROWS)


@pytest.fixture(scope="module")
def pair():
    return Pair(model, AutoNormal(model), TraceMeanField_ELBO(num_particles=2))


@settings(max_examples=10)
@given(order=st.permutations(range(N)), count=st.sampled_from([1, 3, CAPACITY]))
def test_drawn_rows_and_counts(pair, order, count):
    pair.check(np.array(order[:count]))


def test_sites_apart():
    svi = svi_of(model, form="SubsampleSVI", loss=TraceMeanField_ELBO(sum_sites=False))
    state = svi.init(jax.random.key(1), TRUTH)
    x, rows = padded(ROWS)
    evaluate = jax.jit(svi.evaluate)
    ours = evaluate(state, told(x, rows={"n": rows}, counts={"n": len(ROWS)}))
    theirs = evaluate(state, told(TRUTH[ROWS], rows={"n": ROWS}))
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
    flat = np.array([0, 0, 1, 2, 2]), lecturer
    (student, lecturer), m = pad(flat, 8)
    (y_padded, rows_padded), n = pad((y, rows), 4)
    indices, valid = {"students": rows_padded}, {"students": n, "ratings": m}
    return (
        ((*flat, y), {"students": rows}),
        ((student, lecturer, y_padded), indices),
        valid,
    )


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
    svi = svi_of(model, guide, "SubsampleSVI", TraceMeanField_ELBO())
    state = svi.init(jax.random.key(1), told(*args, rows=indices))
    theirs = jax.jit(svi.update)(state, told(*args, rows=indices))
    step = jax.jit(svi.update)
    ours = step(state, told(*padded_args, rows=padded_indices, counts=valid))
    assert_close(ours, theirs)
    uncounted = step(state, told(*padded_args, rows=padded_indices))[1]
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
    svi = svi_of(mixture, mixture_guide, "SubsampleSVI", loss(), where=where, size=size)
    x, rows = padded(ROWS)
    full, part = ({"n": rows}, {"n": ROWS}) if size else (None, None)
    state = svi.init(jax.random.key(1), told(x, rows=full))
    count = {"n": len(ROWS)}
    step = jax.jit(svi.update)
    theirs = step(state, told(TRUTH[ROWS], rows=part))
    if traced:
        ours = step(state, told(x, rows=full, counts=count))
    else:
        ours = jax.jit(lambda s: svi.update(s, told(x, rows=full, counts=count)))(state)
    assert_close(ours, theirs)


def test_growing_batch_in_one_scan():
    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    rows = np.array([6, 1, 7, 2, 0, 4])
    start = svi.init(jax.random.key(0), TRUTH)
    counts = np.array([1, 2, 4, 6])

    @jax.jit
    def train(state, counts):
        def step(state, n):
            x = jnp.asarray(TRUTH)[rows]
            return svi.update(
                state, told(x, rows={"n": jnp.asarray(rows)}, counts={"n": n})
            )

        return jax.lax.scan(step, state, counts)

    state, losses = start, []
    update = jax.jit(svi.update)
    for n in counts:
        state, loss = update(state, told(TRUTH[rows[:n]], rows={"n": rows[:n]}))
        losses.append(loss)
    assert_close(train(start, counts), (state, jnp.stack(losses)))


@pytest.mark.parametrize(("size", "asked"), [(CAPACITY, False), (N, True)])
def test_capacity_of_the_whole_plate(asked, size):
    """Indexed data follow the batch's rows, and the scale is N / n if asked for."""

    def indexing(length):
        with numpyro.plate("n", size, subsample_size=length if asked else None) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(TRUTH)[idx])

    svi = svi_of(indexing, AutoDelta, "SubsampleSVI")
    state = svi.init(jax.random.key(0), size)
    rows = np.append([4, 2], np.zeros(size - 2, int))
    before = svi.get_params(state)["z_auto_loc"]
    step = jax.jit(
        lambda state, rows, count: svi.update(
            state, told(size, rows={"n": rows}, counts={"n": count})
        )
    )
    after, _ = step(state, rows, 2)
    # Rows that are pinned are a subsample, whether the model asks for a size or not.
    scale = size / 2
    gradient = scale * (2 * before - TRUTH[:size])
    expected = before.at[np.array([4, 2])].add(-0.1 * gradient[np.array([4, 2])])
    assert_close(svi.get_params(after)["z_auto_loc"], expected)


X4 = np.zeros(4)


def test_renyi():
    svi = svi_of(independent, form="SubsampleSVI", loss=RenyiELBO())
    state = svi.init(jax.random.key(0), told(X4, rows={"n": np.arange(4)}))
    assert np.isfinite(jax.jit(svi.evaluate)(state, told(X4, rows={"n": np.arange(4)})))
    with pytest.raises(ValueError, match=r"RenyiELBO.*\['n'\].*without a capacity"):
        svi.update(state, told(X4, rows={"n": np.arange(4)}, counts={"n": 3}))


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
    return svi_of(of_all_and_row, guide, "SubsampleSVI")


def test_auto_semi_dais():
    svi = semi_dais()
    state = svi.init(jax.random.key(0), X4)
    step = jax.jit(svi.update)
    x, rows = padded(ROWS, padding=-3.0)
    ours = step(state, told(x, rows={"n": rows}, counts={"n": len(ROWS)}))
    assert_close(ours, step(state, told(TRUTH[ROWS], rows={"n": ROWS})))


def test_auto_semi_dais_with_a_local_guide():
    def local_guide(given):
        with numpyro.plate("n", N, subsample_size=len(given[1])):
            loc = numpyro.param("loc", jnp.zeros(N), event_dim=0)
            numpyro.sample("z", dist.Normal(loc, 1))

    svi = semi_dais(local_guide=local_guide)
    message = r"AutoSemiDAIS with a local_guide.*\['n'\].*Use another guide"
    with pytest.raises(ValueError, match=message):
        svi.init(jax.random.key(0), told(X4, counts={"n": 3}))


def analytic(x):
    with numpyro.plate("n", N, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1), infer={"kl": "analytic"})
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def analytic_guide(x):
    with numpyro.plate("n", N, subsample_size=len(x)):
        loc = numpyro.param("loc", jnp.ones(N), event_dim=0)
        numpyro.sample("z", dist.Normal(loc, 1), infer={"kl": "analytic"})


def test_enumeration_that_needs_a_known_scale():
    svi = svi_of(
        mixture, mixture_guide, "SubsampleSVI", TraceEnum_ELBO(), where="model", size=N
    )
    state = svi.init(jax.random.key(0), X4)
    message = r"'c' in plate 'n' \(4 rows\) is enumerated in the model.*in the guide"
    with pytest.raises(ValueError, match=message):
        jax.jit(svi.update)(state, told(X4, counts={"n": 3}))


def test_analytic_kl_needs_a_known_scale():
    svi = svi_of(analytic, analytic_guide, "SubsampleSVI", TraceEnum_ELBO())
    state = svi.init(jax.random.key(0), X4)
    message = r"'z' in plate 'n' \(4 rows\) has an analytic KL.*leave out infer"
    with pytest.raises(ValueError, match=message):
        jax.jit(svi.update)(state, told(X4, counts={"n": 3}))
    x, rows = padded(ROWS)
    # Eager, so that the count is known.
    ours = svi.evaluate(state, told(x, rows={"n": rows}, counts={"n": 3}))
    assert_close(ours, svi.evaluate(state, told(TRUTH[ROWS], rows={"n": ROWS})))
    svi.loss = Trace_ELBO()
    jax.jit(svi.update)(state, told(X4, counts={"n": 3}))


def test_every_way_to_step():
    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    # NumPyro looks for initial values where the model runs on padding as on data.
    x, rows = padded(ROWS, padding=1.0)
    batch = told(x, rows={"n": rows}, counts={"n": len(ROWS)})
    start = svi.init(jax.random.key(1), batch)
    state, losses = start, []
    update = jax.jit(svi.update)
    for _ in range(2):
        state, loss = update(state, told(TRUTH[ROWS], rows={"n": ROWS}))
        losses.append(loss)
    assert_close(jax.jit(svi.evaluate)(start, batch), losses[0])
    assert_close(jax.jit(svi.stable_update)(start, batch)[1], losses[0])
    for bar in (True, False):
        run = svi.run(jax.random.key(1), 2, batch, progress_bar=bar)
        assert_close((run.losses, run.state), (jnp.stack(losses), state))
    again = svi.run(
        None, 2, batch, init_state=start, stable_update=True, progress_bar=False
    )
    assert_close((again.losses, again.state), (jnp.stack(losses), state))
