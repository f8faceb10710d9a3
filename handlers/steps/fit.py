"""The training loop: batches by the epoch, through one compiled step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from ..batches.minibatch import Minibatch, as_minibatch

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class FitResult(NamedTuple):
    """The result of ``SubsampleSVI.fit``.

    Attributes
    ----------
    params : dict
        The parameters of `state`, as ``svi.get_params`` returns them.
    state : SVIState
        The last state. With `patience`, the state of the best validation loss.
    losses : array of shape (steps,)
        The loss of each step.
    epoch_losses : array of shape (epochs,)
        The mean loss of each complete epoch.
    validation_losses : array of shape (epochs,)
        The mean validation loss of each complete epoch. Empty without validation.
    stopped : str or None
        What ended the fit early: ``"patience"``, ``"callback"`` or ``"interrupt"``.
    compilations : int
        How often JAX compiled the training step.
    """

    params: dict[str, Any]
    state: SVIState
    losses: np.ndarray
    epoch_losses: np.ndarray
    validation_losses: np.ndarray
    stopped: str | None
    compilations: int


def fit(
    svi: SubsampleSVI,
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
) -> FitResult:
    """Train on batches for several epochs, with one compiled step.

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
        With the same batches, the fit is bit for bit one that never stopped.
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

    Returns
    -------
    FitResult
        After Ctrl-C, it holds the state after the last step.

    Raises
    ------
    FloatingPointError
        If a loss is not finite and `check_finite` is true. With `stable_update`, only
        if no loss of an epoch is finite.
    ValueError
        If `batches` is an iterator, which ends after one epoch, and `epochs` asks for
        more; if an epoch has no batch; if `patience` is given without `validation`, or
        `initial_epoch` without `state`.

    Notes
    -----
    The mean loss of an epoch gives each row the same weight: a step has the count of
    the first plate in its batch's `rows` as weight. Batches without rows have the same
    weight.

    Losses are fetched once an epoch, so JAX runs a step while the next batch is made.
    Each call compiles again. For work between epochs, use a callback.

    Examples
    --------
    >>> def batches(epoch):
    ...     order = np.random.default_rng(epoch).permutation(len(X))
    ...     for rows in np.split(order, range(256, len(X), 256)):
    ...         yield minibatch(X[rows], rows={"n": rows}, capacity=256)
    >>> result = svi.fit(jax.random.key(0), batches, epochs=50)
    """
    _check_arguments(epochs, state, initial_epoch, validation, patience)
    if initial_epoch >= epochs and svi.constrain_fn is None:
        raise ValueError(
            f"No epoch is left after {initial_epoch} of {epochs}, and this SVI has not "
            "seen the model yet. Call svi.init first, or leave the fit out."
        )
    for what, given in (("batches", batches), ("validation", validation)):
        _check_batches(what, given, epochs - initial_epoch)
    compilations = 0

    @partial(jax.jit, donate_argnums=0)
    def step(state: SVIState, batch: Minibatch) -> tuple[SVIState, Any]:
        # Python runs this only when JAX traces, once per compilation.
        nonlocal compilations
        compilations += 1
        return (svi.stable_update if stable_update else svi.update)(state, batch)

    @jax.jit
    def evaluate(state: SVIState, number: int, batch: Minibatch) -> Any:
        key = jax.random.fold_in(rng_key, number)
        return svi.evaluate(state._replace(rng_key=key), batch)

    now: Any = None if state is None else jax.tree.map(jnp.copy, state)
    passes: list[_Losses] = []
    epoch_losses: list[float] = []
    validation_losses: list[float] = []
    best, best_loss, worse = None, np.inf, 0
    stopped, whole_step = None, _WholeStep()
    bar = tqdm(unit="step", disable=not progress_bar)
    with bar, _interrupts_handled_by(whole_step.on_interrupt):
        try:
            for epoch in range(initial_epoch, epochs):
                bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
                losses = _Losses("step", epoch, skips=stable_update)
                passes.append(losses)
                for batch in _batches_of(batches, epoch):
                    if now is None or svi.constrain_fn is None:
                        # `init` also sets up a new SVI that is given a state.
                        fresh = svi.init(rng_key, batch)
                        now = fresh if now is None else now
                    with whole_step:
                        now, loss = step(now, batch)
                        losses.add(batch, loss)
                    bar.update()
                epoch_losses.append(losses.mean(check_finite))
                shown = {"loss": f"{epoch_losses[-1]:,.4f}"}
                if validation is not None:
                    held_out = _Losses("validation batch", epoch)
                    for number, batch in enumerate(_batches_of(validation, epoch)):
                        held_out.add(batch, evaluate(now, number, batch))
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
    return FitResult(
        params=svi.get_params(now),
        state=now,
        losses=np.array([loss for losses in passes for loss in losses.fetch()]),
        epoch_losses=np.array(epoch_losses),
        validation_losses=np.array(validation_losses),
        stopped=stopped,
        compilations=compilations,
    )


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

    def add(self, batch: Minibatch, loss: Any) -> None:
        self._losses.append(loss)
        self.counts.append(batch.counts)
        self._weights.append(batch.counts[next(iter(batch.rows))] if batch.rows else 1)

    def fetch(self) -> np.ndarray:
        # Ten times as fast as `jax.device_get` of a list of scalars.
        self._losses[:] = [float(np.asarray(loss)) for loss in self._losses]
        return np.array(self._losses)

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
            f"The loss is {self._losses[number]} in {self._what} {number} of epoch "
            f"{self._epoch} (both from 0), with {', '.join(held) or 'no plate named'}. "
            "Likely reasons: the data are not finite; rows or counts that "
            "minibatch(...) did not check are out of range; the step size is too "
            "large. jax.debug_nans(True) names the operation, stable_update=True skips "
            "such steps, and check_finite=False goes on."
        )


def span(counts: Sequence[int] | np.ndarray) -> str:
    """Return the range of counts, as text."""
    low, high = np.min(counts), np.max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _batches_of(batches: Batches, epoch: int) -> Iterator[Minibatch]:
    """Yield the batches of an epoch."""
    given = batches if isinstance(batches, Iterable) else batches(epoch)
    batch = None
    for batch in map(as_minibatch, given):
        yield batch
    if batch is None:
        raise ValueError(
            f"There is no batch in epoch {epoch}. Give an iterable that starts anew "
            "each time, or a function of the epoch's number that returns one."
        )


def _check_arguments(
    epochs: int,
    state: SVIState | None,
    initial_epoch: int,
    validation: Batches | None,
    patience: int | None,
) -> None:
    if epochs < 1 or (patience is not None and patience < 1):
        raise ValueError(
            f"epochs and patience must be at least 1, but are {epochs} and {patience}."
        )
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
    if isinstance(batches, Iterator) and epochs > 1:
        raise ValueError(
            f"{what} is an iterator ({type(batches).__name__}), which ends after one "
            f"epoch of {epochs}. Give a list, a loader, or a function of the epoch's "
            "number that returns an iterator."
        )
