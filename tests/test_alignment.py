"""Ways to train latents of some rows on data of others, and what comes of each.

``python tests/test_alignment.py`` prints the table that ``tests/README.md`` has.
"""

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
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoDelta

from checks import told
from models import (
    TRUTH,
    N,
    guide_list,
    indexing,
    pinned_plate,
    plate,
    sliced,
    sliced_and_pinned,
    two_latents,
)
from numpyro_dynamic_subsample import (
    MisalignedSubsampleWarning,
    SubsampleSVI,
    UnscaledSubsampleWarning,
    dynamic_subsample,
)

B = 4
STEPS = 60


class Way(NamedTuple):
    how: str
    numpyro: str
    here: str


WRONG = "silently wrong"
RIGHT = "right"

WAYS = {
    "no pin": Way(
        "A batch arrives already sliced, and nobody pins its rows",
        WRONG,
        "`MisalignedSubsampleWarning`",
    ),
    "list": Way("The parts of an `AutoGuideList` draw rows of their own", WRONG, RIGHT),
    "pin on one side": Way(
        "The rows are pinned in `SVI`'s model, but not in the guide's",
        WRONG,
        "an error; `MisalignedSubsampleWarning` where only the guide is wrapped",
    ),
    "shuffled": Way(
        "A shuffled batch covers the whole plate, and its rows are pinned", WRONG, RIGHT
    ),
    "wrong name": Way(
        "The pin names another plate",
        WRONG,
        "`MisalignedSubsampleWarning`; an error of `SubsampleSVI`",
    ),
    "duplicates": Way("A batch holds rows twice", RIGHT, RIGHT),
    "stale": Way(
        "The rows are pinned around a compiled step, which keeps the first batch's",
        WRONG,
        "right with `SubsampleSVI`, where they are arguments of the step",
    ),
    "enumeration": Way(
        "`TraceEnum_ELBO` with rows that the plate draws",
        WRONG,
        "right in the context and with `SubsampleSVI`; `MisalignedSubsampleWarning` "
        "where only the guide is wrapped",
    ),
    "predictive": Way(
        "`Predictive`, with a guide or samples of all rows, and rows that the plate "
        "draws",
        WRONG,
        "`MisalignedSubsampleWarning` in the context",
    ),
    "parameters": Way(
        "A shuffled batch covers the whole plate, and the model has parameters with "
        "`event_dim` or `numpyro.subsample` there",
        WRONG,
        "right in the context and with `SubsampleSVI`; an error where only the guide "
        "is wrapped",
    ),
    "members": Way(
        "The data of groups in a subsampled plate have no scale",
        WRONG,
        "`UnscaledSubsampleWarning`",
    ),
    "range": Way(
        "Rows or counts are out of range",
        "NaN, or silently wrong",
        "an error where they are known, NaN in compiled steps of `SubsampleSVI`",
    ),
}


def test_pages_show_these_ways():
    folder, table = Path(__file__).parent, markdown()
    assert table in (folder / "README.md").read_text()
    shown = (folder.parent / "README.md").read_text().split("| NumPyro alone |")[1]
    rows = [line for line in shown.split("\n\n")[0].splitlines() if " | " in line]
    assert len(rows) > 2 and set(rows) - {rows[0]} <= set(table.splitlines())


def markdown():
    rows = [["What is done", "NumPyro alone", "Here"], ["---"] * 3, *WAYS.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def halves(rng):
    return rng.permutation(N)[:B]


def halves_and_all(rng):
    return rng.permutation(N)[: rng.choice([B, N])]


def with_duplicates(rng):
    return rng.integers(N, size=B)


def pinning(x, rows):
    return (told(x, rows, rows={"n": rows}),)


def train(
    svi, draw=halves, around=lambda rows: nullcontext(), batched=lambda *batch: batch
):
    """Train in one jitted step, and return the latents' parameters."""
    rng = np.random.default_rng(0)
    update = jax.jit(svi.update)
    state = None
    for _ in range(STEPS):
        rows = jnp.asarray(draw(rng))
        batch = batched(TRUTH[rows], rows)
        with around(rows):
            if state is None:
                state = svi.init(jax.random.key(0), *batch)
            state, _ = update(state, *batch)
    return svi.get_params(state)


def svi_of(model, guide, loss=None, svi_class=SVI):
    # With these steps half of a latent's error goes each time that it is in a batch.
    return svi_class(model, guide, optax.sgd(0.25), loss or Trace_ELBO())


def error(params, name="z_auto_loc", truth=TRUTH):
    return float(jnp.abs(params[name] - truth / 1.01).max())


def is_wrong(latents_error):
    return latents_error > 0.5


def is_right(latents_error):
    return latents_error < 0.1


def by_hand(model, make=plate):
    return AutoDelta(model, create_plates=make)


def init(svi, x=TRUTH[:B], rows=None, **keywords):
    rows = jnp.arange(len(x)) if rows is None else rows
    return svi.init(jax.random.key(0), x, rows, **keywords)


def warned():
    return pytest.warns(MisalignedSubsampleWarning)


def test_no_pin():
    assert is_wrong(error(train(svi_of(sliced, by_hand(sliced)))))
    with warned():
        init(svi_of(sliced, dynamic_subsample(AutoDelta(sliced))))
    with warned(), dynamic_subsample():
        init(svi_of(sliced, AutoDelta(sliced)))
    with warned():
        init(svi_of(sliced, AutoDelta(sliced), svi_class=SubsampleSVI))


def two_parts(**options):
    parts = {"a y_a": AutoDelta, "z y_z": AutoDelta}
    return guide_list(two_latents, parts, **options)


def test_list():
    alone = train(svi_of(two_latents, two_parts(create_plates=plate)))
    assert is_wrong(error(alone, "a_auto_loc"))
    here = train(svi_of(two_latents, dynamic_subsample(two_parts())))
    assert is_right(error(here, "a_auto_loc"))
    assert is_right(error(here, "z_auto_loc", -TRUTH))


def test_pin_on_one_side():
    assert is_wrong(error(train(svi_of(sliced_and_pinned, by_hand(sliced)))))
    with warned():
        init(svi_of(sliced_and_pinned, dynamic_subsample(AutoDelta(sliced))))
    # The guide's own model is in order, so that only the two together show it.
    svi = svi_of(sliced_and_pinned, AutoDelta(indexing))
    pins = r"pins rows \[7 6 5 4\] of plate 'n' \(size 8\), but the guide .* took \["
    with pytest.raises(ValueError, match=pins), dynamic_subsample():
        init(svi, rows=jnp.arange(N)[::-1][:B])
    with pytest.raises(ValueError, match="pins rows .*arguments of the compiled"):
        with dynamic_subsample():
            jax.jit(lambda rows: init(svi, rows=rows))(jnp.arange(B))
    guide = dynamic_subsample(AutoDelta(sliced), model=sliced_and_pinned)
    assert is_right(error(train(svi_of(sliced_and_pinned, guide))))


def test_shuffled():
    def of(guide):
        return error(train(svi_of(sliced_and_pinned, guide), halves_and_all))

    assert is_wrong(of(by_hand(sliced_and_pinned, pinned_plate)))
    assert is_right(of(dynamic_subsample(AutoDelta(sliced_and_pinned))))


def test_wrong_name():
    def pin(rows):
        return handlers.substitute(data={"rows": rows})

    assert is_wrong(error(train(svi_of(sliced, by_hand(sliced)), around=pin)))
    with warned(), pin(jnp.arange(B)):
        init(svi_of(sliced, dynamic_subsample(AutoDelta(sliced))))
    with pytest.raises(ValueError, match="names a plate 'rows' that the model does"):
        svi = svi_of(sliced, AutoDelta(sliced), svi_class=SubsampleSVI)
        batch = told(TRUTH[:B], None, rows={"rows": jnp.arange(B)})
        svi.init(jax.random.key(0), batch)


def test_duplicates():
    by_hand_pinned = by_hand(sliced_and_pinned, pinned_plate)
    alone = train(svi_of(sliced_and_pinned, by_hand_pinned), with_duplicates)
    assert is_right(error(alone))
    svi = svi_of(sliced, AutoDelta(sliced), svi_class=SubsampleSVI)
    assert is_right(error(train(svi, with_duplicates, batched=pinning)))


def test_stale():
    def pin(rows):
        return handlers.substitute(data={"n": rows})

    assert is_wrong(error(train(svi_of(sliced, by_hand(sliced)), around=pin)))
    svi = svi_of(sliced, AutoDelta(sliced), svi_class=SubsampleSVI)
    assert is_right(error(train(svi, batched=pinning)))


def test_enumeration():
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert is_wrong(error(train(svi_of(indexing, AutoDelta(indexing), loss))))
    with warned() as given:
        svi = svi_of(indexing, dynamic_subsample(AutoDelta(indexing)), loss)
        state = init(svi)
        jax.eval_shape(svi.update, state, TRUTH[:B], jnp.arange(B))
        jax.eval_shape(svi.update, state, TRUTH[:B], jnp.arange(B))
    assert len(given) == 1
    assert "TraceEnum_ELBO lets the model draw" in str(given[0].message)
    with dynamic_subsample():
        here = train(svi_of(indexing, AutoDelta(indexing), loss))
    assert is_right(error(here))
    svi = svi_of(indexing, AutoDelta(indexing), loss, SubsampleSVI)
    assert is_right(error(train(svi)))


def test_predictive():
    def gap(guide, rows):
        init(svi_of(indexing, guide))
        params = {"z_auto_loc": TRUTH}
        with handlers.substitute(data={} if rows is None else {"n": rows}):
            predictive = Predictive(indexing, guide=guide, params=params, num_samples=2)
            drawn = predictive(jax.random.key(0), TRUTH[:B], None)
        return jnp.abs(drawn["gap"]).max()

    assert is_wrong(gap(by_hand(indexing), None))
    with warned() as given, dynamic_subsample():
        gap(AutoDelta(indexing), None)
    assert "Predictive lets the model" in str(given[0].message)
    assert is_right(
        gap(dynamic_subsample(AutoDelta(indexing)), jnp.array([7, 1, 0, 2]))
    )


def with_parameters(x, rows):
    with pinned_plate(x, rows):
        loc = numpyro.param("loc", TRUTH, event_dim=0)
        numpyro.sample("y", dist.Normal(loc, 1), obs=x)


def test_parameters():
    rows = jnp.arange(N)[::-1]
    key, exact = jax.random.key(0), N * 0.5 * np.log(2 * np.pi)

    def loss(guide=lambda x, rows: None):
        args = (key, {}, with_parameters, guide, TRUTH[rows], rows)
        return float(Trace_ELBO().loss(*args))

    assert abs(loss() - exact) > 10
    with dynamic_subsample():
        assert loss() == pytest.approx(exact)
    wrapped = dynamic_subsample(lambda x, rows: None, model=with_parameters)
    with pytest.raises(ValueError, match="All 8 rows of plate 'n' are pinned"):
        loss(wrapped)


def test_members():
    """Of each of the groups in a batch, the sum of the squared errors counts once."""

    def members(x, rows):
        with pinned_plate(x, rows):
            z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=x)

    with pytest.warns(UnscaledSubsampleWarning, match="'y' depends on latents of plat"):
        init(svi_of(members, dynamic_subsample(AutoDelta(members))))


def test_range():
    svi = svi_of(sliced, AutoDelta(sliced), svi_class=SubsampleSVI)
    with pytest.raises(ValueError, match="run from 0 to 8, outside 0 to 7"):
        svi.init(jax.random.key(0), *pinning(TRUTH[:B], np.array([0, 8, 1, 2])))


def test_every_way_is_measured():
    assert {f"test_{name.replace(' ', '_')}" for name in WAYS} <= globals().keys()


if __name__ == "__main__":
    print(markdown())
