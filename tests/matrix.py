"""Which guide works with which objective: the table that is tested and shown.

``python tests/matrix.py`` prints the table that ``tests/README.md`` has.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import (
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

from models import N, X

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


if __name__ == "__main__":
    print(markdown())
