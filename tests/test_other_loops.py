"""Training loops that others own, which pass on the model's arguments only."""

import copy
from contextlib import nullcontext
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from models import N, hierarchy, plate_of
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample, minibatch

X = np.random.default_rng(0).normal(size=N)
BATCHES = [[5, 0, 3], [7, 1], [2, 6, 4, 0, 1, 3, 7, 5]]


def model(x, d_batch=None, n_batch=None):
    hierarchy(N, "docs")(x)


def pinning(x, d_batch):
    """As it would be with the rows pinned by hand."""
    with handlers.substitute(data={"docs": d_batch}):
        model(x)


def plate(x, d_batch):
    return plate_of(d_batch, name="docs")


def unpinned(x, d_batch):
    return plate_of(d_batch, name="docs", pinned=False)


class PinnedAround(SVI):
    def __init__(self, model, guide):
        super().__init__(model, guide, optax.sgd(0.1), Trace_ELBO())

    def init(self, rng_key, **arguments):
        with handlers.substitute(data={"docs": arguments["d_batch"]}):
            return super().init(rng_key, **arguments)

    def update(self, state, **arguments):
        with handlers.substitute(data={"docs": arguments["d_batch"]}):
            return super().update(state, **arguments)


class Trainer:
    """A loop that binds keywords to the model's signature and compiles its own step."""

    def __init__(self, model, guide, svi=SVI, **kwargs):
        loss = kwargs.pop("loss", Trace_ELBO())
        self.svi = svi(model, guide, optax.sgd(0.1), loss, **kwargs)
        self.signature = signature(model)
        self.step = jax.jit(self.svi.update)
        # Some keep a copy of the guide, to start anew.
        self.copy = SVI(model, copy.deepcopy(guide), optax.sgd(0.1), loss)
        self.state = None

    def train_on_batch(self, **arguments):
        arguments = self.signature.bind(**arguments).arguments
        if self.state is None:
            self.state = self.svi.init(jax.random.key(1), **arguments)
        self.state, loss = self.step(self.state, **arguments)
        return loss


def trained(trainer, form, batches=BATCHES[:2], **more):
    with (
        dynamic_subsample(rows={"docs": "d_batch"})
        if form == "context"
        else (nullcontext())
    ):
        losses = [
            trainer.train_on_batch(
                x=jnp.asarray(X[rows]), d_batch=jnp.array(rows), **more
            )
            for rows in batches
        ]
    return losses, trainer.svi.get_params(trainer.state)


@pytest.mark.parametrize("form", ["wrapper", "by position", "context", "SubsampleSVI"])
def test_rows_in_an_argument_of_the_model(form):
    """Bit for bit those of rows that are pinned by hand in model and guide."""
    guide, svi, kwargs = AutoNormal(model), SVI, {}
    if form in ("wrapper", "by position"):
        name = "d_batch" if form == "wrapper" else 1
        guide = dynamic_subsample(guide, rows={"docs": name})
    elif form == "SubsampleSVI":
        svi, kwargs = SubsampleSVI, {"rows": {"docs": "d_batch"}}
    by_hand = Trainer(pinning, AutoNormal(pinning, create_plates=plate))
    if svi is SubsampleSVI:
        # A pin around the step: the plate has got a key before.
        by_hand.svi = PinnedAround(model, AutoNormal(model, create_plates=unpinned))
        by_hand.step = jax.jit(by_hand.svi.update)
    theirs = trained(by_hand, "by hand")
    ours = trained(Trainer(model, guide, svi, **kwargs), form)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def moved(trainer, form, rows):
    """The rows of each parameter that a step changes."""
    trained(trainer, form, [rows])
    before = trainer.svi.get_params(trainer.state)
    _, after = trained(trainer, form, [rows])
    return {name: set(np.flatnonzero(after[name] != before[name])) for name in after}


def test_rows_in_an_argument_with_an_enumerating_objective():
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    trainer = Trainer(model, AutoDelta(model), loss=loss)
    assert moved(trainer, "context", BATCHES[0])["z_auto_loc"] == set(BATCHES[0])


def test_counts_in_an_argument_of_the_model():
    rows = np.array(BATCHES[0])
    batch = minibatch(X[rows], rows, rows={"docs": rows}, capacity=5)
    (x, d_batch), count = batch.args, batch.counts["docs"]
    named = {"rows": {"docs": "d_batch"}, "valid": {"docs": "n_batch"}}
    svi = SubsampleSVI(model, AutoDelta(model), optax.sgd(0.1), Trace_ELBO(), **named)
    state = svi.init(jax.random.key(0), X[rows], d_batch=rows)
    padded = jax.jit(svi.evaluate)(state, x, d_batch, n_batch=count)
    np.testing.assert_allclose(padded, svi.evaluate(state, X[rows], rows), rtol=1e-5)


def test_guide_without_a_site_in_the_plate():
    """The model's parameters are those of the rows all the same."""

    def model(x, d_batch):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("docs", N, subsample_size=len(x)):
            bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
            numpyro.sample("y", dist.Normal(mu + bias, 1), obs=x)

    guide = dynamic_subsample(AutoDelta(model), rows={"docs": "d_batch"})
    assert moved(Trainer(model, guide), "wrapper", BATCHES[0])["bias"] == set(
        BATCHES[0]
    )


def test_argument_that_the_model_lacks():
    guide = dynamic_subsample(AutoDelta(model), rows={"docs": "batch"})
    message = r"plate 'docs' .* argument 'batch', but .* \['x', 'd_batch', 'n_batch'\]"
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=message):
        guide(X[:3])


def test_counts_that_a_context_finds():
    """Loss and parameters are those of the batch without padding."""
    rows = np.array(BATCHES[0])
    batch = minibatch(X[rows], rows, rows={"docs": rows}, capacity=5)
    (x, d_batch), count = batch.args, batch.counts["docs"]
    svi = SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
    with dynamic_subsample(rows={"docs": "d_batch"}, valid={"docs": "n_batch"}):
        state = svi.init(jax.random.key(0), X, d_batch=np.arange(N))
        step = jax.jit(svi.update)
        ours = step(state, x, d_batch, n_batch=count)
        theirs = step(state, X[rows], rows)
    assert count < len(x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (svi.get_params(ours[0]), ours[1]),
        (svi.get_params(theirs[0]), theirs[1]),
    )


def test_counts_that_a_wrapper_cannot_pass_on():
    guide = dynamic_subsample(AutoNormal(model), valid={"docs": "n_batch"})
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match="'docs'.*context"):
        guide(X[:3], n_batch=2)
