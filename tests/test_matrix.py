"""Every guide with every objective, from batches of any size after any first one."""

from collections import defaultdict
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

from checks import assert_same_mean
from models import N
from numpyro_dynamic_subsample import dynamic_subsample

DRAWS = 1000


# The same bound as that of Trace_ELBO, estimated otherwise.
OTHERWISE = ("TraceMeanField_ELBO", "TraceGraph_ELBO")


def draws(guide, kind, objectives, form, first, sizes=(3, N)):
    """Losses, and for Trace_ELBO gradients, of all objectives at all sizes.

    The guide is initialised with a batch of `first` rows. All is one program, which
    takes far less time to compile than its parts do. The draws of an objective at a
    size have the shape ``(DRAWS, 1 + dimension)``.
    """
    model, guide = GUIDES[guide](kind)
    if form == "wrapper":
        guide = dynamic_subsample(guide)
    # TraceEnum_ELBO runs the model on rows of its own, unless in a context.
    context = form == "context" or kind.has_discrete
    loss = OBJECTIVES["TraceEnum_ELBO" if kind.has_discrete else "Trace_ELBO"]
    svi = SVI(model, guide, optax.sgd(1.0), loss)

    def of_objective(objective, size, at, unravel, keys):
        def draw(key):
            def of(at):
                params = svi.constrain_fn(unravel(at))
                return OBJECTIVES[objective].loss(key, params, model, guide, size)

            if objective != "Trace_ELBO":
                return of(at)[None]
            value, slope = jax.value_and_grad(of)(at)
            return jnp.append(value, slope)

        return jax.vmap(draw)(keys)

    def everything(key, keys):
        state = svi.init(key, first)
        at = ravel_pytree(svi.optim.get_params(state.optim_state))
        return {
            objective: [
                of_objective(objective, size, *at, keys)
                for size in sizes[: 1 if objective in OTHERWISE else None]
            ]
            for objective in objectives
        }

    keys = jax.random.split(jax.random.key(7), DRAWS)
    with dynamic_subsample() if context else nullcontext():
        found = jax.jit(everything)(jax.random.key(0), keys)
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), found)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field:UserWarning")
@pytest.mark.parametrize("guide", GUIDES)
def test_estimates_are_unbiased_at_every_size(guide):
    """Loss and gradient at a batch's size have the mean that they have at full size.

    First sizes and forms alternate from guide to guide.
    """
    turn = list(GUIDES).index(guide)
    first, form = (N, 3)[turn % 2], ("wrapper", "context")[turn // 2 % 2]
    possible = defaultdict(list)
    for objective in OBJECTIVES:
        kind, reason = kind_of(guide, objective), ruled_out(guide, objective)
        if reason is None:
            possible[kind].append(objective)
            continue
        with pytest.raises(ValueError, match=RULED_OUT[reason][1]):
            draws(guide, kind, [objective], form, first, sizes=(5,))
    for kind, objectives in possible.items():
        found = draws(guide, kind, objectives, form, first)
        for batch, *full in found.values():
            assert_same_mean(*(full or [found["Trace_ELBO"][1][:, :1]]), batch)


def test_page_shows_this_matrix():
    assert markdown() in (Path(__file__).parent / "README.md").read_text()
