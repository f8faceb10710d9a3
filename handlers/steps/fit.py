"""The training loop: batches by the epoch, through one compiled program."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from operator import length_hint
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from ..batches.minibatch import Minibatch, as_minibatch
from ..effect.warn import warn
from .advice import Sizes, warn_of_untrained_rows
from .chunks import Chunks, in_turn
from .start import check_key, check_state

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
ENDLESS = 10**15


class FitResult(NamedTuple):
    """The result of ``SubsampleSVI.fit``, a named tuple.

    Attributes
    ----------
    params : dict of str to array
        The parameters of `state`, of all rows, as ``svi.get_params`` returns them.
    state : SVIState
        The last state. With `patience`, the state of the best validation loss, unless
        Ctrl-C or an error ended the fit.
    losses : array of shape (steps,)
        The loss of each step.
    epoch_losses : array of shape (epochs,)
        The mean loss of each complete epoch.
    validation_losses : array of shape (epochs,)
        The mean validation loss of each complete epoch. Empty without validation.
    stopped : str or None
        What ended the fit early: ``"patience"``, ``"callback"``, ``"interrupt"`` or
        ``"error"``.
    compilations : int
        How often JAX compiled the training step.

    Examples
    --------
    >>> result = svi.fit(key, batches, epochs=2, progress_bar=False)
    >>> result.params["z_auto_loc"].shape == (N,)
    True
    >>> len(result.losses) == 2 * len(batches), len(result.epoch_losses)
    (True, 2)
    >>> result.stopped, result.compilations
    (None, 1)
    """

    params: dict[str, Any]
    state: SVIState
    losses: np.ndarray
    epoch_losses: np.ndarray
    validation_losses: np.ndarray
    stopped: str | None
    compilations: int

    def __repr__(self) -> str:
        loss = f"{self.epoch_losses[-1]:,.4f}" if len(self.epoch_losses) else "none"
        return (
            f"FitResult({len(self.params)} parameters, {len(self.losses):,} steps, "
            f"{len(self.epoch_losses):,} epochs, last loss {loss}, "
            f"stopped={self.stopped!r}, {self.compilations} compilations)"
        )


def fit(
    self: SubsampleSVI,
    rng_key: jax.Array,
    batches: Batches,
    epochs: int = 1,
    *,
    state: SVIState | None = None,
    initial_epoch: int = 0,
    validation: Batches | None = None,
    patience: int | None = None,
    callback: Callable[[int, SVIState, float], Any] | None = None,
    progress_bar: bool = True,
    stable_update: bool = False,
    check_finite: bool = True,
    steps_per_dispatch: int | None = None,
) -> FitResult:
    """Train on batches for several epochs, with one compiled program.

    Parameters
    ----------
    rng_key : array
        The random key of ``init`` and of the validation.
    batches : iterable, or callable
        The batches of an epoch: a list, a loader of grain or torch, or a function that
        takes the number of the epoch, from 0, and returns an iterable. Each item is a
        batch that ``minibatch`` makes. A tuple or a list holds positional arguments of
        the model, and any other item is a single argument; plates then draw their
        rows.
    epochs : int, default 1
        The number of epochs, including those before `initial_epoch`.
    state : SVIState, optional
        The state to start from. It is copied. By default, ``init`` makes one from the
        first batch.
    initial_epoch : int, default 0
        The number of the first epoch: how many epochs `state` has been trained for.
        With the same batches, the fit is bit for bit one that never stopped; from
        process to process, if these have one ``PYTHONHASHSEED``, since NumPyro adds
        sites up in the order of a set.
    validation : iterable, or callable, optional
        Batches to evaluate after each epoch, in the form of `batches`. They use the
        same random numbers in each epoch.
    patience : int, optional
        Stop after this number of successive epochs without a lower validation loss.
        The result then holds the best state, even if the fit does not stop early. The
        number of epochs is not kept when a fit is resumed.
    callback : callable, optional
        Called as ``callback(epoch, state, loss)`` after each epoch, with its number
        from 0, and its mean loss. The next step overwrites the memory of `state`, so
        copy what you keep. The fit stops if the callback returns a true value.
    progress_bar : bool, default True
        Show steps, mean loss and batch sizes.
    stable_update : bool, default False
        Skip steps whose loss or gradients are not finite, as ``stable_update`` does.
        The mean loss leaves them out.
    check_finite : bool, default True
        Check after each epoch that the losses are finite.
    steps_per_dispatch : int, optional
        At most how many steps to hand to the device at once. Their batches are in
        memory together. By default, as many as fit 4 MiB, at most 64. It is 1 where
        batches hold JAX arrays, which are on the device already. Losses are the same
        up to rounding, whatever it is.

    Returns
    -------
    FitResult
        After Ctrl-C, it holds the state after the last step.

    Raises
    ------
    TypeError
        If `rng_key` is not a random key.
    FloatingPointError
        If a loss is not finite and `check_finite` is true. With `stable_update`, only
        if no loss of an epoch is finite.
    ValueError
        If `state` is that of another model, guide or optimizer; if `batches` never
        ends, or is an iterator, which ends after one epoch, and `epochs` asks for more;
        if an epoch has no batch; if `patience` is given without `validation`, or
        `initial_epoch` without `state`; if a number is smaller than 1.
    Exception
        Whatever `batches`, `callback`, the model or the guide raise.

    Warns
    -----
    UserWarning
        Once, if the step is compiled for a third size of batches without capacity; if
        the first epoch trains none of the rows of `validation`, whose latents the guide
        then does not know; if `initial_epoch` is larger than `epochs`.

    Notes
    -----
    An error that ends the fit has an attribute ``fit_result``: the ``FitResult`` of
    all steps before it. Two kinds have none: errors before the first step, and those
    that come out of a step that runs, as from ``jax.pure_callback``, since the device
    has lost the state then.

    The mean loss of an epoch gives each row the same weight: a step has the count of
    the first plate in its batch's `rows` as weight. Batches without rows have the same
    weight.

    Consecutive batches of one shape are stacked on the host, and one program steps
    through them. It takes any number of them, so that the short rest of an epoch needs
    no other program. Batches are made in the calling thread while the device works on
    those before. All batches of an epoch have been trained on before its validation,
    its callback, and the first batch of the next epoch; after an error or Ctrl-C, so
    have all that were made. Losses are fetched once an epoch.

    Each call compiles again. For work between epochs, use a callback.

    Examples
    --------
    >>> def load(rows):
    ...     return minibatch(X[rows], y[rows], rows={"people": rows}, capacity=32)
    >>> def shuffled(epoch):
    ...     order = np.random.default_rng(epoch).permutation(N)
    ...     return map(load, np.split(order, range(32, N, 32)))
    >>> result = svi.fit(key, shuffled, epochs=3, progress_bar=False)
    >>> result.compilations
    1

    To go on, up to 5 epochs:

    >>> result = svi.fit(
    ...     key, shuffled, 5, state=result.state, initial_epoch=3, progress_bar=False
    ... )
    >>> len(result.epoch_losses)
    2

    To keep what was fitted before an error:

    >>> def failing(epoch):
    ...     yield from shuffled(epoch)
    ...     if epoch == 1:
    ...         raise OSError("The disk has gone.")
    >>> try:
    ...     result = svi.fit(key, failing, epochs=3, progress_bar=False)
    ... except OSError as error:
    ...     result = error.fit_result
    >>> result.stopped, len(result.epoch_losses)
    ('error', 1)
    """
    check_key(rng_key)
    _check_arguments(
        epochs, state, initial_epoch, validation, patience, steps_per_dispatch
    )
    if initial_epoch >= epochs and self.constrain_fn is None:
        raise ValueError(
            f"No epoch is left after {initial_epoch} of {epochs}, and this SVI has not "
            "seen the model yet. Call svi.init first, or leave the fit out."
        )
    if initial_epoch > epochs:
        warn(
            f"No epoch is left: epochs={epochs} counts those before "
            f"initial_epoch={initial_epoch}.",
            UserWarning,
        )
    _check_batches("batches", batches, epochs - initial_epoch)
    if validation is not None:
        _check_batches("validation", validation, epochs - initial_epoch)
    compilations = 0

    def one(state: SVIState, _: Any, batch: Minibatch) -> tuple[SVIState, Any]:
        return (self.stable_update if stable_update else self.update)(state, batch)

    @partial(jax.jit, donate_argnums=0)
    def step(state: SVIState, batch: Any, count: Any) -> tuple[SVIState, Any]:
        # Python runs this only when JAX traces, once per compilation.
        nonlocal compilations
        compilations += 1
        return in_turn(one, state, batch, count)

    @jax.jit
    def evaluate(state: SVIState, batch: Any, count: Any, number: Any) -> Any:
        def one(_: None, place: Any, batch: Minibatch) -> tuple[None, Any]:
            key = jax.random.fold_in(rng_key, number + place)
            return None, self.evaluate(state._replace(rng_key=key), batch)

        return in_turn(one, None, batch, count)[1]

    def train(batch: Any, count: Any, _: int) -> Any:
        nonlocal now, compilations
        before = compilations
        if not before:
            bar.bar_format = "compiling"
            bar.refresh()
        try:
            now, losses = step(now, batch, count)
        except Exception:
            compilations = before
            raise
        bar.bar_format = None
        return losses

    def hold_out(batch: Any, count: Any, number: int) -> Any:
        return evaluate(now, batch, count, number)

    def begin(batch: Minibatch) -> None:
        nonlocal now
        if now is None or self.constrain_fn is None:
            # `init` also sets up a new SVI that is given a state.
            fresh = self.init(rng_key, batch)
            now = fresh if now is None else now
        if not passes:
            check_state(self, now)

    now: Any = None if state is None else jax.tree.map(jnp.copy, state)
    passes: list[_Losses] = []
    epoch_losses: list[float] = []
    validation_losses: list[float] = []
    best, best_loss, worse = None, np.inf, 0
    stopped, whole_step, sizes = None, _WholeStep(), Sizes(self.loss)
    # Until there is a step to count, it says what takes the time.
    bar = tqdm(bar_format="initialising", unit="step", disable=not progress_bar)
    training = Chunks(train, steps_per_dispatch, whole_step)
    validating = Chunks(hold_out, steps_per_dispatch, whole_step)

    def result(stopped: str | None) -> FitResult:
        return FitResult(
            params=self.get_params(now),
            state=now,
            losses=np.concatenate([np.zeros(0), *(own.fetch() for own in passes)]),
            epoch_losses=np.array(epoch_losses),
            validation_losses=np.array(validation_losses),
            stopped=stopped,
            compilations=compilations,
        )

    with bar, _interrupts_handled_by(whole_step.on_interrupt):
        try:
            for epoch in range(initial_epoch, epochs):
                given = _of_epoch(batches, epoch)
                steps = length_hint(given) or (len(passes[-1].counts) if passes else 0)
                bar.total = bar.n + (epochs - epoch) * steps or None
                losses = _Losses("step", epoch, stable_update)
                losses.rows = None if passes or validation is None else []

                def done(some: list, of_some: Any, losses: _Losses = losses) -> None:
                    losses.add(some, of_some)
                    sizes.see(some[0])
                    bar.update(len(some))

                bar.set_description_str(f"epoch {epoch + 1}/{epochs}", refresh=False)
                first, made = _checked(given, epoch)
                begin(first)
                passes.append(losses)
                training.run(made, done)
                epoch_losses.append(losses.mean(check_finite))
                shown = {"loss": f"{epoch_losses[-1]:,.4f}"}
                if validation is not None:
                    held_out = _Losses("validation batch", epoch)
                    held_out.rows = None if losses.rows is None else []
                    given = _of_epoch(validation, epoch)
                    validating.run(_checked(given, epoch)[1], held_out.add)
                    if losses.rows is not None and held_out.rows is not None:
                        warn_of_untrained_rows(self.guide, losses.rows, held_out.rows)
                        losses.rows = None
                    validation_losses.append(held_out.mean(check_finite))
                    shown["validation"] = f"{validation_losses[-1]:,.4f}"
                bar.total = bar.n + (epochs - epoch - 1) * len(losses.counts)
                bar.set_postfix(shown | losses.sizes(), refresh=False)
                if callback is not None and callback(epoch, now, epoch_losses[-1]):
                    stopped = "callback"
                if patience is not None:
                    worse += 1
                    if validation_losses[-1] < best_loss:
                        best_loss, worse = validation_losses[-1], 0
                        best = jax.tree.map(jnp.copy, now)
                    if worse == patience:
                        stopped = "patience"
                if stopped is not None:
                    break
            now = now if best is None else best
        except KeyboardInterrupt:
            # A second Ctrl-C may interrupt a step, which has deleted its old state.
            if now is None or any(x.is_deleted() for x in jax.tree.leaves(now)):
                raise
            stopped = "interrupt"
        except BaseException as error:
            reached = None
            # A step that has failed on the device leaves nothing that can be read.
            with suppress(Exception):
                reached = jax.block_until_ready(result("error"))
            if reached is not None:
                error.fit_result = reached  # ty: ignore[missing-attribute]
                error.add_note(
                    f"This ended fit in epoch {epoch} (from 0), after "
                    f"{len(reached.losses)} steps. The FitResult of these steps is the "
                    "attribute fit_result of this error."
                )
            raise
    return result(stopped)


class _WholeStep:
    """Delays Ctrl-C until the end of a step, which deletes its old state at its start.

    A second Ctrl-C is not delayed.
    """

    running = interrupted = False

    def __enter__(self) -> None:
        self.running = True

    def __exit__(self, *_: Any) -> None:
        self.running = False
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def on_interrupt(self, *_: Any) -> None:
        if self.interrupted or not self.running:
            raise KeyboardInterrupt
        self.interrupted = True


@contextmanager
def _interrupts_handled_by(handler: Callable) -> Generator[None]:
    default, main = signal.default_int_handler, current_thread() is main_thread()
    # Only the main thread can set a handler. A handler of the user's is left in place.
    if not main or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


class _Losses:
    """Losses of batches, left on the device until they are fetched."""

    def __init__(self, what: str, epoch: int, skips: bool = False) -> None:
        self._what, self._epoch, self._skips = what, epoch, skips
        self._losses: list[Any] = []
        self._weights: list[int] = []
        self.counts: list[dict[str, Any]] = []
        # Those of the first batches, for a look at the validation.
        self.rows: list[dict[str, Any]] | None = None

    def add(self, batches: Sequence[Minibatch], losses: Any) -> None:
        """Add the losses of some batches, the first ones of an array."""
        self._losses.append((losses, len(batches)))
        for batch in batches:
            counts, rows = batch.counts, batch.rows
            self.counts.append(counts)
            if self.rows is not None:
                self.rows.append(batch.pinned)
            self._weights.append(counts[next(iter(rows))] if rows else 1)

    def fetch(self) -> np.ndarray:
        arrays = [np.atleast_1d(losses)[:count] for losses, count in self._losses]
        self._losses = [(array, len(array)) for array in arrays]
        return np.concatenate([np.zeros(0), *arrays])

    def mean(self, check_finite: bool) -> float:
        """Return the mean loss of the rows."""
        losses, weights = self.fetch(), np.array(self._weights)
        finite = np.isfinite(losses)
        if check_finite and not (finite.any() if self._skips else finite.all()):
            self._raise_at(int(np.argmin(finite)))
        kept = finite if self._skips else np.full(len(losses), True)
        if not kept.any():
            return np.nan
        return float(np.average(losses[kept], weights=weights[kept]))

    def sizes(self) -> dict[str, str]:
        """Return the range of the counts of each plate, as text."""
        plates = {plate for own in self.counts for plate in own}
        return {
            plate: span([own[plate] for own in self.counts if plate in own])
            for plate in sorted(plates)
        }

    def _raise_at(self, number: int) -> None:
        counts = self.counts[number].items()
        held = [f"{count} rows of plate '{plate}'" for plate, count in counts]
        raise FloatingPointError(
            f"The loss is {self.fetch()[number]} in {self._what} {number} of epoch "
            f"{self._epoch} (both from 0), with {', '.join(held) or 'no plate named'}. "
            "Likely reasons: the data are not finite, or NaN; rows or counts that "
            "minibatch(...) did not check are out of range; the step size is too "
            "large. jax.debug_nans(True) names the operation, stable_update=True skips "
            "such steps of the training, and check_finite=False goes on."
        )


def span(counts: Sequence[int] | np.ndarray) -> str:
    """Return the range of counts, as text."""
    low, high = np.min(counts), np.max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _of_epoch(batches: Batches, epoch: int) -> Iterable[Any]:
    return batches if isinstance(batches, Iterable) else batches(epoch)


def _checked(given: Iterable[Any], epoch: int) -> tuple[Minibatch, Iterator[Minibatch]]:
    """Return the first batch of an epoch, and all of them."""
    batches = map(as_minibatch, given)
    for first in batches:
        return first, chain([first], batches)
    raise ValueError(
        f"There is no batch in epoch {epoch}. Give an iterable that starts anew each "
        "time, or a function of the epoch's number that returns one."
    )


def _check_arguments(
    epochs: int,
    state: SVIState | None,
    initial_epoch: int,
    validation: Batches | None,
    patience: int | None,
    steps_per_dispatch: int | None,
) -> None:
    numbers = {
        "epochs": epochs,
        "patience": patience,
        "steps_per_dispatch": steps_per_dispatch,
    }
    for what, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, but is {number}.")
    if initial_epoch and state is None:
        raise ValueError(
            f"initial_epoch is {initial_epoch}, but there is no state to go on from. "
            "Give the state after that many epochs."
        )
    if patience is not None and validation is None:
        raise ValueError(
            f"patience is {patience}, but there is no validation loss to wait for. "
            "Give validation batches."
        )


def _check_batches(what: str, batches: Any, epochs: int) -> None:
    if isinstance(batches, Minibatch | np.ndarray | jax.Array):
        raise ValueError(
            f"{what} is a single {type(batches).__name__}. Put it into a list, for one "
            "step an epoch, or cut it into several."
        )
    if not (isinstance(batches, Iterable) or callable(batches)):
        raise ValueError(
            f"{what} must be a list or a loader of batches, or a function of the "
            f"epoch's number that returns one, not {type(batches).__name__}."
        )
    if length_hint(batches) >= ENDLESS:
        raise ValueError(
            f"{what} never ends: it says that it has {length_hint(batches):,} batches. "
            "Leave out repeat(), since fit repeats what it is given epochs times."
        )
    if isinstance(batches, Iterator) and epochs > 1:
        raise ValueError(
            f"{what} is an iterator ({type(batches).__name__}), which ends after one "
            f"epoch of {epochs}. Give a list, a loader, or a function of the epoch's "
            "number that returns an iterator."
        )
