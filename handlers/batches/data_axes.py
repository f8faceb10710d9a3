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
        value, fn = msg["value"], msg["fn"]
        for plate, axis in self._axes.get(id(value), ()):
            ndim = value.ndim - fn.event_dim
            dims = [f.dim for f in msg["cond_indep_stack"] if f.name == plate]
            if axis - ndim in dims:
                continue
            if dims:
                why = (
                    f"but in the model the plate stands at dim {dims[0]}, which is "
                    f"axis {ndim + dims[0]}. Give the plate dim={axis - ndim}, or the "
                    "data the other order of axes."
                )
            elif plate in self._padded and type(fn) is not MaskedDistribution:
                why = (
                    "but the site stands outside of that plate, where the padding "
                    "would count as data. Sample it in the plate; or name its own "
                    "plate in rows and along; or give batches without a capacity."
                )
            else:
                # Without padding, nothing counts too much; a mask may leave it out.
                continue
            raise ValueError(
                f"Site '{msg['name']}' has an argument of the batch as its data, of "
                f"shape {value.shape}, which runs along plate '{plate}' with axis "
                f"{axis}, {why}"
            )
