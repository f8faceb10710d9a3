"""The posterior after training on batches, in every way that NumPyro asks for it."""

import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
)

from models import N, X, guide_list, hierarchy, one_latent, plate_of, svi_of
from numpyro_dynamic_subsample import dynamic_subsample

ROWS = jnp.array([5, 2, 6])


def indexing(rows, data=X):
    """Gives row i of `doubled` as twice the latent, plus the row's own datum."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with plate_of(rows) as idx:
        z = numpyro.sample("z", dist.LogNormal(mu, 1))
        numpyro.deterministic("doubled", 2 * z + X[idx])
        numpyro.sample("y", dist.Normal(z, 1), obs=None if data is None else data[idx])


def sliced(rows, data=None):
    data = X[rows] if data is None else data
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("twice", 2 * mu)
    with plate_of(rows):
        z = numpyro.sample("z", dist.LogNormal(mu, 1))
        numpyro.deterministic("doubled", 2 * z + data)
        numpyro.sample("y", dist.Normal(z, 1), obs=data)
    numpyro.deterministic("total", z.sum())


FIRST = {
    "batch": ROWS,
    "one": ROWS[:1],
    "four": jnp.arange(4),
    "all": jnp.arange(N),
    "reversed": jnp.arange(N)[::-1],
}


@cache
def trained(make, model, first, form="wrapper"):
    """A guide and its parameters. Tests share them: all only ask for answers."""
    guide = make(model)
    if form == "wrapper":
        guide = dynamic_subsample(guide)
    svi = SVI(model, guide, optax.sgd(1e-3), Trace_ELBO())
    with dynamic_subsample():
        state = svi.init(jax.random.key(0), FIRST[first])
        state, _ = jax.jit(svi.update)(state, ROWS)
    return guide, svi.get_params(state)


def every_answer(guide, params):
    key = jax.random.key(1)
    yield guide.sample_posterior(key, params), ()
    yield guide.sample_posterior(key, params, sample_shape=(3,)), (3,)
    yield guide.median(params), ()
    if not isinstance(guide, AutoDelta):
        yield guide.quantiles(params, [0.1, 0.5, 0.9]), (3,)


@pytest.mark.parametrize(
    ("guide_class", "first", "form"),
    [
        (AutoNormal, "batch", "wrapper"),
        (AutoNormal, "all", "context"),
        (AutoDelta, "batch", "context"),
        (AutoDelta, "all", "wrapper"),
        (AutoDiagonalNormal, "batch", "context"),
        (AutoMultivariateNormal, "batch", "wrapper"),
        (AutoMultivariateNormal, "all", "context"),
        (AutoLaplaceApproximation, "batch", "wrapper"),
    ],
)
def test_answers_are_for_all_rows(guide_class, first, form):
    """Deterministic sites too, where the model indexes its data."""
    guide, params = trained(guide_class, indexing, first, form)
    with dynamic_subsample(), warnings.catch_warnings():
        if guide_class is AutoDelta:  # runs the model without any arguments
            warnings.filterwarnings("ignore", "Left out the deterministic")
        for answer, shape in every_answer(guide, params):
            assert answer["z"].shape == (*shape, N)
            assert answer["mu"].shape == shape
            if guide_class is not AutoDelta:
                np.testing.assert_allclose(
                    answer["doubled"], 2 * answer["z"] + X, rtol=1e-5
                )


@pytest.mark.parametrize(
    ("guide_class", "first", "form"),
    [
        (AutoNormal, "batch", "wrapper"),
        (AutoNormal, "one", "wrapper"),
        (AutoDelta, "batch", "context"),
    ],
)
def test_only_deterministic_sites_that_need_no_rows_are_kept(guide_class, first, form):
    """One row would broadcast to all; its datum is not theirs."""
    guide, params = trained(guide_class, sliced, first, form)
    key, left_out = jax.random.key(0), r"\['doubled', 'total'\].*Pass the model's"
    with dynamic_subsample(), pytest.warns(UserWarning, match=left_out) as said:
        answer = guide.sample_posterior(key, params, sample_shape=(2, 3))
    assert len(said) == 1
    assert answer.keys() == {"mu", "z", "twice"}
    assert answer["z"].shape == (2, 3, N)
    np.testing.assert_allclose(answer["twice"], 2 * answer["mu"], rtol=1e-6)
    if guide_class is AutoNormal:
        with pytest.warns(UserWarning, match=left_out):
            assert guide.median(params).keys() == {"mu", "z", "twice"}


@pytest.mark.parametrize(
    ("guide_class", "model", "first"),
    [
        (AutoNormal, sliced, "batch"),
        (AutoDelta, indexing, "batch"),
        (AutoMultivariateNormal, sliced, "all"),
    ],
)
def test_given_arguments_decide(guide_class, model, first):
    guide, params = trained(guide_class, model, first)
    key, rows = jax.random.key(1), jnp.array([7, 0])
    for shape in [(), (2,)]:
        drawn = guide.sample_posterior(key, params, rows, sample_shape=shape)
        assert drawn["z"].shape == (*shape, N)
        expected = 2 * drawn["z"][..., rows] + X[rows]
        np.testing.assert_allclose(drawn["doubled"], expected, rtol=1e-5)


def two_parts(model):
    parts = {"mu": AutoNormal, "z": AutoNormal}
    return guide_list(model, parts, hide=["y", "twice", "doubled", "total"])


def test_parts_of_a_list_answer_for_all_rows():
    guide, params = trained(two_parts, sliced, "batch")
    for answer, shape in every_answer(guide, params):
        assert answer["z"].shape == (*shape, N)


def test_semi_dais_answers_for_the_rows_asked_for():
    def local(rows):
        with plate_of(rows) as idx:
            z = numpyro.sample("z", dist.LogNormal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    def semi_dais(model):
        return AutoSemiDAIS(model, model, subsample_plate="n", K=2)

    guide, params = trained(semi_dais, local, "four")
    for rows in (ROWS, jnp.arange(N)):
        drawn = guide.sample_posterior(
            jax.random.key(0), params, rows, sample_shape=(2,)
        )
        assert drawn["z"].shape == (2, len(rows))


@pytest.mark.parametrize(
    ("rows", "parallel"),
    [(ROWS, True), (jnp.arange(N), False), (ROWS[:1], False)],
    ids=["batch", "all", "one"],
)
@pytest.mark.parametrize("how", ["guide", "model and guide", "samples"])
def test_predictive_has_the_right_rows(how, rows, parallel):
    guide, params = trained(AutoDelta, indexing, "four")
    params = {**params, "z_auto_loc": 1.0 + jnp.arange(N)}
    options = {"params": params, "parallel": parallel}
    key = jax.random.key(0)
    if how == "guide":
        drawn = Predictive(guide, num_samples=2, **options)(key, rows)["z"]
        np.testing.assert_array_equal(drawn, jnp.broadcast_to(1 + rows, drawn.shape))
        return
    if how == "model and guide":
        predictive = Predictive(indexing, guide=guide, num_samples=2, **options)
    else:
        samples = Predictive(guide, num_samples=2, **options)(key, jnp.arange(N))
        samples = {name: samples[name] for name in ("mu", "z")}
        predictive = Predictive(indexing, samples, **options)
    with dynamic_subsample():
        doubled = predictive(key, rows, None)["doubled"]
    expected = jnp.broadcast_to(2 * (1 + rows) + X[rows], (2, len(rows)))
    np.testing.assert_allclose(doubled, expected, rtol=1e-5)


def everything(rows):
    """Latents with events, outside and inside of nested plates, and what follows."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("g", 2, dim=-2):
        with plate_of(rows) as idx:
            z = numpyro.sample("z", dist.LogNormal(mu, 1))
            p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
            numpyro.deterministic("doubled", 2 * z + X[idx])
            numpyro.sample("y", dist.Normal(z + p[..., 0], 1), obs=X[idx])


SOME = jnp.array([6, 0, 6])


@pytest.mark.parametrize(
    ("guide_class", "how"),
    [(AutoNormal, "wrapper"), (AutoDelta, "context"), (AutoDiagonalNormal, "wrapper")],
)
def test_some_rows(guide_class, how):
    first = "all" if guide_class is AutoDiagonalNormal else "batch"
    guide, params = trained(guide_class, everything, first, how)
    pins = handlers.substitute(data={"n": SOME})
    key = jax.random.key(1)
    with dynamic_subsample():
        whole = dynamic_subsample(guide).median(params)
    around = dynamic_subsample() if how == "context" else nullcontext()
    told = pytest.warns(UserWarning, match=r"\['doubled'\].*rows of plates")
    with around, pins, told:
        some = guide.median(params)
    assert "doubled" not in some
    for name, axis in (("z", -1), ("p", -2)):
        np.testing.assert_array_equal(some[name], jnp.take(whole[name], SOME, axis))
    assert some["mu"].shape == ()
    if guide_class is not AutoDelta:
        np.testing.assert_allclose(some["twice"], 2 * some["mu"], rtol=1e-6)
    with around, pins:
        drawn = guide.sample_posterior(key, params, SOME, sample_shape=(4,))
    assert drawn["z"].shape == drawn["doubled"].shape == (4, 2, 3)
    assert drawn["p"].shape == (4, 2, 3, 3)
    expected = 2 * drawn["z"] + X[SOME]
    np.testing.assert_allclose(drawn["doubled"], expected, rtol=1e-5)
    if guide_class is AutoDiagonalNormal:
        with dynamic_subsample():
            joint = dynamic_subsample(guide).sample_posterior(
                key, params, ROWS, sample_shape=(4,)
            )
        np.testing.assert_array_equal(drawn["z"], joint["z"][..., SOME])


@pytest.mark.parametrize(
    ("guide_class", "model", "form"),
    [
        (AutoNormal, indexing, "wrapper"),
        (AutoDelta, indexing, "context"),
        (AutoMultivariateNormal, sliced, "wrapper"),
    ],
)
@pytest.mark.parametrize("rows", [[3, 1, 5, 0, 4, 2, 7, 6], [2, 2, 0, 5, 3, 2, 7, 1]])
def test_all_rows_in_another_order(guide_class, model, form, rows):
    first = "all" if guide_class is AutoMultivariateNormal else "batch"
    guide, params = trained(guide_class, model, first, form)
    rows, key = jnp.array(rows), jax.random.key(1)
    with dynamic_subsample():
        drawn = guide.sample_posterior(key, params, rows)
        with handlers.substitute(data={"n": rows}):
            of_rows = guide.sample_posterior(key, params, rows)
    for z, doubled in (
        (drawn["z"][rows], drawn["doubled"]),
        (of_rows["z"], of_rows["doubled"]),
    ):
        np.testing.assert_allclose(doubled, 2 * z + X[rows], rtol=1e-5)


def test_some_rows_of_a_list():
    guide, params = trained(two_parts, sliced, "batch")
    with handlers.substitute(data={"n": SOME}):
        some = guide.quantiles(params, [0.1, 0.9])
    whole = guide.quantiles(params, [0.1, 0.9])
    np.testing.assert_array_equal(some["z"], whole["z"][:, SOME])
    np.testing.assert_array_equal(some["mu"], whole["mu"])
    beyond = handlers.substitute(data={"n": jnp.array([0, 8])})
    with beyond, pytest.raises(ValueError, match=r"'n' \(size 8\) run from 0 to 8"):
        guide.median(params)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
def test_draws_of_some_rows_need_memory_of_these():
    """A thousand draws of all rows would take 4 GB."""
    code = """
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.autoguide import AutoNormal
from numpyro_dynamic_subsample import dynamic_subsample

N = 1_000_000


def model(rows):
    with numpyro.plate("n", N, subsample_size=rows):
        numpyro.sample("z", dist.Normal(0, 1))


guide = dynamic_subsample(AutoNormal(model))
with handlers.seed(rng_seed=0), handlers.substitute(data={"n": jnp.arange(64)}):
    guide(64)
params = {"z_auto_loc": jnp.arange(float(N)), "z_auto_scale": jnp.ones(N)}


def peak():
    # That of this process alone, unlike `ru_maxrss`, which begins with its parent's.
    (line,) = (own for own in open("/proc/self/status") if own.startswith("VmHWM"))
    return int(line.split()[1])


before = peak()
rows = jnp.array([999_999, 5] * 32)
with handlers.substitute(data={"n": rows}):
    draws = guide.sample_posterior(jax.random.key(0), params, sample_shape=(1000,))["z"]
assert draws.shape == (1000, 64)
assert abs((draws - rows).mean(0)).max() < 0.3
print(peak() - before)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kib = int(done.stdout.split()[-1])
    assert kib < 200_000


def test_posterior_of_a_model_with_assertions():
    def model(x, rows):
        with plate_of(rows) as idx:
            assert len(idx) == len(x)
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.deterministic("gap", z - x)
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = svi_of(model)
    params = svi.get_params(svi.init(jax.random.key(0), X[:3], jnp.arange(3)))
    with pytest.warns(UserWarning, match=r"\['gap'\]"):
        assert svi.guide.median(params)["z"].shape == (N,)


def wants_argument(x):
    one_latent(len(x))


def wants_value(x=None):
    if x is None:
        raise ValueError("need x")
    one_latent(len(x))


def wants_assertion(x=None):
    assert x is not None
    one_latent(len(x))


def wants_keyword(**batch):
    one_latent(len(batch["x"]))


@pytest.mark.parametrize(
    ("model", "form", "first"),
    [
        (wants_argument, "context", N),
        (wants_value, "wrapper", 3),
        (wants_assertion, "context", 3),
        (wants_keyword, "wrapper", N),
    ],
)
def test_guide_without_the_models_arguments_gives_all_rows(model, form, first):
    svi = svi_of(model, form=form)
    with dynamic_subsample():
        params = svi.get_params(svi.init(jax.random.key(0), x=X[:first]))
        drawn = Predictive(svi.guide, params=params, num_samples=2)(jax.random.key(0))
    assert drawn["z"].shape == (2, N)


class OfAUser(AutoNormal):
    def median(self, *args, **kwargs):
        return super().median(*args, **kwargs)

    def sample_posterior(self, key, params, sample_shape=()):
        return super().sample_posterior(key, params, sample_shape=sample_shape)


@pytest.mark.parametrize("form", ["wrapper", "context"])
def test_posterior_methods_that_a_user_overrides(form):
    svi = svi_of(hierarchy(), OfAUser, form)
    with dynamic_subsample(), handlers.substitute(data={"n": ROWS}):
        params = svi.get_params(svi.init(jax.random.key(0), X[ROWS]))
    with dynamic_subsample():
        assert svi.guide.median(params)["z"].shape == (N,)
        drawn = svi.guide.sample_posterior(jax.random.key(0), params, sample_shape=(2,))
    assert drawn["z"].shape == (2, N)


@pytest.mark.parametrize(
    ("guide_class", "form"),
    [
        (AutoNormal, "wrapper"),
        (AutoDelta, "context"),
        (AutoMultivariateNormal, "context"),
    ],
)
def test_first_call_with_all_rows_in_another_order(guide_class, form):
    """Its data do not line up with the plate's order, and are left out."""
    guide, params = trained(guide_class, indexing, "reversed", form)
    methods = {"sample_posterior": (jax.random.key(0), params)}
    if guide_class is not AutoDelta:
        methods |= {"median": (params,), "quantiles": (params, [0.5])}
    for method, args in methods.items():
        left_out = r"'doubled'.*\['n'\] have another order"
        with dynamic_subsample(), pytest.warns(UserWarning, match=left_out):
            assert getattr(guide, method)(*args).keys() == {"mu", "z"}
