"""Steps on the batch's rows alone equal NumPyro's ordinary steps."""

import os
from copy import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.distributions import constraints
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
from numpyro.optim import Adagrad, Minimize

from checks import assert_close, assert_equal, told
from models import CASES, N, X, guide_list, independent, svi_of

pytestmark = pytest.mark.filterwarnings(
    "ignore::numpyro_dynamic_subsample.MisalignedSubsampleWarning"
)

rowwise = partial(svi_of, form="SubsampleSVI", rowwise=True)
ADAM = optax.adam(0.1)
SCHEDULE = optax.exponential_decay(0.05, 2, 0.5)
FORGETFUL = {
    "sgd": optax.sgd(SCHEDULE),
    "numpyro's Adagrad": Adagrad(0.1, momentum=0.0),
}


def train(svi, batches, **static):
    """Take a step per batch; a batch is (args, kwargs) of the step."""
    update = jax.jit(svi.update, static_argnames=("size",))
    state = svi.init(jax.random.key(0), *batches[0][0], **batches[0][1])
    losses = []
    for args, kwargs in batches:
        state, loss = update(state, *args, **kwargs, **static)
        losses.append(loss)
    return svi.get_params(state), losses


def sliced(batch):
    """A model that is given the data of its rows."""
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    with numpyro.plate("n", N, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, scale), obs=batch)


def pinned(*many):
    many = map(jnp.array, many)
    return [((told(X[rows], rows={"n": rows}),), {}) for rows in many]


class PinnedSVI(SVI):
    """NumPyro's own, with the rows pinned around each step."""

    def init(self, key, batch):
        with handlers.substitute(data=batch.pinned):
            return super().init(key, *batch.args)

    def update(self, state, batch, size=None):
        with handlers.substitute(data=batch.pinned):
            return super().update(state, *batch.args)


def plates_of_sliced(batch):
    return numpyro.plate("n", N, subsample_size=len(batch))


ROWS = ([5, 0, 3], [3, 1, 0], [6, 6, 3], [2, 4, 2], [3, 3, 3])


@pytest.mark.parametrize("name", FORGETFUL)
def test_parameters_equal_those_of_svi(name):
    optim = FORGETFUL[name]
    theirs = AutoNormal(sliced, create_plates=plates_of_sliced)
    theirs = train(PinnedSVI(sliced, theirs, optim, Trace_ELBO()), pinned(*ROWS))
    ours = rowwise(sliced, optim=optim)
    assert_equal(train(ours, pinned(*ROWS)), theirs)


@pytest.mark.parametrize(
    ("name", "size"), [("one latent", N), ("nested plates", 3), ("every primitive", 3)]
)
def test_rows_are_drawn_as_by_svi(name, size):
    model, plates = CASES[name]
    # At full size a step is the ordinary one, of whatever optimizer.
    optim = optax.adam(0.1) if size == N else optax.adagrad(0.1)
    theirs = AutoNormal(model, create_plates=plates)
    steps = [((), {"size": size})] * 3
    theirs = train(SVI(model, theirs, optim, Trace_ELBO()), steps)
    ours = rowwise(model, optim=optim)
    assert_equal(train(ours, steps), theirs)


def by_hand(batch):
    """A guide with parameters whose rows are in an axis between others."""
    scale = numpyro.param("scale_loc", 1.0, constraint=constraints.positive)
    numpyro.sample("scale", dist.LogNormal(0.0, scale))
    with numpyro.plate("n", N, subsample_size=len(batch)):
        loc = numpyro.param("loc", jnp.zeros((1, N, 2)), event_dim=1)
        weights = numpyro.param(
            "w", jnp.full((N, 3), 1 / 3), event_dim=1, constraint=constraints.simplex
        )
        loc = loc.sum((0, 2)) + weights[:, 0]
        numpyro.sample("z", dist.Normal(loc, weights[:, 1]))


def grid(batch):
    """Latents for rows and columns whose dims are not next to each other."""
    rows = numpyro.plate("n", N, subsample_size=len(batch), dim=-3)
    columns = numpyro.plate("m", 4, subsample_size=2, dim=-1)
    with rows, columns as j:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1).to_event(1))
        y = batch[:, None, None] + j
        numpyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def enumerated(batch):
    with numpyro.plate("n", N, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        c = numpyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(z + c, 1.0), obs=batch)


def counting(batch):
    """A model with a state of its own, which counts the steps."""
    steps = numpyro.primitives.mutable("steps", {"count": jnp.zeros(())})
    steps["count"] = steps["count"] + 1
    independent(batch + 0.1 * steps["count"])


def two_guides(model):
    return guide_list(model, {"scale": AutoNormal, "z": AutoDelta})


def dais(model):
    return AutoSemiDAIS(model, model, K=2)


def normal_of_z(model):
    return AutoNormal(handlers.block(model, hide=["c"]))


SERVED = {
    "AutoDelta": (sliced, AutoDelta, Trace_ELBO()),
    "AutoGuideList": (sliced, two_guides, Trace_ELBO()),
    "AutoSemiDAIS": (independent, dais, Trace_ELBO()),
    "by hand": (sliced, lambda model: by_hand, Trace_ELBO()),
    "dims apart": (grid, AutoNormal, Trace_ELBO()),
    "particles": (independent, AutoNormal, Trace_ELBO(num_particles=2)),
    "mutable state": (counting, AutoNormal, Trace_ELBO()),
    "TraceMeanField_ELBO": (sliced, AutoNormal, TraceMeanField_ELBO()),
    "TraceGraph_ELBO": (independent, AutoNormal, TraceGraph_ELBO()),
    "RenyiELBO": (independent, AutoNormal, RenyiELBO(num_particles=2)),
    "TraceEnum_ELBO": (enumerated, normal_of_z, TraceEnum_ELBO()),
}


@pytest.mark.parametrize("name", SERVED)
def test_guides_and_objectives_take_rows(name):
    model, guide, loss = SERVED[name]

    def trained(**options):
        svi = svi_of(model, guide(model), "SubsampleSVI", loss, **options)
        return train(svi, pinned(*ROWS[:3]))

    check = assert_equal
    if name == "dims apart":  # XLA lays their rows out otherwise, and rounds so
        check = partial(assert_close, rtol=1e-6, atol=1e-7)
    check(trained(rowwise=True), trained())


def test_lazy_optimizers_let_other_rows_rest():
    # Always the same rows: for these, nothing is lazy.
    rows, others = jnp.array([5, 0, 3]), jnp.array([1, 2, 4, 6, 7])
    batches = pinned(*[rows] * 4)
    svi = [rowwise(independent, optim=ADAM, rowwise=own) for own in (True, False)]
    start = svi[0].get_params(svi[0].init(jax.random.key(0), *batches[0][0]))
    (ours, losses), (theirs, of_theirs) = (train(one, batches) for one in svi)
    assert_equal(losses, of_theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value[others], start[name][others])
        np.testing.assert_array_equal(value[rows], theirs[name][rows])
        assert (value[rows] != start[name][rows]).all()


CAPACITY = 5


@pytest.fixture(scope="module")
def padded_and_not():
    """A padded step, and an unpadded one, with a common start."""
    svi = rowwise(sliced, optim=ADAM)
    compiled = []

    def padded(*args, **kwargs):
        compiled.append(1)
        return svi.update(*args, **kwargs)

    state = svi.init(jax.random.key(0), told(X[:3], rows={"n": jnp.arange(3)}))
    # Without these, which this suite turns off, XLA rounds sums of other lengths
    # otherwise.
    flag = "xla_cpu_use_fusion_emitters"
    jit = partial(
        jax.jit,
        compiler_options={flag: True} if flag in os.environ["XLA_FLAGS"] else None,
    )
    return state, jit(padded), jit(svi.update), compiled


@settings(max_examples=8)
@given(data=st.data())
def test_padded_steps_equal_unpadded_ones(padded_and_not, data):
    state, padded, unpadded, compiled = padded_and_not
    for _ in range(2):
        n = data.draw(st.sampled_from([2, CAPACITY]))
        rows = st.lists(st.integers(0, N - 1), min_size=CAPACITY, max_size=CAPACITY)
        rows = np.array(data.draw(rows))
        # What fills up is any row, be it in the batch or not.
        ours = padded(state, told(X[rows], rows={"n": rows}, counts={"n": n}))
        theirs = unpadded(state, told(X[rows[:n]], rows={"n": rows[:n]}))
        assert_equal(ours, theirs)
        state = ours[0]
    assert len(compiled) == 1


def test_a_run_donates_and_keeps_what_is_the_users():
    ours = rowwise(independent)
    theirs = AutoNormal(independent, create_plates=plates_of_sliced)
    theirs = svi_of(independent, theirs, "context")
    key = jax.random.key(0)
    batch = X[:3]
    expected = theirs.run(key, 5, batch, progress_bar=False)
    for bar in (True, False):
        first = ours.run(key, 5, batch, progress_bar=bar)
        assert_equal((first.params, first.losses), (expected.params, expected.losses))
    second = ours.run(key, 3, batch, progress_bar=False, init_state=first.state)
    expected = theirs.run(key, 3, batch, progress_bar=False, init_state=expected.state)
    assert_equal(second.params, expected.params)
    assert_equal(first.params, ours.get_params(first.state))


def test_a_step_costs_the_batch():
    def temporary_bytes(size):
        def model(batch):
            independent(batch, size)

        svi = rowwise(model, optim=ADAM)
        rows = {"n": jnp.arange(3)}
        state = svi.init(jax.random.key(0), told(X[:3], rows=rows))
        step = jax.jit(svi.update, donate_argnums=0)
        memory = step.lower(state, told(X[:3], rows=rows)).compile().memory_analysis()
        # In place: nothing of the state is there twice.
        assert memory.alias_size_in_bytes >= 6 * 4 * size
        return memory.temp_size_in_bytes

    assert temporary_bytes(1_000) == temporary_bytes(100_000)


def outside(batch):
    loc = numpyro.param("loc", jnp.zeros(N), event_dim=0)
    with numpyro.plate("n", N, subsample_size=len(batch)):
        loc = numpyro.param("loc", jnp.zeros(N), event_dim=0)
        numpyro.sample("z", dist.Normal(loc, 1.0))


def on_two_axes(batch):
    with numpyro.plate("n", N, subsample_size=len(batch)):
        rows = numpyro.param("table", jnp.zeros((N, N)), event_dim=1)
        columns = numpyro.param("table", jnp.zeros((N, N)), event_dim=0)
        numpyro.sample("z", dist.Normal(rows.sum(-1) + columns.sum(0), 1.0))


def across(batch):
    with numpyro.plate("n", N, subsample_size=len(batch)):
        loc = numpyro.param(
            "loc", jnp.zeros(N), event_dim=0, constraint=constraints.zero_sum(1)
        )
        numpyro.sample("z", dist.Normal(loc, 1.0))


def list_with_joint(model):
    return guide_list(model, {"scale": AutoDelta, "z": AutoMultivariateNormal})


REFUSED = {
    "joint": (
        AutoMultivariateNormal,
        r"AutoMultivariateNormal is one joint.*plate 'n' \(size 8\).*Use AutoNormal",
    ),
    "joint in a list": (list_with_joint, "AutoMultivariateNormal is one joint"),
    "read outside": (lambda model: outside, "'loc' holds rows of plate 'n' .*outside"),
    "two axes": (
        lambda model: on_two_axes,
        r"'table' holds rows of plate 'n' \(size 8\) in axis 0 and in axis 1.*two par",
    ),
    "constrained across": (
        lambda model: across,
        "'loc' is constrained to .* across the rows of plate 'n'",
    ),
}


def refused(svi, first, batch, message):
    with pytest.raises(ValueError, match=message):
        state = jax.eval_shape(svi.init, jax.random.key(0), first)
        jax.eval_shape(svi.update, state, batch)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_row_by_row_is_an_error(name):
    guide, message = REFUSED[name]
    svi = rowwise(sliced, guide(sliced), optim=ADAM)
    refused(svi, X, X[:3], message)


def test_a_copy_with_another_optimizer_takes_its_steps():
    first, second = (
        rowwise(sliced, optim=optim) for optim in (optax.sgd(0.01), optax.adagrad(0.1))
    )
    train(first, pinned(*ROWS[:2]))
    changed = copy(first)
    changed.optim = second.optim
    assert_equal(train(changed, pinned(*ROWS)), train(second, pinned(*ROWS)))
    changed.optim = SVI(sliced, first.guide, optax.adafactor(0.1), Trace_ELBO()).optim
    refused(changed, X, X[:3], "mixes rows of plate 'n'")
    changed.optim = Minimize()
    refused(changed, X, X[:3], "Minimize optimises all parameters together")


def test_other_rows_rest_where_all_rows_fit_into_the_capacity():
    svi = rowwise(sliced, optim=ADAM)
    update = jax.jit(svi.update)
    states = [svi.init(jax.random.key(0), X)]
    for rows in np.array([5, 0, 3] + [3] * 5), np.array([1, 5] + [5] * 6):
        batch = told(X[rows], rows={"n": rows}, counts={"n": len(set(rows))})
        states.append(update(states[-1], batch)[0])
    _, before, after = (svi.get_params(state)["z_auto_loc"] for state in states)
    moved = np.flatnonzero(np.asarray(before != after))
    np.testing.assert_array_equal(moved, [1, 5])


def test_rows_may_be_of_a_type_too_narrow_for_the_size():
    # Row 3 is there twice, so that a place is left over, which must be no row.
    rows, size = np.array([5, 3, 3, 100, 0]), 500
    model = partial(independent, size=size)

    def reached(rows):
        return train(rowwise(model), [((told(np.ones(5), rows={"n": rows}),), {})] * 2)

    assert_equal(reached(rows.astype(np.uint8)), reached(rows))


def test_particles_that_draw_rows_are_refused():
    loss = Trace_ELBO(num_particles=2)
    svi = rowwise(independent, loss=loss, optim=ADAM)
    message = r"2 particles draws rows of its own from plate 'n' \(size 8\).*rows=\{'n'"
    refused(svi, X[:3], X[:3], message)
