"""Mask the padded rows of plates, so that only the others count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.distributions import MaskedDistribution

from ..effect import internals
from ..effect.internals import CondIndepStackFrame, Handler, Tracer


class mask_padding(Handler):
    """Mask the padded rows of plates, and rescale the rest.

    While this handler is active, each sample site in such a plate, of guide and model
    alike, has its log density masked to the valid rows, and where the plate
    subsamples, scaled by its full size over their number: loss and gradients are
    those of a batch that holds nothing else.

    Parameters
    ----------
    counts : dict of str to int
        For each plate, how many of its rows, the first ones, are valid: scalars of an
        integer type, traced or concrete. Plates that are not named are left alone.

    Attributes
    ----------
    capacities : dict of str to int
        How many rows each plate takes, padding included.

    Raises
    ------
    ValueError
        If a count is not an integer scalar, or is concrete and not between 1 and the
        number of rows that the plate takes; if no plate of that name is met; if a
        latent site stands in the plate in the model but not in the guide, or the
        reverse; if a site that ``TraceEnum_ELBO`` enumerates in the model, or whose
        KL divergence it takes analytically, stands in a subsampled plate with a
        traced count.

    Notes
    -----
    Padded observations may hold anything, NaN too: they are replaced by the first
    row's. All else that the model reads must be finite in padded rows, best a copy of
    a real row, because in a gradient zero times NaN is NaN. What model or guide
    compute across rows by themselves, as the mean of a batch, includes the padded ones.

    Two values are wrong inside this handler: that of ``RenyiELBO``, which takes the
    scale of a plate apart from its sites, and that of an ``AutoSemiDAIS`` with a
    ``local_guide``, whose density it sums over all rows. Any ``AutoSemiDAIS`` runs its
    local model where this handler does not reach, on observations that must be real in
    all rows.
    """

    def __init__(self, counts: Mapping[str, ArrayLike]) -> None:
        super().__init__()
        for name, count in counts.items():
            dtype = jnp.result_type(count)
            if np.ndim(count) != 0 or not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(
                    f"The valid count of plate '{name}' must be an integer scalar, but "
                    f"has shape {np.shape(count)} and type {dtype}."
                )
        self.counts = dict(counts)
        self.capacities: dict[str, int] = {}
        self.subsamples: dict[str, bool] = {}

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            check_names("The batch", self.counts, self.subsamples)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self.subsamples[msg["name"]] = msg["args"][1] is not None
        elif msg["type"] == "sample":
            frames = [f for f in msg["cond_indep_stack"] if f.name in self.counts]
            replayed = internals.replayed()
            guide_trace = None if replayed is None else replayed.trace
            self._check_guide_site(msg, frames, guide_trace)
            if frames:
                self._count_valid_rows(msg, frames, guide_trace)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and not internals.is_default(
            msg["value"], msg["args"][0]
        ):
            # Rows that are pinned are a subsample, too, where no size is asked for.
            self.subsamples[msg["name"]] = True

    def _count_valid_rows(
        self,
        msg: dict[str, Any],
        frames: list[CondIndepStackFrame],
        guide_trace: dict[str, Any] | None,
    ) -> None:
        mask: Any = True
        for name, dim, capacity in frames:
            self.capacities[name] = capacity
            count = self._count(name, capacity)
            valid = jnp.arange(capacity) < count
            mask = mask & _on_axis(valid, dim, len(msg["fn"].batch_shape))
            if msg["is_observed"]:
                axis = dim - len(msg["fn"].event_shape)
                msg["value"] = _repeat_first_row(msg["value"], valid, axis)
            if not self.subsamples[name]:
                continue
            if isinstance(count, Tracer):
                _check_scale_may_be_traced(msg, name, capacity, guide_trace)
            scale = 1.0 if msg["scale"] is None else msg["scale"]
            # A Python float divided by an integer leaves the log density its dtype.
            with jax.numpy_dtype_promotion("standard"):
                msg["scale"] = scale * (float(capacity) / count)
        msg["fn"] = _ValidRowsDistribution(msg["fn"], mask)

    def _count(self, name: str, capacity: int) -> Any:
        if name not in self.subsamples:
            raise ValueError(
                f"Plate '{name}' ({capacity} rows) is made where valid counts cannot "
                "see it. Make it inside the model, and outside of the body of a scan; "
                "it can be entered in there."
            )
        count = self.counts[name]
        if isinstance(count, Tracer):
            return count
        count = int(count)  # ty: ignore[invalid-argument-type]
        check_count(name, count, capacity)
        return count

    def _check_guide_site(
        self,
        msg: dict[str, Any],
        frames: list[CondIndepStackFrame],
        guide_trace: dict[str, Any] | None,
    ) -> None:
        name = msg["name"]
        if guide_trace is None or name not in guide_trace or msg["is_observed"]:
            return
        of_guide = {f.name for f in guide_trace[name]["cond_indep_stack"]}
        of_model = {f.name for f in frames}
        for plate in sorted(of_model ^ (of_guide & self.counts.keys())):
            inside, outside = "model", "guide"
            if plate in of_guide:
                inside, outside = outside, inside
            raise ValueError(
                f"Site '{name}' stands in plate '{plate}' (valid count "
                f"{self.counts[plate]}) in the {inside}, but outside of it in the "
                f"{outside}, where padded rows would count. Sample it inside the plate "
                "in both, or leave the count out and give batches without padding."
            )


class _ValidRowsDistribution(MaskedDistribution):
    """A masked distribution that can still use its intermediates.

    Flows without an inverse need them for their log density.
    """

    def sample_with_intermediates(
        self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[ArrayLike, list[Any]]:
        return self.base_dist.sample_with_intermediates(key, sample_shape)

    def log_prob(
        self, value: ArrayLike, intermediates: list[Any] | None = None
    ) -> ArrayLike:
        if not intermediates:
            return super().log_prob(value)
        log_prob = self.base_dist.log_prob(value, intermediates)
        return jnp.where(self._mask, log_prob, 0.0)


def check_count(name: str, count: int, capacity: int) -> None:
    """Refuse a valid count that does not fit the rows that a plate takes."""
    if not 1 <= count <= capacity:
        raise ValueError(
            f"The valid count of plate '{name}' is {count}, but must be between 1 "
            f"and {capacity}, the rows that the plate takes. Skip a step that has "
            "no valid row, and pad larger batches to a larger capacity."
        )


def check_names(what: str, names: Iterable[str], plates: Iterable[str]) -> None:
    """Refuse names that are not among the model's plates; `what` gives them."""
    plates = sorted(plates)
    for name in sorted(set(names) - set(plates)):
        close = get_close_matches(name, plates, n=1)
        meant = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(
            f"{what} names a plate '{name}' that the model does not have; its "
            f"plates are {plates}.{meant}"
        )


def _on_axis(valid: jax.Array, axis: int, ndim: int) -> jax.Array:
    return valid.reshape((1,) * (ndim + axis) + (-1,) + (1,) * (-axis - 1))


def _repeat_first_row(value: ArrayLike, valid: jax.Array, axis: int) -> ArrayLike:
    shape = jnp.shape(value)
    if len(shape) < -axis or shape[axis] != valid.shape[0]:
        return value
    first = jax.lax.slice_in_dim(jnp.asarray(value), 0, 1, axis=axis % len(shape))
    return jnp.where(_on_axis(valid, axis, len(shape)), value, first)


def _check_scale_may_be_traced(
    msg: dict[str, Any],
    plate: str,
    capacity: int,
    guide_trace: dict[str, Any] | None,
) -> None:
    if guide_trace is None:
        return
    if msg["name"] not in guide_trace and msg.get("done"):
        what = "is enumerated in the model"
        remedy = "enumerate it in the guide"
    elif msg["infer"].get("kl") == "analytic" and internals.enumerating():
        what = "has an analytic KL divergence"
        remedy = "leave out infer={'kl': 'analytic'}"
    else:
        return
    raise ValueError(
        f"Site '{msg['name']}' in plate '{plate}' ({capacity} rows) {what}, for which "
        "TraceEnum_ELBO needs a scale that is known while it compiles, but the valid "
        f"count of '{plate}' is traced. Either {remedy}, or give batches of equal size "
        "without a count."
    )
