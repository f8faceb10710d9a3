"""Refuse data that stand elsewhere in the model than their batch says."""

from __future__ import annotations

from typing import Any

import jax
from numpyro.distributions import MaskedDistribution

from ..effect.internals import Handler
from .minibatch import Minibatch


class check_data_axes(Handler):
    """Compare where observed arguments of a batch stand with what they run along.

    An argument is known by its identity, so this goes for data that the model takes as
    they are, ``obs=y``.

    Parameters
    ----------
    batch : Minibatch
        The batch that the model is called with.

    Raises
    ------
    ValueError
        If data run along a plate with another axis than that at which the plate stands;
        padded to one number of rows, two plates would fit either way. If they run along
        a padded plate and stand outside of it, where the padding counts.
    """

    def __init__(self, batch: Minibatch) -> None:
        super().__init__()
        self._padded = batch.padded
        leaves = jax.tree.leaves((batch.args, batch.kwargs))
        pairs = zip(leaves, batch.axes, strict=True) if batch.axes else ()
        self._axes = {id(leaf): axes for leaf, axes in pairs if axes}
        self._leaves = leaves  # so that their identities last

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        axes = self._axes.get(id(msg["value"]), ())
        dims = {frame.name: frame.dim for frame in msg["cond_indep_stack"]}
        ndim = msg["value"].ndim - msg["fn"].event_dim if axes else 0
        for plate, axis in axes:
            where = (
                f"Site '{msg['name']}' has an argument of the batch as its data, of "
                f"shape {msg['value'].shape}, which runs along plate '{plate}' with "
                f"axis {axis}"
            )
            if plate not in dims:
                # A mask may leave the padding out.
                if plate in self._padded and type(msg["fn"]) is not MaskedDistribution:
                    raise ValueError(
                        f"{where}, but the site stands outside of that plate, where "
                        "the padding would count as data. Sample it in the plate; or "
                        "name its own plate in rows and along; or give batches without "
                        "a capacity."
                    )
            elif axis - ndim != dims[plate]:
                raise ValueError(
                    f"{where}, but in the model the plate stands at dim {dims[plate]}, "
                    f"which is axis {ndim + dims[plate]}. Give the plate "
                    f"dim={axis - ndim}, or the data the other order of axes."
                )
