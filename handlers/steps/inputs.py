"""What predictions are given: parameters, posteriors of guides, and batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.infer.svi import SVIState

from ..batches.minibatch import Minibatch, as_minibatch
from ..effect.dynamic_subsample import dynamic_subsample
from ..effect.guides import autoguides_in

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI


def params_of(svi: SubsampleSVI, fitted: Any) -> dict[str, Any]:
    """Return parameters and mutable state of whatever a fit has returned."""
    state = fitted if isinstance(fitted, SVIState) else getattr(fitted, "state", None)
    params = fitted
    if isinstance(state, SVIState):
        params = getattr(fitted, "params", None) or svi.get_params(state)
        params = params | (state.mutable_state or {})
    if not isinstance(params, Mapping):
        raise ValueError(
            "The second argument must be what fit or run has returned, a state, or a "
            f"dict of parameters, not {type(fitted).__name__}."
        )
    return jax.tree.map(jnp.asarray, dict(params))


def missing_params(names: Iterable[str]) -> ValueError:
    """Say that parameters are missing."""
    return ValueError(
        f"The parameters lack {sorted(names)}, which guide or model have. Give what "
        "fit or run has returned, a state, or parameters as get_params returns them "
        "(these lack mutable state)."
    )


def posteriors_of(svi: SubsampleSVI, params: dict[str, Any]) -> list[Any]:
    """Return the posteriors of the guides that are called for their mode alone."""
    posteriors = []
    for part in autoguides_in(svi.guide):
        if part.prototype_trace is None:
            raise ValueError(
                f"The {type(part).__name__} has not met its model yet. Call "
                "svi.init(rng_key, batch) first."
            )
    for part in called_for_mode(svi.guide):
        try:
            with dynamic_subsample():
                posteriors.append(part.get_posterior(params))
        except KeyError as error:
            raise missing_params(error.args) from error
    return posteriors


def called_for_mode(guide: Any) -> list[AutoLaplaceApproximation]:
    """Return the parts of a guide whose posterior is not what a call draws from."""
    parts = autoguides_in(guide)
    return [part for part in parts if isinstance(part, AutoLaplaceApproximation)]


def on_batch(svi: SubsampleSVI, rows: dict[str, jax.Array]) -> Any:
    """Return what holds the rows of a batch while guide and model run."""
    return svi._on(Minibatch((), {}, rows, {}, padded=()))


class Given(NamedTuple):
    """The arrays that a compiled program is given."""

    params: dict[str, Any]
    posteriors: list[Any]
    number: np.uint32 | jax.Array  # of the batch
    leaves: list[jax.Array | None]  # of the model's arguments
    rows: dict[str, jax.Array]
    first: dict[str, jax.Array]  # for each row, where it is met first in the batch


_ARRAYS = np.ndarray | np.generic | jax.Array
_CONSTANTS = bool | int | float | complex | str | bytes


class Batch:
    """A batch, its arrays apart from all else."""

    def __init__(self, svi: SubsampleSVI, item: Any, unseen: Collection[str]) -> None:
        batch = as_minibatch(item)
        rows, counts = batch.pinned, batch.valid
        arguments = batch.args, batch.kwargs | svi.static_kwargs
        leaves, self.structure = jax.tree.flatten(arguments)
        self.constants = [None if isinstance(a, _ARRAYS) else a for a in leaves]
        self.leaves = [_array(a) if isinstance(a, _ARRAYS) else None for a in leaves]
        self.known = {name: np.asarray(own) for name, own in rows.items()}
        self.known = {n: own for n, own in self.known.items() if n not in unseen}
        self.rows = {name: _array(rows[name]) for name in self.known}
        self.counts = {name: int(count) for name, count in counts.items()}
        self.lengths = {name: int(count) for name, count in batch.counts.items()}
        for name in self.counts.keys() & {*unseen}:
            # The number of rows with padding is nowhere in the batch.
            self.lengths.pop(name)
        self.named = {*batch.rows, *counts}
        self.plates = {*batch.rows, *batch.counts, *rows, *counts, *unseen}
        self.says_plates = bool(batch.rows or batch.counts)
        self.first = {}
        for name, own in self.known.items():
            count = self.counts.get(name, len(own))
            _, index, inverse = np.unique(
                own[:count], return_index=True, return_inverse=True
            )
            if len(index) < count:
                padding = np.arange(count, len(own))
                first = np.concatenate([index[inverse], padding])
                self.first[name] = _array(first)

    def arguments(self, leaves: list[jax.Array | None]) -> tuple[tuple, dict]:
        given = zip(leaves, self.constants, strict=True)
        merged = [constant if leaf is None else leaf for leaf, constant in given]
        return jax.tree.unflatten(self.structure, merged)

    def is_like(self, other: Batch) -> bool:
        """Tell whether two batches differ in the values of their arrays only."""
        return (
            self.structure == other.structure
            and self.plates == other.plates
            and self.says_plates == other.says_plates
            and all(map(_same, self.constants, other.constants))
        )


def _array(array: Any) -> Any:
    """Give an array the type that JAX would."""
    # To make it JAX's own array takes as long as the draws of some rows.
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _same(one: Any, other: Any) -> bool:
    known = type(one) is type(other) and isinstance(one, _CONSTANTS)
    return one is other or (known and one == other)
