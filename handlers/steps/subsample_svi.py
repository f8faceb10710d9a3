"""SVI whose steps are told which rows a batch holds, and how many of them count."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import substitute
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO
from numpyro.infer.svi import SVIRunResult, SVIState
from tqdm.auto import tqdm

from ..batches.minibatch import Minibatch
from ..batches.padding import check_names, valid_rows
from ..effect import internals
from ..effect.alignment import MisalignedSubsampleWarning, ScoreFunctionWatcher
from ..effect.dynamic_subsample import dynamic_subsample
from ..effect.internals import Tracer
from ..effect.model_call import pinned_in_model
from ..effect.plates import Counts, Rows, arguments_for_plates, check_rows
from .fit import fit as fit_batches
from .grow import grown
from .predict import log_likelihood, predict
from .rowwise import RowSteps


class SubsampleSVI(SVI):
    """SVI in mini-batches of any size, with one compilation for all of them.

    The guide's plates follow the model's, as with ``dynamic_subsample``. Each method
    that runs on a batch takes one ``Minibatch``, which ``minibatch`` makes, or the
    model's arguments and two keywords that never reach the model. All of them are
    arguments of a compiled step, so they may change between its calls:

    indices : dict of str to array, optional
        For each plate, the rows that the batch holds, integers of shape
        ``(subsample_size,)``, in model and guide alike. A plate that is not named draws
        its rows, once per step.
    valid : dict of str to int, optional
        For each plate, how many of its rows, the first ones, are real; the others are
        padding. Loss, gradients and new state are those of the step without padding.
        See ``valid_rows`` for what padding may hold.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    guide : callable
        The guide, an autoguide or any other callable. It is wrapped in
        ``dynamic_subsample``.
    optim, loss, **static_kwargs
        As for ``numpyro.infer.SVI``.
    rowwise : bool, default False
        Let ``update``, ``stable_update``, ``run`` and ``fit`` step on the batch's rows
        alone: of each parameter that holds the rows of a subsampled plate, and of the
        optimizer's state for it, they take the batch's rows, step on these, and write
        these rows back. In a compiled step with a donated state,
        ``jax.jit(svi.update, donate_argnums=0)``, time and temporary memory are then
        those of the batch, whatever the size of the plate, if its rows are pinned;
        NumPyro draws them by shuffling the whole plate. ``run`` and ``fit`` donate by
        themselves.
    rows, valid : dict of str to str or int, optional
        For each plate whose rows or counts arrive in an argument of the model, the
        name of that argument, or its position. So a loop that knows nothing of rows
        can train.

    Raises
    ------
    ValueError
        When made with `rowwise`, if the optimizer does not go by gradients alone. By
        a step with `rowwise`, if the optimizer mixes rows, as adafactor does; if the
        guide is one joint distribution over the rows; if several particles draw rows
        of their own; if a parameter with rows is read outside of its plate, too.
        By a step, if `indices` or `valid` name a plate that the model does not have;
        if indices are not a vector of integers as long as the model's
        ``subsample_size``, or lie outside of the plate, or the model pins rows of its
        own; if a count is not an integer scalar, or not between 1 and the plate's
        rows; if `valid` is given to ``RenyiELBO``, to ``AutoSemiDAIS`` with a
        ``local_guide``, to a guide whose sites stand outside of the plate, or where
        ``TraceEnum_ELBO`` needs a concrete scale (see ``valid_rows``).

    Warns
    -----
    MisalignedSubsampleWarning, UnscaledSubsampleWarning
        As ``dynamic_subsample`` does.
    UserWarning
        Once per site, if a latent without reparameterised sampler stands in a
        subsampled plate of the guide and the loss is ``TraceGraph_ELBO``, which
        applies the plate's scale twice to its gradient.

    Notes
    -----
    A compiled step cannot raise. Rows and counts out of range, where their values are
    not known, make its loss NaN, and with it the parameters that the step moves.

    With `rowwise`, optimizers that leave alone what has no gradient (SGD, Adagrad,
    with schedules too) give the very parameters of the ordinary steps. Others (Adam,
    RMSProp, all with momentum or weight decay) let the rows outside of a batch rest,
    instead of moving them by old moments: the lazy variant, known from PyTorch's
    ``SparseAdam``, here with one count of steps for all rows.

    Model code that mixes rows by itself, as the mean of a batch, sees the padded rows
    too. So does ``init`` where it looks for initial values, for which observations
    must be real in all rows.

    Examples
    --------
    >>> svi = SubsampleSVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    >>> state = svi.init(key, minibatch(X[rows0], rows={"n": rows0}, capacity=256))
    >>> step = jax.jit(svi.update, donate_argnums=0)
    >>> for rows in ragged_batches:
    ...     batch = minibatch(X[rows], rows={"n": rows}, capacity=256)
    ...     state, loss = step(state, batch)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        *,
        rowwise: bool = False,
        rows: Mapping[str, str | int] | None = None,
        valid: Mapping[str, str | int] | None = None,
        **static_kwargs: Any,
    ) -> None:
        guide = dynamic_subsample(guide, model=model)
        super().__init__(model, guide, optim, loss, **static_kwargs)
        self._rows, self._valid = dict(rows or {}), dict(valid or {})
        self._row_steps = RowSteps(self) if rowwise else None

    def init(
        self,
        rng_key: jax.Array,
        *args: Any,
        init_params: dict[str, Any] | None = None,
        indices: Rows | None = None,
        valid: Counts | None = None,
        **kwargs: Any,
    ) -> SVIState:
        """Return the state that training starts from.

        Parameters
        ----------
        rng_key : array
            The random key.
        init_params : dict, optional
            Values of parameters to start from, of all rows.
        *args, indices, valid, **kwargs
            A batch: see the class.

        Returns
        -------
        SVIState
            Arrays of its own, which a step may be allowed to overwrite.
        """
        args, kwargs, indices, valid = self._unpacked(args, kwargs, indices, valid)
        with self._batch(indices, valid), internals.search_compiled():
            state = super().init(rng_key, *args, init_params=init_params, **kwargs)
        # The guide keeps its initial values; a step may be allowed to overwrite these.
        return jax.tree.map(jnp.copy, state)

    def update(
        self,
        svi_state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        indices: Rows | None = None,
        valid: Counts | None = None,
        **kwargs: Any,
    ) -> tuple[SVIState, Any]:
        """Take one step on a batch.

        Parameters
        ----------
        svi_state : SVIState
            The state before the step.
        forward_mode_differentiation : bool, default False
            As for ``numpyro.infer.SVI.update``.
        *args, indices, valid, **kwargs
            The batch: see the class.

        Returns
        -------
        svi_state : SVIState
            The state after the step.
        loss : array of shape ()
            The loss before the step, an estimate for all rows.
        """
        step = partial(
            super().update,
            forward_mode_differentiation=forward_mode_differentiation,
        )
        return self._step(step, svi_state, indices, valid, args, kwargs)

    def stable_update(
        self,
        svi_state: SVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        indices: Rows | None = None,
        valid: Counts | None = None,
        **kwargs: Any,
    ) -> tuple[SVIState, Any]:
        """Take one step on a batch, unless its loss or gradients are not finite.

        Parameters and returned values are those of ``update``. A step that is skipped
        returns its loss and the state before.
        """
        step = partial(
            super().stable_update,
            forward_mode_differentiation=forward_mode_differentiation,
        )
        return self._step(step, svi_state, indices, valid, args, kwargs)

    def run(
        self,
        rng_key: jax.Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        forward_mode_differentiation: bool = False,
        init_state: SVIState | None = None,
        init_params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Take many steps on one batch. For many batches, use ``fit``.

        Parameters
        ----------
        rng_key : array
            The random key of ``init``, which is called without `init_state`.
        num_steps : int
            How many steps to take.
        progress_bar : bool, default True
            Show the steps and the mean loss.
        stable_update : bool, default False
            Take steps by ``stable_update``.
        forward_mode_differentiation : bool, default False
            As for ``numpyro.infer.SVI.update``.
        init_state : SVIState, optional
            A state to go on from.
        init_params : dict, optional
            As for ``init``.
        *args, **kwargs
            The batch, `indices` and `valid` included: see the class.

        Returns
        -------
        SVIRunResult
            The parameters, the state and the loss of each step.
        """
        run_all = super().run

        def run(num_steps: int, **options: Any) -> SVIRunResult:
            return run_all(
                rng_key,
                num_steps,
                *args,
                stable_update=stable_update,
                forward_mode_differentiation=forward_mode_differentiation,
                **options,
                **kwargs,
            )

        if self._row_steps is None or num_steps < 1:
            return run(
                num_steps,
                progress_bar=progress_bar,
                init_state=init_state,
                init_params=init_params,
            )

        # A state that is not donated would be copied, with all of its rows.
        @partial(jax.jit, static_argnums=0, donate_argnums=1)
        def steps(count: int, state: SVIState) -> tuple[SVIState, jax.Array]:
            result = run(count, progress_bar=False, init_state=state)
            return result.state, result.losses

        if init_state is None:
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        else:
            state = jax.tree.map(jnp.copy, init_state)
        losses = []
        at_once = max(num_steps // 20, 1) if progress_bar else num_steps
        with tqdm(total=num_steps, disable=not progress_bar) as bar:
            for done in range(0, num_steps, at_once):
                count = min(at_once, num_steps - done)
                state, of_steps = steps(count, state)
                losses.append(of_steps)
                if progress_bar:
                    bar.set_postfix_str(f"loss: {of_steps.mean():.4f}", refresh=False)
                bar.update(count)
        return SVIRunResult(self.get_params(state), state, jnp.concatenate(losses))

    fit = fit_batches
    predict = predict
    log_likelihood = log_likelihood

    def grow(
        self,
        svi_state: SVIState,
        *args: Any,
        indices: Rows | None = None,
        valid: Counts | None = None,
        **kwargs: Any,
    ) -> SVIState:
        """Go on with plates that have become larger, since data came in.

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
        *args, indices, valid, **kwargs
            A batch, with which the model has its new sizes. It need not hold any of
            the new rows.

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
        the first steps of Adam are up to three times as long for them.

        A guide of your own must take the size of its plates from its arguments.

        Examples
        --------
        >>> state = svi.grow(state, X[rows], indices={"n": rows})
        """
        args, kwargs, indices, valid = self._unpacked(args, kwargs, indices, valid)
        with self._batch(indices, valid):
            return grown(self, svi_state, args, kwargs)

    def evaluate(
        self,
        svi_state: SVIState,
        *args: Any,
        indices: Rows | None = None,
        valid: Counts | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of a batch, without a step.

        Parameters
        ----------
        svi_state : SVIState
            The state, whose random key the loss is computed with.
        *args, indices, valid, **kwargs
            The batch: see the class.

        Returns
        -------
        array of shape ()
            The loss, an estimate for all rows.
        """
        args, kwargs, indices, valid = self._unpacked(args, kwargs, indices, valid)
        with self._batch(indices, valid):
            return self._evaluate(svi_state, args, kwargs)

    def _evaluate(self, svi_state: SVIState, args: tuple, kwargs: dict) -> Any:
        # NumPyro leaves out the mutable state.
        params = self.get_params(svi_state) | (svi_state.mutable_state or {})
        with internals.replaced(self, get_params=lambda _: params):
            return super().evaluate(svi_state, *args, **kwargs)

    def _step(
        self,
        step: Callable,
        svi_state: SVIState,
        indices: Rows | None,
        valid: Counts | None,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[SVIState, Any]:
        args, kwargs, indices, valid = self._unpacked(args, kwargs, indices, valid)

        def ordinary(state: SVIState) -> tuple[SVIState, Any]:
            return step(state, *args, **kwargs)

        def evaluate(state: SVIState) -> Any:
            return self._evaluate(state, args, kwargs)

        with self._batch(indices, valid):
            if self._row_steps is None:
                return ordinary(svi_state)
            return self._row_steps(ordinary, evaluate, svi_state, valid)

    def _unpacked(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        indices: Rows | None,
        valid: Counts | None,
    ) -> tuple[tuple, dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return arguments, rows and counts, in whatever way they are given."""
        for what, given in (("indices", indices), ("valid", valid)):
            if given is not None and not isinstance(given, Mapping):
                raise ValueError(
                    f"{what} must be a dict with plates for keys, not "
                    f"{type(given).__name__}. If the model has an argument called "
                    f"{what}, give it by position, or to minibatch(...)."
                )
        if any(isinstance(argument, Minibatch) for argument in args):
            batch, *others = args
            if others or kwargs or indices is not None or valid is not None:
                raise ValueError(
                    "A Minibatch stands for the model's arguments, indices and valid, "
                    "so it is all that a step takes. Give the rest to minibatch(...), "
                    "too."
                )
            args, kwargs, indices, valid = (
                batch.args,
                batch.kwargs,
                batch.indices,
                batch.valid,
            )
        given = args, {**kwargs, **self.static_kwargs}
        named = arguments_for_plates(self.model, self._rows, *given)
        counts = arguments_for_plates(self.model, self._valid, *given)
        return args, kwargs, named | dict(indices or {}), counts | dict(valid or {})

    @contextmanager
    def _batch(self, indices: Rows, valid: Counts) -> Generator[None]:
        """Hold for one step what is known of its batch."""
        # A handler cannot tell this objective from the others; here it is known.
        graph = isinstance(self.loss, TraceGraph_ELBO)
        watcher = ScoreFunctionWatcher(self.guide.fn) if graph else nullcontext()
        if valid:
            self._check_counts_can_be_used(valid)
        pinned, counts = _PinnedRows(indices), valid_rows(valid)
        loss = _nan_if_invalid(self.loss, pinned, counts)
        of_step = internals.replaced(self, loss=loss)
        with of_step, pinned, counts, watcher, dynamic_subsample():
            yield

    def _check_counts_can_be_used(self, valid: Counts) -> None:
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


class _PinnedRows(substitute):
    """Pins the rows that a step is given, and holds the model's plates to them."""

    data: dict[str, jax.Array]

    def __init__(self, indices: Rows) -> None:
        # Made arrays here, once: a loss may compile parts of itself.
        super().__init__(data={n: jnp.asarray(rows) for n, rows in indices.items()})
        self._checked = {
            name: rows if _is_known(rows) else self.data[name]
            for name, rows in indices.items()
        }
        self._plates: set[str] = set()
        self.sizes: dict[str, int] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["name"] in self._checked:
            name, size = msg["name"], msg["args"][0]
            check_rows(name, size, self._checked[name])
            self.sizes[name] = size
        super().process_message(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate":
            return
        name, (size, argument) = msg["name"], msg["args"]
        self._plates.add(name)
        # The guide's plates, which have records, follow.
        if name not in self.data or "plates" in msg:
            return
        if pinned_in_model(msg) is not None:
            raise ValueError(
                f"The model pins the rows of plate '{name}' (size {size}) itself. "
                "Leave its indices out, or let the model take the rows that it is "
                f"given: with numpyro.plate('{name}', ...) as idx."
            )
        rows, taken = self.data[name], size if argument is None else argument
        if len(rows) != taken:
            raise ValueError(
                f"indices hold {len(rows)} rows of plate '{name}' (size {size}), but "
                f"the model takes {taken}. Give as many, or make the model's "
                "subsample_size the length of its batch."
            )

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        # A wrong name is the cause of the warning, which may have been made an error.
        if exc_type in (None, MisalignedSubsampleWarning):
            check_names("indices", self.data, self._plates)


def _is_known(rows: Any) -> bool:
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(rows))


def _nan_if_invalid(loss: Any, pinned: _PinnedRows, counts: valid_rows) -> Any:
    """Return a loss that is NaN for traced rows or counts that are out of range.

    So are its gradients, and by them what a step makes of parameters and optimizer
    state. Known rows and counts raise errors instead.
    """
    rows = {n: own for n, own in pinned.data.items() if isinstance(own, Tracer)}
    bounds = {name: (jnp.min(own), jnp.max(own)) for name, own in rows.items()}
    traced = {n: own for n, own in counts.counts.items() if isinstance(own, Tracer)}
    if not (bounds or traced):
        return loss

    def checked(value: Any) -> Any:
        valid: Any = True
        for name, (low, high) in bounds.items():
            if name in pinned.sizes:
                valid = valid & (low >= 0) & (high < pinned.sizes[name])
        for name, count in traced.items():
            if name in counts.capacities:
                valid = valid & (count >= 1) & (count <= counts.capacities[name])
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
