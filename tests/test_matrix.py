"""Every guide with every objective, from batches of any size after any first one."""

from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from matrix import GUIDES, OBJECTIVES, RULED_OUT, kind_of, markdown, ruled_out
from numpyro.infer import SVI

from models import N
from numpyro_dynamic_subsample import dynamic_subsample

DRAWS = 1000


class Inference:
    """A guide of the matrix, initialised with a batch of `first` rows."""

    def __init__(self, guide, kind, form, first):
        model, guide = GUIDES[guide](kind)
        wrap = dynamic_subsample if form == "wrapper" else lambda guide: guide
        # TraceEnum_ELBO runs the model on rows of its own, unless in a context.
        context = form == "context" or kind.has_discrete
        self.context = dynamic_subsample if context else nullcontext
        loss = OBJECTIVES["TraceEnum_ELBO" if kind.has_discrete else "Trace_ELBO"]
        self.svi = SVI(model, wrap(guide), optax.sgd(1.0), loss)
        with self.context():
            self.state = self.svi.init(jax.random.key(0), first)

    def draws(self, size, objective, *, gradient=False):
        """Losses, and gradients by all parameters, shape ``(DRAWS, 1 + dimension)``."""
        loss = OBJECTIVES[objective].loss
        svi = self.svi
        at, unravel = ravel_pytree(svi.optim.get_params(self.state.optim_state))

        def draw(key):
            def of(at):
                params = svi.constrain_fn(unravel(at))
                return loss(key, params, svi.model, svi.guide, size)

            if not gradient:
                return of(at)[None]
            value, slope = jax.value_and_grad(of)(at)
            return jnp.append(value, slope)

        keys = jax.random.split(jax.random.key(7), DRAWS)
        with self.context():
            return np.asarray(jax.jit(jax.vmap(draw))(keys), float)


def assert_same_mean(a, b):
    difference = a.mean(0) - b.mean(0)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    np.testing.assert_array_less(np.abs(difference), 5 * error + 1e-3)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field:UserWarning")
@pytest.mark.parametrize("guide", GUIDES)
def test_estimates_are_unbiased_at_every_size(guide):
    """Loss and gradient at a batch's size have the mean that they have at full size.

    First sizes and forms alternate from guide to guide.
    """
    turn = list(GUIDES).index(guide)
    first, form = (N, 3)[turn % 2], ("wrapper", "context")[turn // 2 % 2]
    inference = {}
    for objective in OBJECTIVES:
        kind = kind_of(guide, objective)
        if kind not in inference:
            inference[kind] = Inference(guide, kind, form, first)
        reason = ruled_out(guide, objective)
        if reason is not None:
            with pytest.raises(ValueError, match=RULED_OUT[reason][1]):
                inference[kind].draws(5, objective)
        elif objective == "Trace_ELBO":
            full = inference[kind].draws(N, objective, gradient=True)
            batch = inference[kind].draws(3, objective, gradient=True)
            assert_same_mean(full, batch)
        elif objective in ("TraceMeanField_ELBO", "TraceGraph_ELBO"):
            # The same bound, estimated otherwise.
            assert_same_mean(full[:, :1], inference[kind].draws(3, objective))
        else:
            sizes = (inference[kind].draws(size, objective) for size in (N, 3))
            assert_same_mean(*sizes)


def test_readme_shows_this_matrix():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert markdown() in readme
