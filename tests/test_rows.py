"""Which rows a batch uses: one choice, taken once, in any order, meets its own data."""

from contextlib import ExitStack, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)

from checks import told
from models import (
    TRUTH,
    N,
    guide_list,
    indexing,
    latent_and_obs,
    pinned_plate,
    plate,
    plate_of,
    svi_of,
    two_latents,
)
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample

DRAW = np.random.default_rng(0)
X, BIAS, LOC = DRAW.normal(scale=6, size=(3, N))

BATCHES = {
    "half": [4, 1, 3],
    "in order": list(range(N)),
    "shuffled": [5, 0, 3, 1, 7, 4, 2, 6],
    "with replacement": [2, 2, 0, 5, 3, 2, 7, 1],
}


def plain(x, rows, pinned=True):
    """Data that are sliced, and data that the model indexes."""
    with plate_of(rows, pinned=pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        w = numpyro.sample("w", dist.Normal(0, 10))
        numpyro.sample("sliced", dist.Normal(z + w, 1), obs=x)
        numpyro.sample("indexed", dist.Normal(z + w, 1), obs=jnp.asarray(X)[idx])


def full(x, rows, pinned=True):
    """Besides, parameters of the model and ``numpyro.subsample``."""
    with plate_of(rows, pinned=pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        w = numpyro.sample("w", dist.Normal(0, 10))
        bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
        numpyro.sample("sliced", dist.Normal(z + w + bias, 1), obs=x)
        numpyro.sample("indexed", dist.Normal(z + w + bias, 1), obs=jnp.asarray(X)[idx])
        x = numpyro.subsample(jnp.asarray(X), event_dim=0)
        numpyro.sample("subsampled", dist.Normal(z + w + bias, 1), obs=x)


OBSERVED = ["sliced", "indexed", "subsampled"]
of_small_spread = partial(partial, init_scale=1e-4)


def two_parts(model):
    parts = {"z": of_small_spread(AutoNormal), "w": AutoDelta}
    return guide_list(model, parts, hide=OBSERVED)


def by_hand(model):
    def guide(x, rows, pinned=True):
        with plate_of(rows, pinned=pinned):
            for name in ("z", "w"):
                loc = numpyro.param(f"{name}_auto_loc", jnp.zeros(N), event_dim=0)
                numpyro.sample(name, dist.Normal(loc, 1e-4))

    return guide


def by_hand_with_index(model):
    def guide(x, rows, pinned=True):
        with plate_of(rows, pinned=pinned) as idx:
            for name in ("z", "w"):
                loc = numpyro.param(f"{name}_auto_loc", jnp.zeros(N))
                numpyro.sample(name, dist.Normal(loc[idx], 1e-4))

    return guide


def two_autoguides(model):
    first, second = two_parts(model)

    def guide(*args, **kwargs):
        return {**first(*args, **kwargs), **second(*args, **kwargs)}

    return guide


joint = of_small_spread(AutoDiagonalNormal)


def joint_in_a_function(model):
    auto = joint(model)
    return lambda *args: auto(*args)


def joint_in_a_list(model):
    guide = AutoGuideList(model)
    guide.append(joint_in_a_function(model))
    return guide


GUIDES = {
    "AutoNormal": of_small_spread(AutoNormal),
    "AutoDelta": AutoDelta,
    "AutoMultivariateNormal": of_small_spread(AutoMultivariateNormal),
    "AutoGuideList": two_parts,
    "by hand": by_hand,
    "by hand, with index": by_hand_with_index,
    "two autoguides": two_autoguides,
    "joint in a partial": lambda model: partial(joint(model)),
    "joint in a function": joint_in_a_function,
    "joint in a list": joint_in_a_list,
}


def known(name, value):
    """Parameters whose rows can be told apart: `z` is at LOC, `w` at zero."""
    values = {"bias": BIAS, "z_auto_loc": LOC, "w_auto_loc": np.zeros(N)}
    # Joint guides have one vector, of w and z.
    values["auto_loc"] = np.concatenate([np.zeros(N), LOC])
    return jnp.asarray(values[name], "float32") if name in values else value


def truth(rows, bias):
    rows = np.asarray(rows)
    residual = X[rows] - LOC[rows] - (BIAS[rows] if bias else 0)
    return N / len(rows) * np.sum(0.5 * residual**2 + 0.5 * np.log(2 * np.pi))


class Form(NamedTuple):
    svi: type = SVI
    wrap: bool = False
    context: bool = False


FORMS = {
    "wrapper": Form(wrap=True),
    "context": Form(context=True),
    "wrapper in nested contexts": Form(wrap=True, context=True),
    "SubsampleSVI": Form(svi=SubsampleSVI),
}


def contexts(form):
    stack = ExitStack()
    for _ in range(2 if form.context else 0):
        stack.enter_context(dynamic_subsample())
    return stack


def compiled_loss(form, guide, model, loss):
    """The loss by site, of some rows, at parameters that are known for each row."""
    guide = GUIDES[guide](model)
    if form.wrap:
        guide = dynamic_subsample(guide, model=model)
    svi = form.svi(model, guide, optax.sgd(0.1), loss)

    def arguments(rows):
        x = jnp.asarray(X, "float32")[rows]
        if form.svi is SubsampleSVI:
            return (told(x, rows, rows={"n": rows}, pinned=False),)
        return x, rows

    state = svi.init(jax.random.key(0), *arguments(jnp.arange(N)))
    params = svi.optim.get_params(state.optim_state)
    params = {name: known(name, value) for name, value in params.items()}
    state = state._replace(optim_state=svi.optim.init(params))

    @jax.jit
    def loss_of(rows):
        return svi.evaluate(state, *arguments(rows))

    return loss_of


FEW = ["AutoNormal", "AutoMultivariateNormal", "AutoGuideList"]
OF_FORM = {
    "wrapper": list(GUIDES),
    "context": [*FEW, "by hand, with index", "two autoguides", "joint in a function"],
    "wrapper in nested contexts": ["AutoDelta", "two autoguides"],
    "SubsampleSVI": [*FEW, "by hand"],
}


@pytest.mark.parametrize(
    ("form", "guide"),
    [(form, own) for form, guides in OF_FORM.items() for own in guides],
)
def test_every_row_meets_its_own(form, guide):
    """The density of the observed sites is that of the rows, computed by hand."""
    form = FORMS[form]
    alone = form.wrap and not form.context
    model, sites = (plain, 2) if alone else (full, 3)
    with contexts(form):
        loss = compiled_loss(form, guide, model, Trace_ELBO(sum_sites=False))
        for rows in BATCHES.values():
            found = loss(jnp.array(rows))
            observed = [found[name] for name in found if name in OBSERVED]
            assert len(observed) == sites
            for value in observed:
                np.testing.assert_allclose(value, truth(rows, not alone), rtol=2e-3)


OBJECTIVES = [
    (Trace_ELBO(), "by hand, with index"),
    (TraceMeanField_ELBO(), "two autoguides"),
    (TraceGraph_ELBO(), "by hand, with index"),
    (TraceEnum_ELBO(max_plate_nesting=1), "by hand, with index"),
    (TraceEnum_ELBO(max_plate_nesting=1), "two autoguides"),
    (RenyiELBO(num_particles=1), "two autoguides"),
]


@pytest.mark.parametrize(("loss", "guide"), OBJECTIVES)
def test_objectives_in_a_context(loss, guide):
    """All rows in another order have the loss that they have in order."""
    with contexts(FORMS["context"]):
        of_rows = compiled_loss(FORMS["context"], guide, full, loss)
        found = [of_rows(jnp.array(BATCHES[k])) for k in ("in order", "shuffled")]
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_multi_sample_guide_in_a_context():
    def guide(x, rows):
        with plate_of(rows) as idx:
            loc = numpyro.param("z_auto_loc", jnp.zeros(N))[idx]
            for name, value in (("z", loc), ("w", 0 * loc)):
                numpyro.sample(name, dist.Normal(value, 1e-4).expand_by([3]).mask(True))

    loss = Trace_ELBO(multi_sample_guide=True)
    svi = SVI(full, guide, optax.sgd(0.1), loss)
    params = {"z_auto_loc": jnp.asarray(LOC), "bias": jnp.asarray(BIAS)}

    def of(rows):
        rows = jnp.array(rows)
        args = (jax.random.key(0), params, full, guide, jnp.asarray(X)[rows], rows)
        return svi.loss.loss(*args)

    with dynamic_subsample():
        found = [of(BATCHES[kind]) for kind in ("in order", "shuffled")]
    np.testing.assert_allclose(*found, rtol=1e-4)


# ------------------------------------------------------------------ Predictive


def doubling(x, rows, pinned=True):
    """Rows in the order of the batch: the latent, less the row's own datum."""
    with plate_of(rows, pinned=pinned) as idx:
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.deterministic("sliced", z - x)
        numpyro.deterministic("indexed", z - jnp.asarray(X)[idx])
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def conditioned(x, rows):
    handlers.condition(doubling, data={"z": jnp.asarray(LOC)})(x, rows)


@pytest.mark.parametrize(
    ("given", "nested"),
    [
        ("samples", False),
        ("samples", True),
        ("guide", False),
        ("guide by hand", True),
        ("condition", False),
    ],
)
def test_predictive_pairs_rows_with_their_own(given, nested):
    samples = {"z": jnp.asarray([LOC, LOC + 1])}
    shift = np.array([0.0, 1.0 if given == "samples" else 0.0])[:, None]

    def guide_by_hand(x, rows):
        with plate_of(rows) as idx:
            numpyro.sample("z", dist.Delta(jnp.asarray(LOC)[idx]))

    def predictive(*batch):
        if given == "samples":
            return Predictive(doubling, samples)
        if given == "guide by hand":
            return Predictive(doubling, guide=guide_by_hand, num_samples=2)
        if given == "condition":
            return Predictive(conditioned, num_samples=2)
        guide, params = AutoDelta(doubling), {"z_auto_loc": jnp.asarray(LOC)}
        with handlers.seed(rng_seed=0):
            guide(*batch)
        return Predictive(doubling, guide=guide, params=params, num_samples=2)

    with dynamic_subsample(), dynamic_subsample() if nested else nullcontext():
        for kind, rows in BATCHES.items():
            batch = jnp.asarray(X)[jnp.array(rows)], jnp.array(rows)
            if given == "condition" and kind in ("shuffled", "with replacement"):
                message = "All 8 rows of plate 'n' .* `condition` gives .* site 'z'"
                with pytest.raises(ValueError, match=message):
                    predictive()(jax.random.key(0), *batch)
                continue
            found = predictive(*batch)(jax.random.key(0), *batch)
            expected = (LOC - X)[rows] + shift
            np.testing.assert_allclose(found["indexed"], expected, rtol=1e-5)
            np.testing.assert_allclose(found["sliced"], expected, rtol=1e-5)


# ------------------------------------------------------------------ a wrapper alone


def test_what_a_wrapper_alone_cannot_reach():
    """A guide without a site in the plate, and parameters of the model there."""

    def model(x, rows):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with plate_of(rows):
            bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
            numpyro.sample("y", dist.Normal(mu + bias, 1), obs=x)

    svi = svi_of(model)
    x = jnp.asarray(X)
    state = svi.init(jax.random.key(0), x, jnp.arange(N))
    svi.update(state, x, jnp.arange(N))
    rows = jnp.array(BATCHES["shuffled"])
    step = jax.jit(svi.update)
    with pytest.raises(ValueError, match="All 8 rows of plate 'n' .* SubsampleSVI"):
        step(state, x[rows], rows)
    with dynamic_subsample():
        after = svi.get_params(step(state, x[rows], rows)[0])["bias"]
    mu = svi.get_params(state)["mu_auto_loc"]
    # A step goes a tenth of the way to the row's own residual.
    np.testing.assert_allclose(after, 0.1 * (X - mu), atol=0.1)


def test_padding_to_all_rows_follows_the_indices_in_subsample():

    def model(x):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 10))
            data = numpyro.subsample(jnp.asarray(X), event_dim=0)
            numpyro.sample("y", dist.Normal(z, 1), obs=data)

    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    rows = jnp.array(BATCHES["shuffled"])
    state = svi.init(jax.random.key(0), X)
    state = state._replace(optim_state=svi.optim.init({"z_auto_loc": jnp.asarray(LOC)}))
    loss = svi.evaluate(state, told(X, rows={"n": rows}, counts={"n": 2}))
    two = np.asarray(rows[:2])
    of_rows = dist.Normal(0, 10).log_prob(LOC) + dist.Normal(LOC, 1).log_prob(X)
    np.testing.assert_allclose(loss, -N / 2 * np.asarray(of_rows)[two].sum(), rtol=1e-5)


def halves_of_two_latents(model):
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


LISTS = [halves_of_two_latents, list_in_list, with_callable]


@pytest.mark.parametrize("parts", LISTS)
def test_parts_of_a_list_share_their_rows(parts):
    """With hand-written plates each part of a list draws rows of its own."""
    svi = svi_of(two_latents, parts(two_latents))
    state = svi.init(jax.random.key(0), range(3), None)
    before = svi.get_params(state)
    for size in (3, 5):
        moved = svi.get_params(svi.update(state, range(size), None)[0])
        a, z = (moved[k] != before[k] for k in ("a_auto_loc", "z_auto_loc"))
        assert a.sum() == size
        np.testing.assert_array_equal(a, z)


def latents(guide, params, rows, make):
    guide = handlers.substitute(handlers.seed(guide, 0), params)
    trace = handlers.trace(guide).get_trace(TRUTH[rows], rows, make)
    return trace["n"]["value"], trace["z"]["value"], trace["z"]["scale"]


@pytest.mark.parametrize(
    ("where", "rows", "traced"),
    [
        ("in the model", [6, 1, 3], True),
        ("in the model", [2], False),
        ("around the call", [6, 1, 3], False),
        ("around the call", list(range(N))[::-1], True),
    ],
)
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

    taken, z, scale = (jax.jit(run) if traced else run)(jnp.array(rows))
    np.testing.assert_array_equal(taken, rows)
    np.testing.assert_array_equal(z, 10 * jnp.array(rows))
    assert (scale or 1) == N / len(rows)


@pytest.mark.filterwarnings("ignore:subsample_size does not match:UserWarning")
@pytest.mark.parametrize("length", [2, N])
def test_pins_of_another_length_than_the_model_asks_for(length):
    """As in the model, so in the guide the pinned rows win."""

    def asks_for_four():
        indexing(range(4), None)

    svi = svi_of(asks_for_four, AutoDelta, optim=optax.sgd(0.5))
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

    def steps(guide, form):
        svi, losses = svi_of(model, guide, form), []
        state = svi.init(jax.random.key(0), data[:, :4], jnp.arange(4), 10)
        update = jax.jit(svi.update, static_argnums=3)
        for rows in (jnp.arange(4), jnp.arange(4, 8), jnp.arange(8, 10)):
            state, loss = update(state, data[:, rows], rows, 10)
            losses.append(loss)
        return losses

    theirs = steps(AutoNormal(model, create_plates=by_hand), "context")
    assert steps(AutoNormal, "wrapper") == theirs
    with dynamic_subsample():
        assert steps(AutoNormal, "context") == theirs
