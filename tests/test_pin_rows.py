"""Training loops that others own, which pass on the model's arguments only."""

import copy
from contextlib import nullcontext
from functools import partial
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from checks import assert_equal, assert_same_mean
from models import N, hierarchy, plate_of
from numpyro_dynamic_subsample import SubsampleSVI, dynamic_subsample, pin_rows

X = np.random.default_rng(0).normal(size=N)
BATCHES = [[5, 0, 3], [7, 1], [2, 6, 4, 0, 1, 3, 7, 5]]


def model(x, d_batch=None):
    hierarchy(N, "docs")(x)


pinned = pin_rows(model, docs="d_batch")


def by_hand(x, d_batch):
    with handlers.substitute(data={"docs": d_batch}):
        model(x)


def plate(x, d_batch):
    return plate_of(d_batch, name="docs")


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


def trained(trainer, batches=BATCHES[:2], **more):
    losses = [
        trainer.train_on_batch(x=jnp.asarray(X[rows]), d_batch=jnp.array(rows), **more)
        for rows in batches
    ]
    return losses, trainer.svi.get_params(trainer.state)


@pytest.mark.parametrize("form", ["wrapper", "context", "SubsampleSVI"])
def test_rows_in_an_argument_of_the_model(form):
    """Bit for bit those of rows that are pinned by hand in model and guide."""
    theirs = trained(Trainer(by_hand, AutoNormal(by_hand, create_plates=plate)))
    guide, svi = AutoNormal(pinned), SubsampleSVI if form == "SubsampleSVI" else SVI
    if form == "context":
        with dynamic_subsample():
            ours = trained(Trainer(pinned, guide))
    else:
        ours = trained(Trainer(pinned, dynamic_subsample(guide), svi))
    assert_equal(ours, theirs)


def test_prediction_in_a_loop_of_others():
    """Each row is predicted from its own latent, and its likelihood is its own."""
    with dynamic_subsample():
        trainer = Trainer(pinned, AutoDelta(pinned))
        _, params = trained(trainer, BATCHES * 3)
        post = trainer.svi.guide.sample_posterior(
            jax.random.key(0), params, sample_shape=(20_000,)
        )
        rows = jnp.array([7, 3, 5])
        predict = Predictive(handlers.uncondition(pinned), post)
        drawn = predict(jax.random.key(1), jnp.zeros(3), rows)["y"]
        densities = log_likelihood(pinned, post, jnp.asarray(X)[rows], rows)["y"]
    assert_same_mean(drawn, post["z"][:, rows])
    expected = dist.Normal(post["z"][:, rows], 1).log_prob(X[rows])
    np.testing.assert_allclose(densities, expected, rtol=1e-5)


def moved(trainer, rows):
    """The rows of each parameter that a step changes."""
    trained(trainer, [rows])
    before = trainer.svi.get_params(trainer.state)
    _, after = trained(trainer, [rows])
    return {name: set(np.flatnonzero(after[name] != before[name])) for name in after}


def test_rows_in_an_argument_with_an_enumerating_objective():
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    with dynamic_subsample():
        trainer = Trainer(pinned, AutoDelta(pinned), loss=loss)
        assert moved(trainer, BATCHES[0])["z_auto_loc"] == set(BATCHES[0])


def test_guide_without_a_site_in_the_plate():
    """The model's parameters are those of the rows all the same."""

    @pin_rows(docs="d_batch")
    def model(x, d_batch):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("docs", N, subsample_size=len(x)):
            bias = numpyro.param("bias", jnp.zeros(N), event_dim=0)
            numpyro.sample("y", dist.Normal(mu + bias, 1), obs=x)

    trainer = Trainer(model, dynamic_subsample(AutoDelta(model)))
    assert moved(trainer, BATCHES[0])["bias"] == set(BATCHES[0])


# ------------------------------------------------------------------ pin_rows


def rows_taken(model, *args, **kwargs):
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        model(*args, **kwargs)
    return trace["docs"]["value"].tolist()


class OfAClass:
    def __init__(self):
        self.size = N

    @pin_rows(docs="d_batch")
    def model(self, x, d_batch):
        hierarchy(self.size, "docs")(x)


def by_keyword(x, *, d_batch):
    model(x)


def by_default(x, d_batch=(4, 2)):
    model(x)


def open_ended(x, **kwargs):
    model(x)


SOME, TWO = np.array([4, 2]), np.zeros(2)
OF_TWO = pin_rows(partial(model, TWO), docs="d_batch")
WAYS = {
    "position": (pinned, (TWO, SOME), {}),
    "name": (pinned, (TWO,), {"d_batch": SOME}),
    "keyword only": (pin_rows(by_keyword, docs="d_batch"), (TWO,), {"d_batch": SOME}),
    "default": (pin_rows(by_default, docs="d_batch"), (TWO,), {}),
    "open-ended": (pin_rows(open_ended, docs="d_batch"), (TWO,), {"d_batch": SOME}),
    "partial inside": (
        pin_rows(partial(model, TWO), docs="d_batch"),
        (),
        {"d_batch": SOME},
    ),
    "partial around": (partial(pinned, d_batch=SOME), (TWO,), {}),
    "method": (OfAClass().model, (TWO, SOME), {}),
    "narrow type": (pinned, (TWO, SOME.astype("uint8")), {}),
    "list": (pinned, (TWO, [4, 2]), {}),
}


@pytest.mark.parametrize(("model", "args", "kwargs"), WAYS.values(), ids=WAYS)
def test_ways_to_give_the_argument(model, args, kwargs):
    assert rows_taken(model, *args, **kwargs) == [4, 2]


def test_without_rows_the_plate_draws():
    assert len(rows_taken(pinned, TWO)) == 2


def test_names_that_do_not_fit():
    message = r"plate 'docs' .* argument 'batch', but .* \['x', 'd_batch'\]"
    with pytest.raises(ValueError, match=message):
        pin_rows(model, docs="batch")
    message = r"plate 'doc' .* argument 'd_batch', but the plates .* \['docs'\]"
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=message):
        pin_rows(model, doc="d_batch")(TWO, SOME)
    with pytest.raises(ValueError, match=r"plate 'docs' \(size 8\) run from 2 to 9"):
        rows_taken(pinned, TWO, np.array([9, 2]))
    with pytest.raises(TypeError, match=r"pin_rows\(model, people='idx'\)"):
        pin_rows(model)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("served", ["no", "wrapper", "context", "by hand"])
def test_pins_that_a_guide_overrules_are_refused(jit, served):
    size, order = 6, np.array([3, 0, 5, 1, 4, 2])
    y = np.arange(6.0, dtype="float32")

    @pin_rows(people="rows")
    def model(y, rows):
        with numpyro.plate("people", size, subsample_size=len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    @pin_rows(people="rows")
    def by_hand(y, rows):
        loc = numpyro.param("loc", jnp.zeros(size))
        with numpyro.plate("people", size, subsample_size=len(y)) as idx:
            numpyro.sample("z", dist.Delta(loc[idx]))

    guide = by_hand if served == "by hand" else AutoDelta(model)
    guide = dynamic_subsample(guide) if served == "wrapper" else guide
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    context = dynamic_subsample() if served == "context" else nullcontext()
    wrong = pytest.raises(ValueError, match="pin_rows pins 6 rows of plate 'people'")
    with context, wrong if served == "no" else nullcontext():
        state = svi.init(jax.random.key(0), y[order], order)
        update = jax.jit(svi.update) if jit else svi.update
        state, _ = update(state, y[order], order)
        if served == "by hand":
            # The gradient of each row is its own data's.
            moved = svi.get_params(state)["loc"]
            np.testing.assert_allclose(moved, 0.1 * y, rtol=1e-5)
