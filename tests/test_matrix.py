"""Every guide with every objective, from batches of any size after any first one.

``python tests/test_matrix.py`` prints the table that ``tests/README.md`` has.
"""

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
)
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)

from checks import assert_same_mean
from models import N, X
from numpyro_dynamic_subsample import dynamic_subsample

OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO(),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "RenyiELBO": RenyiELBO(num_particles=2),
    "TraceEnum_ELBO": TraceEnum_ELBO(max_plate_nesting=1),
}


class Kind(NamedTuple):
    """How a model is built around its one subsampled plate."""

    has_global: bool = True
    has_discrete: bool = False


def build(kind):
    """The global part of a model, its local part, and the whole."""

    def global_part(size):
        mu = numpyro.sample("mu", dist.Normal(0, 1)) if kind.has_global else 0.0
        return mu, size

    def local_part(arguments):
        mu, size = arguments
        with numpyro.plate("n", N, subsample_size=size) as idx:
            w = numpyro.sample("w", dist.Normal(mu, 1))
            z = numpyro.sample("z", dist.LogNormal(w, 0.5))
            if kind.has_discrete:
                infer = {"enumerate": "parallel"}
                z = z + numpyro.sample("k", dist.Bernoulli(0.3), infer=infer)
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    def model(size):
        local_part(global_part(size))

    return global_part, local_part, model


def whole(guide_class, **options):
    """A guide for all continuous latents at once."""

    def make(kind):
        _, _, model = build(kind)
        continuous = handlers.block(model, hide=["k"]) if kind.has_discrete else model
        return model, guide_class(continuous, **options)

    return make


def parts(of_local, of_rest, *, expose=False):
    """A list of a guide for `z` and one for the rest."""

    def make(kind):
        _, _, model = build(kind)
        rest = ["mu", "w"] if kind.has_global else ["w"]
        guide = AutoGuideList(handlers.block(model, hide=["k"]))
        for part, names, others in ((of_rest, rest, ["z"]), (of_local, ["z"], rest)):
            block = {"expose": names} if expose else {"hide": [*others, "k", "y"]}
            guide.append(part(handlers.block(model, **block), prefix=part.__name__))
        return model, guide

    return make


def semi_dais(*, local_guide=False, **options):
    def make(kind):
        global_part, local_part, model = build(kind)

        def guide_of_local(arguments):
            with numpyro.plate("n", N, subsample_size=arguments[1]):
                for name, family in (("w", dist.Normal), ("z", dist.LogNormal)):
                    loc = numpyro.param(f"{name}_loc", jnp.zeros(N), event_dim=0)
                    numpyro.sample(name, family(loc, 0.5))

        if not kind.has_global:
            local = (lambda size: guide_of_local((0.0, size))) if local_guide else None
            return model, AutoSemiDAIS(model, model, None, local, **options)
        local = guide_of_local if local_guide else None
        of_global = AutoNormal(global_part)
        guide = AutoSemiDAIS(model, local_part, of_global, local, **options)
        return model, guide

    return make


def surrogate_dais(kind):
    _, _, model = build(kind)

    def surrogate_model():
        omega = numpyro.param(
            "omega", jnp.ones(N), constraint=dist.constraints.positive
        )
        with handlers.scale(scale=omega):
            model(N)

    return model, AutoSurrogateLikelihoodDAIS(model, surrogate_model, K=2)


def name_of(guide_class):
    return f"`{guide_class.__name__}`"


JOINT = [
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoBNAFNormal,
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoDAIS,
]
# What takes long to compile, in its smallest form.
SMALL = {
    autoguide.AutoIAFNormal: {"num_flows": 1},
    autoguide.AutoBNAFNormal: {"hidden_factors": [2]},
    autoguide.AutoDAIS: {"K": 2},
}
BATCHED = [
    autoguide.AutoBatchedMultivariateNormal,
    autoguide.AutoBatchedLowRankMultivariateNormal,
]
LISTS = {
    "`AutoGuideList` of `AutoNormal`, `AutoDelta`": parts(AutoDelta, AutoNormal),
    "`AutoGuideList` of joint guides": parts(
        AutoMultivariateNormal, AutoDiagonalNormal
    ),
    "`AutoGuideList`, parts made with `block(expose=...)`": parts(
        AutoNormal, AutoDelta, expose=True
    ),
}
GUIDES = (
    {name_of(cls): whole(cls) for cls in (AutoNormal, AutoDelta)}
    | LISTS
    | {name_of(cls): whole(cls, **SMALL.get(cls, {})) for cls in JOINT}
    | {name_of(cls): whole(cls, batch_ndim=1) for cls in BATCHED}
    | {
        "`AutoSemiDAIS`": semi_dais(K=2),
        "`AutoSemiDAIS`, `use_global_dais_params`": semi_dais(
            K=2, use_global_dais_params=True
        ),
        "`AutoSemiDAIS`, local guide": semi_dais(K=2, local_guide=True),
        "`AutoSurrogateLikelihoodDAIS`": surrogate_dais,
    }
)

RULED_OUT = {
    "a": (
        "NumPyro's `TraceEnum_ELBO` does not support this guide",
        "TraceEnum_ELBO does not support .* with local latents",
    ),
    "b": (
        "A joint guide has no density per row, which `RenyiELBO` needs",
        "RenyiELBO takes its bound row by row",
    ),
    "c": (
        "With a local guide, NumPyro's `RenyiELBO` exceeds the log evidence",
        "RenyiELBO then exceeds the log evidence",
    ),
}


def ruled_out(guide, objective):
    """The key into `RULED_OUT` of a pair that NumPyro has no way to do, or None."""
    mean_field = guide in (name_of(AutoNormal), name_of(AutoDelta))
    factorised = mean_field or guide in list(LISTS)[::2]
    semi = guide.startswith("`AutoSemiDAIS`")
    if objective == "TraceEnum_ELBO" and not factorised:
        return "a"
    if objective == "RenyiELBO" and not (factorised or semi):
        return "b"
    if objective == "RenyiELBO" and guide.endswith("local guide"):
        return "c"
    return None


def kind_of(guide, objective):
    """The model that shows the pair: RenyiELBO and batched guides need one plate."""
    return Kind(
        has_global=objective != "RenyiELBO" and "Batched" not in guide,
        has_discrete=objective == "TraceEnum_ELBO" and not ruled_out(guide, objective),
    )


def markdown():
    """Guides with the same marks share a row."""
    marks = {}
    for guide in GUIDES:
        reasons = [ruled_out(guide, objective) for objective in OBJECTIVES]
        own = tuple("✓" if reason is None else f"({reason})" for reason in reasons)
        marks.setdefault(own, []).append(guide)
    rows = [["Guide", *(f"`{name}`" for name in OBJECTIVES)], ["---"] * 6]
    rows += [["; ".join(guides), *own] for own, guides in marks.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- ({key}) {reason}." for key, (reason, _) in RULED_OUT.items()]
    return "\n".join([*lines, "", *notes])


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


if __name__ == "__main__":
    print(markdown())
