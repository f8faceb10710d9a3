"""Tell what makes a fit slow, or its validation blind; it goes on all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from numpyro.infer import TraceEnum_ELBO

from ..batches.minibatch import Minibatch
from ..effect import internals
from ..effect.guides import autoguides_in
from ..effect.warn import warn


def warn_of_untrained_rows(
    guide: Callable,
    trained: Iterable[Mapping[str, Any]],
    held_out: Iterable[Mapping[str, Any]],
) -> None:
    """Warn if the guide has parameters for rows, and no row of a validation is trained.

    Parameters
    ----------
    guide : callable
        The guide.
    trained, held_out : iterable of dict
        The rows of each batch, by plate.
    """
    local = {plate for part in autoguides_in(guide) for plate in internals.frames(part)}
    ours, theirs = map(_rows_by_plate, (trained, held_out))
    for plate in sorted(local & ours.keys() & theirs.keys()):
        if not np.isin(theirs[plate], ours[plate]).any():
            warn(
                f"No row of plate '{plate}' in validation was trained in the first "
                "epoch, and the guide has parameters for each row. So their latents "
                "stay where they started, and the validation loss tells little. "
                "Validate on rows that are trained, too, or use a guide that computes "
                "latents from the data.",
                UserWarning,
            )


def _rows_by_plate(batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    found: dict[str, list[Any]] = {}
    for rows in batches:
        for plate, own in rows.items():
            found.setdefault(plate, []).append(own)
    return {plate: np.concatenate(own) for plate, own in found.items()}


class Sizes:
    """Tells once of batches that let a step be compiled again and again.

    Parameters
    ----------
    loss : ELBO
        The objective.
    """

    def __init__(self, loss: Any) -> None:
        self._enumerates = isinstance(loss, TraceEnum_ELBO)
        self._seen: dict[str, set[int]] = {}
        self._shapes: list[Any] = []
        self._told = False

    def see(self, batch: Minibatch) -> None:
        """Note a batch whose shape may be new."""
        if self._told:
            return
        shape = jax.tree.structure(batch), [np.shape(x) for x in jax.tree.leaves(batch)]
        if shape in self._shapes:
            return
        self._shapes.append(shape)
        for plate, count in batch.counts.items():
            if plate not in batch.padded:
                self._seen.setdefault(plate, set()).add(int(count))
        ragged = {p: own for p, own in self._seen.items() if len(own) > 2}
        if (batch.rows and not ragged) or len(self._shapes) < 3:
            return
        self._told = True
        sizes = " and ".join(
            f"{', '.join(f'{n:,}' for n in sorted(own))} rows of plate '{plate}'"
            for plate, own in ragged.items()
        )
        capacity = {plate: max(own) for plate, own in ragged.items()} or "..."
        remedy = (
            f"Give all of them the same: minibatch(..., rows=..., capacity={capacity}),"
            " with the largest counts that there are."
        )
        if self._enumerates:
            remedy += (
                " Where TraceEnum_ELBO enumerates a site of the model in the plate, "
                "which cannot be padded, cut batches of few sizes."
            )
        warn(
            f"fit has compiled the step for {len(self._shapes)} shapes of batch"
            f"{sizes and ', with ' + sizes}. Each new one takes as long again. "
            f"{remedy}",
            UserWarning,
        )
