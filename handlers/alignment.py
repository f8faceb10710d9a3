"""Decide which order a model's data have, and whether they follow a plate's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import substitute, trace
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import _PYRO_STACK, Messenger

from .plates import rehearsal


def joint_depends_on_rows(
    model: Callable, args: tuple, kwargs: dict[str, Any], name: str, rows: jax.Array
) -> bool:
    """Tell whether the log joint density depends on the rows that a plate takes.

    It is data flow in the jaxpr that decides, be it through indexing,
    ``numpyro.subsample`` or anything else.
    """

    def log_joint(rows: jax.Array) -> list[jax.Array]:
        with rehearsal(), trace() as sites, substitute(data={name: rows}):
            model(*args, **kwargs)
        return [
            jnp.sum(site["fn"].log_prob(site["value"]))
            for site in sites.values()
            if site["type"] == "sample"
        ]

    return any(eval_provenance(log_joint, rows=rows))


class _GatheringWatcher(Messenger):
    """Notes which primitives leave it to a plate to take their rows."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.seen: set[str] = set()

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("subsample", "param"):
            return
        event_dim = msg["kwargs"].get("event_dim")
        if event_dim is None:
            return
        shape = jnp.shape(msg["value"])
        # A message of `subsample` does not say which plates it stands in.
        for handler in _PYRO_STACK:
            if getattr(handler, "name", None) == self._name:
                axis = getattr(handler, "dim", 0) - event_dim
                if axis < 0 and len(shape) >= -axis and shape[axis] != 1:
                    self.seen.add(msg["type"])


def keeps_rows_in_order(
    model: Callable, args: tuple, kwargs: dict[str, Any], name: str, rows: jax.Array
) -> bool:
    """Tell whether a model ignores the order in which all rows of a plate are pinned.

    NumPyro gathers the rows of ``numpyro.subsample`` and of parameters only in a
    plate that takes fewer rows than it has, so with all rows pinned these stay in
    order. Data that the model indexes, or gets already sliced, are in the pinned one.

    Raises
    ------
    ValueError
        If the model does both.
    """
    watcher = _GatheringWatcher(name)
    with rehearsal(), watcher:
        model(*args, **kwargs)
    if not watcher.seen:
        return False
    if watcher.seen == {"param"} or joint_depends_on_rows(
        model, args, kwargs, name, rows
    ):
        raise ValueError(
            f"All {rows.shape[0]} rows of plate '{name}' are pinned in an order of "
            "their own. NumPyro then leaves numpyro.subsample and parameters with "
            "event_dim in the original order, while other data of the model are in "
            "the pinned one, and they cannot be lined up. Index data and parameters "
            f"with the plate's indices instead: with numpyro.plate('{name}', ...) as "
            "idx: x[idx]."
        )
    return True
