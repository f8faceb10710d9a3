"""SVI whose steps are told which rows a batch holds, and how many of them count."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.handlers import substitute
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO
from numpyro.infer.svi import SVIState

from .alignment import ScoreFunctionWatcher, keeps_rows_in_order
from .dynamic_subsample import dynamic_subsample
from .guide_call import GuideCall, check_rows
from .padding import check_names, valid_rows
from .plates import ModelPlate, read_plates


class SubsampleSVI(SVI):
    """SVI in mini-batches of any size, with one compilation for all of them.

    The guide's plates follow the model's, as with ``dynamic_subsample``. Besides,
    ``init``, ``update``, ``stable_update``, ``run`` and ``evaluate`` take two keywords
    that never reach the model. They are arguments of the step, so they may change
    between calls of a compiled step:

    indices : dict of str to array, optional
        For each plate, the rows that the batch holds, shape ``(subsample_size,)``, in
        model and guide alike. A plate that is not named draws its rows, once per
        step.
    valid : dict of str to int, optional
        For each plate, how many of its rows, the first ones, are real; the others are
        padding, as ``pad_minibatch`` makes it. Loss, gradients and new state are those
        of the step without padding. See ``valid_rows`` for what padding may hold.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    guide : callable
        The guide, an autoguide or any other callable. It is wrapped in
        ``dynamic_subsample``.
    optim, loss, **static_kwargs
        As for ``numpyro.infer.SVI``.

    Raises
    ------
    ValueError
        By a step, if `indices` or `valid` name a plate that the model does not have;
        if indices are not a vector of integers as long as the model's
        ``subsample_size``, or lie outside of the plate, or the model pins rows of its
        own; if a count is not an integer scalar, or not between 1 and the plate's
        rows; if `valid` is given to ``RenyiELBO``, to ``AutoSemiDAIS`` with a
        ``local_guide``, to a guide whose sites stand outside of the plate, or where
        ``TraceEnum_ELBO`` needs a concrete scale (see ``valid_rows``). Values are
        checked where they are concrete.

    Warns
    -----
    MisalignedSubsampleWarning
        As ``dynamic_subsample`` does.
    UserWarning
        Once per site, if a latent without reparameterised sampler stands in a
        subsampled plate of the guide and the loss is ``TraceGraph_ELBO``, which
        applies the plate's scale twice to its gradient.

    Notes
    -----
    Model code that mixes rows by itself, as the mean of a batch, sees the padded rows
    too. So does ``init`` where it looks for initial values, for which observations
    must be real in all rows.

    Examples
    --------
    >>> svi = SubsampleSVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    >>> state = svi.init(key, X[rows0], indices={"n": rows0})
    >>> step = jax.jit(svi.update, donate_argnums=0)
    >>> for rows in ragged_batches:
    ...     (x, rows), n = pad_minibatch((X[rows], rows), capacity=256)
    ...     state, loss = step(state, x, indices={"n": rows}, valid={"n": n})
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        **static_kwargs: Any,
    ) -> None:
        guide = dynamic_subsample(guide, model=model)
        super().__init__(model, guide, optim, loss, **static_kwargs)

    def init(
        self,
        rng_key: jax.Array,
        *args: Any,
        init_params: dict[str, Any] | None = None,
        indices: Mapping[str, ArrayLike] | None = None,
        valid: Mapping[str, ArrayLike] | None = None,
        **kwargs: Any,
    ) -> SVIState:
        with self._batch(indices, valid, args, kwargs):
            return super().init(rng_key, *args, init_params=init_params, **kwargs)

    def update(
        self,
        svi_state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        indices: Mapping[str, ArrayLike] | None = None,
        valid: Mapping[str, ArrayLike] | None = None,
        **kwargs: Any,
    ) -> tuple[SVIState, Any]:
        with self._batch(indices, valid, args, kwargs):
            return super().update(
                svi_state,
                *args,
                forward_mode_differentiation=forward_mode_differentiation,
                **kwargs,
            )

    def stable_update(
        self,
        svi_state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        indices: Mapping[str, ArrayLike] | None = None,
        valid: Mapping[str, ArrayLike] | None = None,
        **kwargs: Any,
    ) -> tuple[SVIState, Any]:
        with self._batch(indices, valid, args, kwargs):
            return super().stable_update(
                svi_state,
                *args,
                forward_mode_differentiation=forward_mode_differentiation,
                **kwargs,
            )

    def evaluate(
        self,
        svi_state: SVIState,
        *args: Any,
        indices: Mapping[str, ArrayLike] | None = None,
        valid: Mapping[str, ArrayLike] | None = None,
        **kwargs: Any,
    ) -> Any:
        with self._batch(indices, valid, args, kwargs):
            return super().evaluate(svi_state, *args, **kwargs)

    @contextmanager
    def _batch(
        self,
        indices: Mapping[str, ArrayLike] | None,
        valid: Mapping[str, ArrayLike] | None,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Generator[None]:
        """Hold for one step what is known of its batch."""
        valid = {} if valid is None else valid
        pins = {
            name: rows if isinstance(rows, jax.Array) else np.asarray(rows)
            for name, rows in (indices or {}).items()
        }
        counts = valid_rows(valid)
        if pins or valid:
            run = (self.model, args, {**kwargs, **self.static_kwargs})
            plates = read_plates(*run, until=pins.keys() | valid.keys())
            check_names("indices", pins, plates)
            check_names("valid", valid, plates)
            for name, rows in pins.items():
                _check_indices(plates[name], rows)
        data = {name: jnp.asarray(rows) for name, rows in pins.items()}
        watcher = self._score_function_watcher()
        with counts, substitute(data=data), watcher, dynamic_subsample():
            for name in valid:
                rows = data.get(name, plates[name].rows)
                if rows is not None and len(rows) == plates[name].size:
                    _check_follows_indices(*run, name, rows)
            if valid:
                self._check_counts_can_be_used(valid)
            yield

    def _score_function_watcher(self) -> AbstractContextManager:
        # A handler cannot tell this objective from the others; here it is known.
        if not isinstance(self.loss, TraceGraph_ELBO):
            return nullcontext()

        def full_size(name: str) -> int | None:
            call = GuideCall.current()
            return None if call is None else call.model_plate(name).size

        return ScoreFunctionWatcher(self.guide.fn, full_size)

    def _check_counts_can_be_used(self, valid: Mapping[str, ArrayLike]) -> None:
        if isinstance(self.loss, RenyiELBO):
            what = "RenyiELBO takes the scale of a plate apart from its sites and"
            other = "objective"
        elif getattr(self.guide, "local_guide", None) is not None:
            what = "AutoSemiDAIS with a local_guide sums its density over all rows and"
            other = "guide"
        else:
            return
        raise ValueError(
            f"{what} cannot use valid counts, here of {sorted(valid)}. Use another "
            f"{other}, or give batches without padding and leave valid out."
        )


def _check_indices(plate: ModelPlate, rows: np.ndarray | jax.Array) -> None:
    check_rows(plate.name, plate.size, rows)
    if plate.rows is not None:
        raise ValueError(
            f"The model pins the rows of plate '{plate.name}' (size {plate.size}) "
            "itself. Leave its indices out, or let the model take the rows that it is "
            f"given: with numpyro.plate('{plate.name}', ...) as idx."
        )
    if len(rows) != plate.subsample_size:
        raise ValueError(
            f"indices hold {len(rows)} rows of plate '{plate.name}' (size "
            f"{plate.size}), but the model takes {plate.subsample_size}. Give as many, "
            "or make the model's subsample_size the length of its batch."
        )


def _check_follows_indices(
    model: Callable, args: tuple, kwargs: dict[str, Any], name: str, rows: jax.Array
) -> None:
    """Refuse padding of a model whose first rows are not those that are pinned."""
    if keeps_rows_in_order(model, args, kwargs, name, rows):
        raise ValueError(
            f"Plate '{name}' is padded to all of its {len(rows)} rows. NumPyro then "
            "leaves numpyro.subsample in the original order, so that the valid rows "
            "are not those of the batch. Index data with the plate's indices instead, "
            f"with numpyro.plate('{name}', ...) as idx: x[idx], or use a capacity "
            f"below {len(rows)}."
        )
