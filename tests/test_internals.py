"""What this library uses of NumPyro's insides, by name."""

import jax
import numpyro
import pytest
from numpyro import handlers, infer, primitives
from numpyro.contrib.funsor import discrete, enum_messenger
from numpyro.infer import autoguide
from numpyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
    AutoSemiDAIS,
)
from numpyro.ops import provenance

import numpyro_dynamic_subsample
from models import N, initialised, local, one_latent
from numpyro_dynamic_subsample.effect import internals

OWNERS = {
    "primitives": lambda: primitives,
    "plate": lambda: primitives.plate,
    "a plate": lambda: primitives.plate("n", N),
    "funsor": lambda: enum_messenger,
    "optim": lambda: numpyro.optim,
    "provenance": lambda: provenance,
    "Predictive": lambda: infer.Predictive,
    "util": lambda: infer.util,
    "funsor discrete": lambda: discrete,
    "jax": lambda: jax.core,
    "autoguide": lambda: autoguide,
    "AutoNormal": lambda: initialised(AutoNormal(one_latent)),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal,
    "AutoGuideList": lambda: AutoGuideList(one_latent),
    "AutoSemiDAIS": lambda: initialised(AutoSemiDAIS(local, local)),
    "scope": lambda: handlers.scope(prefix="a"),
    "seed": lambda: handlers.seed(rng_seed=0),
    "replay": lambda: handlers.replay(trace={}),
    "do": lambda: handlers.do(data={}),
}
NAMES = [
    ("primitives", "_PYRO_STACK"),
    ("primitives", "CondIndepStackFrame"),
    ("plate", "_subsample"),
    ("plate", "postprocess_message"),
    ("a plate", "_indices"),
    ("funsor", "enum"),
    ("funsor", "plate"),
    ("optim", "_NumPyroOptim"),
    ("provenance", "eval_provenance"),
    ("Predictive", "__call__"),
    ("util", "find_valid_initial_params"),
    ("funsor discrete", "_sample_posterior"),
    ("jax", "eval_jaxpr"),
    ("AutoNormal", "prototype_trace"),
    ("AutoNormal", "_setup_prototype"),
    ("AutoNormal", "_prototype_frames"),
    ("AutoNormal", "_prototype_frame_full_sizes"),
    ("AutoNormal", "_init_locs"),
    ("AutoNormal", "_event_dims"),
    ("AutoNormal", "_postprocess_fn"),
    ("AutoDiagonalNormal", "_get_posterior"),
    ("AutoGuideList", "_guides"),
    ("AutoSemiDAIS", "_local_plate"),
    ("AutoSemiDAIS", "global_guide"),
    ("scope", "hide_types"),
    ("seed", "hide_types"),
    ("replay", "trace"),
    ("do", "_intervener_id"),
    ("do", "data"),
]


@pytest.mark.parametrize(("owner", "name"), NAMES)
def test_numpyro_still_has(owner, name):
    assert hasattr(OWNERS[owner](), name)


def test_funsors_plate_holds_its_rows():
    plate = enum_messenger.plate("n", N)
    assert internals.rows_of(plate).shape == (N,)


def test_public_names():
    assert sorted(numpyro_dynamic_subsample.__all__) == [
        "FitResult",
        "Minibatch",
        "MisalignedSubsampleWarning",
        "RaggedGroups",
        "SubsampleSVI",
        "UnscaledSubsampleWarning",
        "dynamic_subsample",
        "minibatch",
        "pin_rows",
    ]
