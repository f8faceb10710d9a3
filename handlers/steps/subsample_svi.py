"""SVI whose steps are told which rows a batch holds, and how many of them count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import substitute
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState

from ..batches.data_axes import check_data_axes
from ..batches.minibatch import Minibatch
from ..batches.padding import check_names, mask_padding
from ..effect import internals
from ..effect.calls import pinned_in_model
from ..effect.dynamic_subsample import dynamic_subsample
from ..effect.guides import makes_plates, refuse_create_plates
from ..effect.internals import Tracer
from ..effect.pin_rows import substitute_rows
from ..effect.warn import warn_of_score_functions
from .fit import fit
from .grow import grown
from .optimizers import check_goes_by_gradients
from .predict import log_likelihood, predict
from .programs import search_compiled
from .rowwise import rowwise_step
from .start import check_key, check_seen, init_at_once


class SubsampleSVI(SVI):
    """SVI in mini-batches of any size, with one compilation for all of them.

    The guide's plates follow the model's, as with ``dynamic_subsample``. Each method
    that runs on a batch takes one ``Minibatch``, made by ``minibatch``: the model's
    arguments, the rows that the batch holds of each plate, and how many of them are
    not padding. Or it takes the model's own arguments; plates then draw their rows, or
    ``pin_rows`` takes them from an argument. ``run`` and ``get_params`` are those of
    ``numpyro.infer.SVI``.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    guide : callable
        The guide: an autoguide, or a function with sample sites of its own. It is
        wrapped in ``dynamic_subsample``.
    optim : optimizer
        An optimizer of ``numpyro.optim`` or of optax.
    loss : ELBO
        The objective, such as ``numpyro.infer.Trace_ELBO()``.
    rowwise : bool, default False
        Let ``update``, ``stable_update``, ``run`` and ``fit`` step on the batch's rows
        alone. Of each parameter that holds the rows of a subsampled plate, and of the
        optimizer's state for it, they take the batch's rows, step on these, and write
        them back. In a compiled step with a donated state,
        ``jax.jit(svi.update, donate_argnums=0)``, time and temporary memory then depend
        on the batch alone, whatever the size of the plate. The rows have to be pinned,
        since NumPyro draws rows by shuffling the whole plate. ``fit`` donates by
        itself.
    **static_kwargs
        Arguments of model and guide that are the same in all steps, by name.

    Raises
    ------
    ValueError
        When made, if guide and model are exchanged, or the loss is a class; with
        `rowwise`, if the optimizer does not go by gradients alone. By
        a step with `rowwise`, if the optimizer mixes rows, as adafactor does; if the
        guide is one joint distribution over the rows; if several particles draw rows
        of their own; if a parameter with rows is read outside of its plate, too.
        By a step, if the batch names a plate that the model does not have; if its rows
        are not as many as the model's ``subsample_size``, or lie outside of the plate,
        or the model pins rows of its own; if a count is not between 1 and the plate's
        rows; if a batch is padded for ``RenyiELBO``, for ``AutoSemiDAIS`` with a
        ``local_guide``, for a guide whose sites stand outside of the plate, or where
        ``TraceEnum_ELBO`` needs a concrete scale.

    Warns
    -----
    MisalignedSubsampleWarning
        Once per guide and plate, if local latents follow rows that the plate draws,
        and the data do not.
    UnscaledSubsampleWarning
        Once per guide and site, if data outside of a subsampled plate depend on latents
        in it, and have no scale.
    UserWarning
        Once per site, if a latent without reparameterised sampler stands in a
        subsampled plate of the guide and the loss is ``TraceGraph_ELBO``, which
        applies the plate's scale twice to its gradient.

    Notes
    -----
    A compiled step cannot raise. Rows and counts out of range, where their values are
    not known, make its loss NaN, and with it the parameters that the step moves.

    Where a plate of the model asks for no ``subsample_size``, the rows of the batch
    decide it.

    With `rowwise`, optimizers that leave alone what has no gradient (SGD, Adagrad,
    with schedules too) give the very parameters of the ordinary steps. Others (Adam,
    RMSProp, all with momentum or weight decay) do not move the rows outside of a batch,
    where an ordinary step moves them by old moments: the lazy variant, known from
    PyTorch's ``SparseAdam``, here with one count of steps for all rows.

    Model code that computes across rows by itself, as the mean of a batch, includes the
    padded rows. So does ``init`` where it looks for initial values, for which
    observations must be real in all rows.

    Examples
    --------
    >>> def load(rows):
    ...     return minibatch(X[rows], y[rows], rows={"people": rows}, capacity=40)
    >>> svi = SubsampleSVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    >>> state = svi.init(key, load(np.arange(40)))
    >>> step = jax.jit(svi.update, donate_argnums=0)  # once, outside of the loop
    >>> for rows in np.split(np.random.permutation(N), [40, 53, 90]):
    ...     state, loss = step(state, load(rows))
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        rowwise: bool = False,
        **static_kwargs: Any,
    ) -> None:
        if isinstance(model, AutoGuide):
            raise ValueError(
                f"The first argument is the model, not {type(model).__name__}: "
                "SubsampleSVI(model, guide, optim, loss)."
            )
        if isinstance(loss, type):
            raise ValueError(
                f"The loss is the class {loss.__name__}. Make an object of it: "
                f"{loss.__name__}()."
            )
        if makes_plates(guide):
            refuse_create_plates(guide)
        guide = dynamic_subsample(guide, model=model)
        super().__init__(model, guide, optim, loss, **static_kwargs)
        if rowwise:
            check_goes_by_gradients(self.optim)
        self._rowwise = rowwise

    def init(
        self,
        rng_key: jax.Array,
        *args: Any,
        init_params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SVIState:
        """Return the state that training starts from.

        Parameters
        ----------
        rng_key : array
            The random key.
        *args, **kwargs
            One ``Minibatch``, which pins rows and tells padding, or the arguments of
            the model, whose plates then draw their rows.
        init_params : dict, optional
            Values of parameters to start from, of all rows.

        Returns
        -------
        SVIState
            Parameters of all rows, the optimizer's state, and a random key. The arrays
            are its own, so a step may overwrite them.

        Raises
        ------
        TypeError
            If `rng_key` is not a random key.
        ValueError
            If the batch names a plate that the model does not have, or its rows or
            counts do not fit the plate; if data are NaN; if the guide needs all rows in
            its first call, and the batch lacks some.

        Examples
        --------
        >>> state = svi.init(jax.random.key(0), batches[0])
        >>> svi.get_params(state)["z_auto_loc"].shape == (N,)
        True
        """
        check_key(rng_key)
        batch = self._unpacked(args, kwargs)
        numpyro_init = partial(super().init, init_params=init_params)

        def init(rng_key: jax.Array) -> SVIState:
            return numpyro_init(rng_key, *batch.args, **batch.kwargs)

        given = batch.args, {**batch.kwargs, **self.static_kwargs}
        with self._on(batch), search_compiled():
            return init_at_once(self, init, rng_key, *given)

    def update(
        self,
        svi_state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[SVIState, Any]:
        """Take one step on a batch.

        Parameters
        ----------
        svi_state : SVIState
            The state before the step.
        *args, **kwargs
            One ``Minibatch``, which pins rows and tells padding, or the arguments of
            the model, whose plates then draw their rows.
        forward_mode_differentiation : bool, default False
            Differentiate in forward mode, which ``jax.lax.while_loop`` in a model
            needs.

        Returns
        -------
        svi_state : SVIState
            The state after the step.
        loss : array of shape ()
            The loss before the step, an estimate for all rows.

        Raises
        ------
        ValueError
            If ``init`` has not been called; if the batch names a plate that the model
            does not have, or its rows or counts do not fit the plate; if the objective
            or the guide cannot leave out padding; with `rowwise`, if the optimizer or
            the guide mixes rows.

        Examples
        --------
        >>> step = jax.jit(svi.update, donate_argnums=0)
        >>> state, loss = step(state, batches[0])
        >>> loss.shape
        ()
        """
        options = {"forward_mode_differentiation": forward_mode_differentiation}
        return self._step(super().update, svi_state, options, args, kwargs)

    def stable_update(
        self,
        svi_state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[SVIState, Any]:
        """Take one step on a batch, unless its loss or gradients are not finite.

        Parameters
        ----------
        svi_state : SVIState
            The state before the step.
        *args, **kwargs
            One ``Minibatch``, which pins rows and tells padding, or the arguments of
            the model, whose plates then draw their rows.
        forward_mode_differentiation : bool, default False
            Differentiate in forward mode, which ``jax.lax.while_loop`` in a model
            needs.

        Returns
        -------
        svi_state : SVIState
            The state after the step, or before it if the step is skipped.
        loss : array of shape ()
            The loss before the step, an estimate for all rows.

        Raises
        ------
        ValueError
            If ``init`` has not been called; if the batch names a plate that the model
            does not have, or its rows or counts do not fit the plate; if the objective
            or the guide cannot leave out padding; with `rowwise`, if the optimizer or
            the guide mixes rows.

        Examples
        --------
        >>> step = jax.jit(svi.stable_update)
        >>> nan = minibatch(X[:3] * np.nan, y[:3], rows={"people": np.arange(3)})
        >>> state_after, loss = step(state, nan)
        >>> float(loss), bool(state_after.optim_state[0] == state.optim_state[0])
        (nan, True)
        """
        options = {"forward_mode_differentiation": forward_mode_differentiation}
        return self._step(super().stable_update, svi_state, options, args, kwargs)

    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, without a step.

        Parameters
        ----------
        svi_state : SVIState
            The state, whose random key the loss is computed with.
        *args, **kwargs
            One ``Minibatch``, which pins rows and tells padding, or the arguments of
            the model, whose plates then draw their rows.

        Returns
        -------
        array of shape ()
            The loss, an estimate for all rows.

        Raises
        ------
        ValueError
            If ``init`` has not been called; if the batch names a plate that the model
            does not have, or its rows or counts do not fit the plate; if the objective
            or the guide cannot leave out padding.

        Examples
        --------
        >>> loss = jax.jit(svi.evaluate)(state, batches[0])
        """
        check_seen(self)
        batch = self._unpacked(args, kwargs)
        # NumPyro gives the parameters alone to the loss.
        carried = substitute(data=svi_state.mutable_state or {})
        with self._on(batch), carried:
            return super().evaluate(svi_state, *batch.args, **batch.kwargs)

    fit = fit
    predict = predict
    log_likelihood = log_likelihood

    def grow(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> SVIState:
        """Extend the state after plates have grown.

        The new rows of a plate are its last ones. They start where ``init`` would
        start them, with a key that is made from the state's. All other parameters,
        constraints and the optimizer's state stay as they are, bit for bit, and so do
        the mutable state and the random key. Plates that have not grown lose nothing,
        and if none has, the state is returned as it is. Compiled steps compile again.

        A plate cannot lose rows. A row that is in no batch any more costs row-wise
        steps nothing.

        Parameters
        ----------
        svi_state : SVIState
            The state so far.
        *args, **kwargs
            One ``Minibatch``, or the arguments of the model, for which the model makes
            its plates with their new sizes. New rows need not be in it.

        Returns
        -------
        SVIState
            The state with all rows. The guide has its new sizes, too, and initial
            values of all rows.

        Raises
        ------
        ValueError
            If a plate has become smaller; if a part of the guide is one joint
            distribution over the rows of a plate that has grown, or evaluates the data
            of its first call, as ``AutoDAIS`` and ``AutoLaplaceApproximation`` do; if
            model or guide have other parameters than before, or one whose new shape
            added rows do not explain, because it is not read in its plate with
            ``event_dim``; if the optimizer's state does not go by rows. Guide, state
            and this object are then as they were.

        Notes
        -----
        If the guide's ``init_loc_fn`` is ``init_to_value`` with values of the old rows
        only, new rows start as those of a latent without a value. To give them values,
        set ``svi.guide.init_loc_fn`` before.

        The new rows have no moments yet, while the optimizer's count of steps goes on:
        the first steps of Adam are up to three times as long for them, and a schedule
        that has decayed does not move them. To start the optimizer anew, with all that
        was fitted, ``svi.init(key, batch, init_params=svi.get_params(state))``. Train
        on old rows, too, or the globals follow the new ones alone.

        A guide of your own must take the size of its plates from its arguments.

        Examples
        --------
        >>> N, X, y = N + 20, np.append(X, X[:20], 0), np.append(y, y[:20])
        >>> rows = np.arange(N - 20, N)  # the model now makes its plate of N rows
        >>> batch = minibatch(X[rows], y[rows], rows={"people": rows})
        >>> state = svi.grow(state, batch)
        >>> svi.get_params(state)["z_auto_loc"].shape == (N,)
        True
        """
        check_seen(self)
        batch = self._unpacked(args, kwargs)
        with self._on(batch):
            return grown(self, svi_state, batch.args, batch.kwargs)

    def _step(
        self,
        step: Callable,
        svi_state: SVIState,
        options: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[SVIState, Any]:
        check_seen(self)
        batch = self._unpacked(args, kwargs)

        def ordinary(state: SVIState) -> tuple[SVIState, Any]:
            return step(state, *batch.args, **options, **batch.kwargs)

        with self._on(batch):
            if self._rowwise:
                return rowwise_step(self, ordinary, svi_state, batch)
            return ordinary(svi_state)

    def _unpacked(self, args: tuple, kwargs: dict[str, Any]) -> Minibatch:
        """Return the batch that a method is given in either way."""
        others = [*args, *kwargs.values()]
        if not any(isinstance(argument, Minibatch) for argument in others):
            return Minibatch(args, kwargs, rows={}, counts={}, padded=())
        if len(others) == len(args) == 1:
            return others[0]
        raise ValueError(
            "A Minibatch stands for the arguments of the model, so it is all that a "
            "step takes. Give the others to minibatch(...), too."
        )

    @contextmanager
    def _on(self, batch: Minibatch) -> Generator[None]:
        """Hold the model and the guide to the rows and counts of a batch."""
        self._check_padding_can_be_used(batch.padded)
        pins, padding = _pin_batch(batch), mask_padding(batch.valid)
        loss = _nan_if_invalid(self.loss, pins, padding)
        context = dynamic_subsample()
        context.padded = frozenset(batch.padded)
        context.named = context.padded.union(batch.rows)
        with ExitStack() as stack:
            stack.enter_context(internals.replaced(self, loss=loss))
            stack.enter_context(pins)
            stack.enter_context(padding)
            stack.enter_context(check_data_axes(batch))
            # A handler cannot tell this objective from the others; here it is known.
            if isinstance(self.loss, TraceGraph_ELBO):
                stack.enter_context(warn_of_score_functions(self.guide.fn))
            stack.enter_context(context)
            yield

    def _check_padding_can_be_used(self, padded: Collection[str]) -> None:
        if not padded:
            return
        if isinstance(self.loss, RenyiELBO):
            what = "RenyiELBO takes the scale of a plate apart from its sites and"
            other = "objective"
        elif getattr(self.guide, "local_guide", None) is not None:
            what = "AutoSemiDAIS with a local_guide sums its density over all rows and"
            other = "guide"
        else:
            return
        raise ValueError(
            f"{what} cannot leave out padded rows, here of {sorted(padded)}. Use "
            f"another {other}, or give batches without a capacity."
        )


class _pin_batch(substitute_rows):
    """Pins the rows of a batch, and refuses plates of the model that take others."""

    def __init__(self, batch: Minibatch) -> None:
        super().__init__(batch.pinned)
        self._named = batch.rows.keys()

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        # The guide's plates, which have records, follow.
        if msg["type"] != "plate" or msg["name"] not in self.data or "plates" in msg:
            return
        name, (size, argument) = msg["name"], msg["args"]
        if pinned_in_model(msg) is not None:
            raise ValueError(
                f"The model pins the rows of plate '{name}' (size {size}) itself. "
                "Leave them out of the batch, or let the model take the rows that it "
                f"is given: with numpyro.plate('{name}', ...) as idx."
            )
        count = len(self.data[name])
        if argument not in (None, count):
            raise ValueError(
                f"The batch holds {count} rows of plate '{name}' (size {size}), but "
                f"the model takes {argument}. Give as many, or make the model's "
                "subsample_size the length of its batch."
            )

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            check_names("The batch", self._named, self.sizes)


def _nan_if_invalid(loss: Any, pins: _pin_batch, padding: mask_padding) -> Any:
    """Return a loss that is NaN for traced rows or counts that are out of range.

    So are its gradients, and by them what a step makes of parameters and optimizer
    state. Known rows and counts raise errors instead.
    """
    rows = {n: own for n, own in pins.data.items() if isinstance(own, Tracer)}
    bounds = {name: (jnp.min(own), jnp.max(own)) for name, own in rows.items()}
    traced = {n: own for n, own in padding.counts.items() if isinstance(own, Tracer)}
    if not (bounds or traced):
        return loss

    def checked(value: Any) -> Any:
        valid: Any = True
        for name, (low, high) in bounds.items():
            if name in pins.sizes:
                valid = valid & (low >= 0) & (high < pins.sizes[name])
        for name, count in traced.items():
            if name in padding.capacities:
                valid = valid & (count >= 1) & (count <= padding.capacities[name])
        # A product, unlike a choice, makes the gradients NaN, too.
        factor = jnp.where(valid, 1.0, jnp.nan)
        return jax.tree.map(lambda own: own * factor.astype(own.dtype), value)

    def compute(*args: Any, **kwargs: Any) -> Any:
        return checked(loss.loss(*args, **kwargs))

    def compute_with_state(*args: Any, **kwargs: Any) -> Any:
        result = loss.loss_with_mutable_state(*args, **kwargs)
        return result | {"loss": checked(result["loss"])}

    # A copy, as NumPyro and this library ask for the class of a loss.
    of_step = copy(loss)
    of_step.loss, of_step.loss_with_mutable_state = compute, compute_with_state
    return of_step
