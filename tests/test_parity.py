"""Losses, gradients and states equal those of a hand-written `create_plates`."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro.handlers import block, substitute
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from checks import assert_equal
from models import CASES, N, X
from numpyro_dynamic_subsample import dynamic_subsample


class Pair:
    """The same inference with hand-written plates and with this library."""

    def __init__(self, case, guide_class=AutoNormal, *, form="wrapper", loss=None):
        loss = Trace_ELBO() if loss is None else loss
        guide = guide_class(case.model)
        if form == "wrapper":
            guide = dynamic_subsample(guide)
        self.context = dynamic_subsample if form == "context" else nullcontext
        optim = optax.sgd(1e-2)
        self.ours = SVI(case.model, guide, optim, loss)
        by_hand = guide_class(case.model, create_plates=case.plates)
        self.theirs = SVI(case.model, by_hand, optim, loss)
        self.steps = {
            svi: jax.jit(svi.update, static_argnums=1)
            for svi in (self.ours, self.theirs)
        }

    def init(self, size):
        key = jax.random.key(1)
        with self.context():
            ours = self.ours.init(key, size)
        return ours, self.theirs.init(key, size)

    def sequence(self, *sizes):
        """Initialise at the first size and step at the others, in one program."""

        def run(svi, key):
            state = svi.init(key, sizes[0])
            steps = []
            for size in sizes[1:]:
                state, loss = svi.update(state, size)
                steps.append((state, loss))
            return steps

        key = jax.random.key(1)
        with self.context():
            ours = jax.jit(partial(run, self.ours))(key)
        assert_equal(ours, jax.jit(partial(run, self.theirs))(key))

    def update(self, states, size, *, jit=True):
        steps = self.steps if jit else {svi: svi.update for svi in self.steps}
        with self.context():
            ours = steps[self.ours](states[0], size)
        theirs = steps[self.theirs](states[1], size)
        assert_equal(ours, theirs)
        return ours[0], theirs[0]


@pytest.mark.parametrize("case", CASES)
def test_models_of_every_kind(case):
    """Full first, then smaller."""
    Pair(CASES[case]).sequence(N, 3)


def test_full_again_after_a_smaller_size():
    Pair(CASES["events"], AutoDelta).sequence(N, 3, N)


@pytest.fixture(scope="module", params=[N, 3])
def pair_and_states(request):
    pair = Pair(CASES["one latent"])
    return pair, pair.init(request.param)


@settings(max_examples=10)
@given(sizes=st.lists(st.sampled_from([1, 5, N]), min_size=2, max_size=6))
def test_drawn_sequences(pair_and_states, sizes):
    """After any first size, any sequence of sizes."""
    pair, states = pair_and_states
    for size in sizes:
        states = pair.update(states, size)


@pytest.mark.parametrize(("form", "first"), [("wrapper", 3), ("context", N)])
def test_without_jit(form, first):
    pair = Pair(CASES["one latent"], form=form)
    states = pair.init(first)
    for size in (5, 1):
        states = pair.update(states, size, jit=False)


OBJECTIVES = [
    Trace_ELBO(num_particles=2),
    Trace_ELBO(num_particles=2, vectorize_particles=False),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
]


@pytest.mark.parametrize("loss", OBJECTIVES, ids=["vmap", "map", "mean field", "graph"])
def test_objectives(loss):
    Pair(CASES["one latent"], loss=loss).sequence(3, 5)


def test_every_way_to_step():
    """`run`, a scan or step by step, `stable_update` and `evaluate` follow as well."""
    pair = Pair(CASES["one latent"], form="context")
    states = dict(zip((pair.ours, pair.theirs), pair.init(3), strict=True))

    def every_way(svi):
        state = states[svi]
        runs = [
            svi.run(jax.random.key(2), 2, 5, init_state=state, progress_bar=bar)
            for bar in (True, False)
        ]
        return runs, svi.stable_update(state, 5), svi.evaluate(state, 5)

    with pair.context():
        ours = every_way(pair.ours)
    assert_equal(ours, every_way(pair.theirs))


def test_arguments_reach_the_model_as_given():
    """Positional, keyword and static arguments decide about the plates."""

    def model(data, *, total, size=None):
        with numpyro.plate("n", total, subsample_size=size) as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=data[idx])

    def plates(data, *, total, size=None):
        return numpyro.plate("n", total, subsample_size=size)

    def losses(guide):
        svi = SVI(model, guide, optax.sgd(1e-2), Trace_ELBO(), total=N)
        state = svi.init(jax.random.key(0), X)
        return [svi.update(state, X, size=size)[1] for size in (3, None)]

    ours = losses(dynamic_subsample(AutoNormal(model)))
    assert_equal(ours, losses(AutoNormal(model, create_plates=plates)))


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDelta])
def test_compiled_step_is_the_same(guide_class):
    """Reading the plates and rewriting them leave nothing in the compiled program."""
    pair = Pair(CASES["one latent"], guide_class)
    states = pair.init(N)

    def cost(svi, state):
        analysis = pair.steps[svi].lower(state, 3).compile().cost_analysis()
        return {key: analysis[key] for key in ("flops", "bytes accessed")}

    assert cost(pair.ours, states[0]) == cost(pair.theirs, states[1])


def test_core_holds_in_64_bit_and_leaks_no_tracer():
    jax.config.update("jax_enable_x64", True)
    try:
        with jax.checking_leaks():
            pair = Pair(CASES["one latent"], form="context")
            pair.update(pair.init(N), 3)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_parts_of_a_list_as_if_they_shared_plates_made_once():
    """Made again for each part, plates by hand would draw other rows or keys."""

    def model(x):
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            w = numpyro.sample("w", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z + w, 1), obs=x)

    made = []

    def once(x):
        made[:] = [numpyro.plate("n", N, subsample_size=len(x))]
        return made

    def states(served):
        guide = AutoGuideList(model, create_plates=None if served else once)
        for name, hide in (("z", ["w", "y"]), ("w", ["z", "y"])):
            plates = None if served else lambda x: made
            part = block(model, hide=hide)
            guide.append(AutoNormal(part, prefix=name, create_plates=plates))
        svi = SVI(model, guide, optax.sgd(1e-2), Trace_ELBO())
        state = svi.init(jax.random.key(0), X)
        step = jax.jit(svi.update)
        for rows in ([5, 0, 3], [7, 1]):
            with substitute(data={"n": jnp.array(rows)}):
                state, _ = step(state, X[jnp.array(rows)])
        return state

    theirs = states(False)
    with dynamic_subsample():
        assert_equal(states(True), theirs)
