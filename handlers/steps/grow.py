"""Add the new rows of plates to a state, and to its guide."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten
from numpyro.infer import SVI
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuide,
    AutoNormal,
)
from numpyro.infer.initialization import init_to_value
from numpyro.infer.svi import SVIState

from ..effect import internals
from ..effect.first_call import evaluates_first_data
from ..effect.guides import autoguides_in, joint_over
from ..effect.internals import undone_on_error
from ..effect.reading import read_plates
from ..effect.rows import check_size
from .optimizers import axes_of_leaves
from .rowwise import RowAxes

# A step splits the same key into a few; this number gives another one.
_KEY_OF_NEW_ROWS = 2**30


def grown(svi: SVI, state: SVIState, args: tuple, kwargs: dict[str, Any]) -> SVIState:
    """Return a grown state; ``SubsampleSVI.grow`` documents it.

    It runs within the handlers of a step.
    """
    plates = read_plates(
        svi.model, args, kwargs | svi.static_kwargs, internals.handlers_around()
    )
    sizes = {name: plate.size for name, plate in plates.items()}
    with ExitStack() as stack:
        stack.enter_context(undone_on_error(svi))
        before = {}
        for part in list(autoguides_in(svi.guide)):
            stack.enter_context(undone_on_error(part))
            if not _has_grown(part, sizes):
                continue
            known = _values_of_all_rows(part, sizes)
            if known is not None:
                init_loc_fn = init_to_value(values=known)
                stack.enter_context(internals.replaced(part, init_loc_fn=init_loc_fn))
            if isinstance(part, AutoNormal | AutoDelta):
                before[part] = internals.initial_values(part)
            internals.forget_first_call(part)
        key = jax.random.fold_in(state.rng_key, _KEY_OF_NEW_ROWS)
        with RowAxes(every_plate=True) as found:
            fresh = SVI.init(svi, key, *args, **kwargs)
        optim_state = _with_old_rows(svi, fresh.optim_state, state.optim_state, found)
        for part, values in before.items():
            initial = internals.initial_values(part)
            initial |= {name: _over(initial[name], old) for name, old in values.items()}
    return state._replace(optim_state=optim_state)


def _has_grown(guide: AutoGuide, sizes: Mapping[str, int]) -> bool:
    """Tell whether plates of a guide's latents have grown, and refuse if it cannot."""
    # Plates without latents may have another size in each batch.
    of_latents = set(internals.frames(guide))
    known = internals.full_sizes(guide).items()
    changed = {name: old for name, old in known if sizes.get(name, old) != old}
    for name, old in changed.items():
        size = sizes[name]
        if size < old and name in of_latents:
            check_size(name, size, old)
        if joint_over(guide, name) is guide:
            what = "is one joint distribution over all rows"
        elif evaluates_first_data(guide) and size > old:
            what = "evaluates the data of its first call, which has all rows"
        else:
            continue
        raise ValueError(
            f"{type(guide).__name__} {what} of plate '{name}' (size {old}), so it "
            f"cannot grow to {size} rows. Fit a new guide, or use AutoNormal, whose "
            "rows are apart."
        )
    # A joint guide over other plates, or over none, has no parameters with new rows.
    return bool(changed.keys() & of_latents) and not isinstance(guide, AutoContinuous)


def _values_of_all_rows(
    guide: AutoGuide, sizes: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return the values of ``init_to_value`` that are of all rows, None without it."""
    init_loc_fn: Any = guide.init_loc_fn
    prototype: Any = guide.prototype_trace
    if getattr(init_loc_fn, "func", None) is not init_to_value:
        return None

    def of_all_rows(name: str, value: Any) -> bool:
        shape = jnp.shape(value)
        site = prototype.get(name, {"cond_indep_stack": []})
        lengths = {
            frame.name: shape[frame.dim - site["fn"].event_dim]
            for frame in site["cond_indep_stack"]
            if len(shape) >= site["fn"].event_dim - frame.dim
        }
        return all(length in (1, sizes[name]) for name, length in lengths.items())

    values = init_loc_fn.keywords.get("values", {})
    return {name: value for name, value in values.items() if of_all_rows(name, value)}


def _with_old_rows(svi: SVI, fresh: Any, old: Any, found: RowAxes) -> Any:
    """Copy the old rows of an optimizer's state into a fresh state."""
    if jax.tree.structure(fresh) != jax.tree.structure(old):
        raise ValueError(
            "Model and guide have other parameters than in the state that is to grow: "
            f"{sorted(svi.optim.get_params(fresh))} instead of "
            f"{sorted(svi.optim.get_params(old))}. Build a new guide and call svi.init."
        )
    old_params = svi.optim.get_params(old)
    sizes, old_sizes = {}, {}
    for name, axes in found.axes.items():
        for plate, axis in axes.items():
            rows = old_sizes.setdefault(plate, old_params[name].shape[axis])
            sizes[plate] = found.sizes[plate]
            if rows > sizes[plate]:
                check_size(plate, sizes[plate], rows)
    leaf_axes = axes_of_leaves(svi.optim, fresh, found.axes, sizes, old_sizes)
    leaves, structure = tree_flatten_with_path(fresh)
    grown = []
    for (path, new), axes, own in zip(
        leaves, leaf_axes, jax.tree.leaves(old), strict=True
    ):
        expected = list(jnp.shape(new))
        for plate, axis in axes.items():
            expected[axis] = old_sizes[plate]
        if list(jnp.shape(own)) != expected:
            raise ValueError(
                f"The optimizer's state at {keystr(path)} has shape {jnp.shape(own)}, "
                f"and {jnp.shape(new)} after growing. Plates that grow from "
                f"{old_sizes} to {sizes} rows do not explain this. A parameter with "
                "rows must be read in its plate, with event_dim."
            )
        grown.append(_over(new, own))
    return tree_unflatten(structure, grown)


def _over(new: Any, old: Any) -> Any:
    """Copy an old array into the leading rows of a new one."""
    if jnp.shape(new) == jnp.shape(old):
        return old
    return jnp.asarray(new).at[tuple(map(slice, jnp.shape(old)))].set(old)
