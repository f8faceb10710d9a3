"""The training loop: batches by the epoch, through one compiled step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from .minibatch import Minibatch, as_minibatch

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class FitResult(NamedTuple):
    """What ``SubsampleSVI.fit`` has come to.

    Attributes
    ----------
    params : dict
        The parameters of `state`, as ``svi.get_params`` gives them.
    state : SVIState
        The last state, or with `patience`, that of the best validation loss.
    losses : array of shape (steps,)
        The loss of each step.
    epoch_losses : array of shape (epochs,)
        The mean loss of each epoch that has been completed.
    validation_losses : array of shape (epochs,)
        The same of the validation batches; empty without any.
    stopped : str or None
        What ended the fit early: ``"patience"``, ``"callback"`` or ``"interrupt"``.
    compilations : int
        How often the training step has been compiled.
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
    """Train on batches, epoch after epoch, with a step that is compiled once.

    Parameters
    ----------
    rng_key : array
        The random key of ``init`` and of the validation.
    batches : iterable, or callable
        What an epoch goes through: a list, a loader of grain or torch, or a function
        that is given the number of the epoch, from 0, and returns one. Its items are
        those that ``minibatch`` makes. A tuple or list is taken as positional
        arguments of the model, and anything else as a single one; plates then draw
        their rows.
    epochs : int, default 1
        How many epochs the fit has, those before `initial_epoch` included.
    state : SVIState, optional
        A state to go on from. It is copied. By default, ``init`` makes one from the
        first batch.
    initial_epoch : int, default 0
        The number of the first epoch, that is, how many `state` has behind it. With
        the same batches, the fit then goes on bit for bit as if it had never stopped.
    validation : iterable, or callable, optional
        Batches to evaluate after each epoch, given as `batches` are. Their random
        numbers are the same each time.
    patience : int, optional
        Stop after so many epochs in a row without a lower validation loss. The result
        then holds the best state, also where all epochs are run. After a resumption,
        patience counts anew.
    callback : callable, optional
        Called as ``callback(epoch, state, loss)`` after each epoch, with its number
        from 0, and its mean loss. The next step takes the memory of `state`, so copy
        what you keep. The fit ends if it returns something true, as some functions
        that save do: return nothing to go on.
    progress_bar : bool, default True
        Show steps, mean loss and batch sizes.
    stable_update : bool, default False
        Skip steps whose loss or gradients are not finite, as ``stable_update`` does.
        They are left out of the mean loss.
    check_finite : bool, default True
        Look for losses that are not finite, after each epoch.

    Returns
    -------
    FitResult
        After Ctrl-C, it holds the state after the last step.

    Raises
    ------
    FloatingPointError
        If a loss is not finite, unless `check_finite` is false. With `stable_update`,
        only if this is so in all steps of an epoch.
    ValueError
        If `batches` is an iterator, which ends after one epoch, and more are wanted;
        if an epoch has no batch; if `patience` is given without `validation`, or
        `initial_epoch` without `state`.

    Notes
    -----
    The mean loss of an epoch weighs each row alike: steps are weighed by the count of
    the first plate in the batch's `rows`. Batches without rows are weighed alike.

    Losses are fetched once an epoch, so that JAX runs a step while the next batch is
    made. Each call compiles anew. For work between epochs, use a callback.

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
        # Python comes here only when JAX traces, which is once per compilation.
        nonlocal compilations
        compilations += 1
        return (svi.stable_update if stable_update else svi.update)(state, batch)

    @jax.jit
    def evaluate(state: SVIState, number: int, batch: Minibatch) -> Any:
        key = jax.random.fold_in(rng_key, number)
        return svi.evaluate(state._replace(rng_key=key), batch)

    now: Any = None if state is None else jax.tree.map(jnp.copy, state)
    of_epochs: list[list[Any]] = []
    epoch_losses: list[float] = []
    validation_losses: list[float] = []
    best, best_loss, worse = None, np.inf, 0
    stopped = None
    bar = tqdm(unit="step", disable=not progress_bar)
    with bar, _WholeSteps.against_interrupts() as whole_steps:
        try:
            for epoch in range(initial_epoch, epochs):
                bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
                losses = _Losses("step", epoch)
                of_epochs.append(losses.losses)
                for batch in _batches_of(batches, epoch):
                    if now is None:
                        now = svi.init(rng_key, batch)
                    elif svi.constrain_fn is None:
                        # A new one has to see the model, whatever the state.
                        svi.init(rng_key, batch)
                    with whole_steps:
                        now, loss = step(now, batch)
                        losses.add(batch, loss)
                    bar.update()
                if check_finite:
                    losses.check_finite(skipped=stable_update)
                epoch_losses.append(losses.mean(skipped=stable_update))
                shown = {"loss": f"{epoch_losses[-1]:,.4f}"}
                if validation is not None:
                    held_out = _Losses("validation batch", epoch)
                    for number, batch in enumerate(_batches_of(validation, epoch)):
                        held_out.add(batch, evaluate(now, number, batch))
                    if check_finite:
                        held_out.check_finite()
                    validation_losses.append(held_out.mean())
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
            # A second Ctrl-C may have come in the midst of a step.
            if now is None or any(x.is_deleted() for x in jax.tree.leaves(now)):
                raise
            stopped = "interrupt"
    return FitResult(
        params=svi.get_params(now),
        state=now,
        losses=np.array([float(loss) for loss in chain(*of_epochs)]),
        epoch_losses=np.array(epoch_losses),
        validation_losses=np.array(validation_losses),
        stopped=stopped,
        compilations=compilations,
    )


class _WholeSteps:
    """Let Ctrl-C wait for the end of a step, whose old state is gone by then.

    A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.running = False
        self.asked = False

    @classmethod
    @contextmanager
    def against_interrupts(cls) -> Generator[_WholeSteps]:
        steps = cls()
        own = signal.default_int_handler
        # Python lets no other thread do this; and a handler of the user's stays.
        if current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is own:
            signal.signal(signal.SIGINT, steps._on_interrupt)
            try:
                yield steps
            finally:
                signal.signal(signal.SIGINT, own)
        else:
            yield steps

    def __enter__(self) -> None:
        self.running = True

    def __exit__(self, *_: Any) -> None:
        self.running = False
        if self.asked:
            raise KeyboardInterrupt

    def _on_interrupt(self, *_: Any) -> None:
        if self.asked or not self.running:
            raise KeyboardInterrupt
        self.asked = True


class _Losses:
    """The losses of some batches, left on the device until they are asked for."""

    def __init__(self, what: str, epoch: int) -> None:
        self.what = what
        self.epoch = epoch
        self.losses: list[Any] = []
        self.weights: list[int] = []
        self.counts: list[dict[str, Any]] = []

    def add(self, batch: Minibatch, loss: Any) -> None:
        self.losses.append(loss)
        self.counts.append(batch.counts)
        self.weights.append(batch.counts[next(iter(batch.rows))] if batch.rows else 1)

    def fetch(self) -> np.ndarray:
        # One by one: ten times as fast as `jax.device_get` of a list of scalars.
        self.losses[:] = [float(np.asarray(loss)) for loss in self.losses]
        return np.array(self.losses)

    def mean(self, skipped: bool = False) -> float:
        losses, weights = self.fetch(), np.array(self.weights)
        kept = np.isfinite(losses) if skipped else np.full(len(losses), True)
        if not kept.any():
            return np.nan
        return float(np.average(losses[kept], weights=weights[kept]))

    def sizes(self) -> dict[str, str]:
        """Name the smallest and the largest count of each plate."""
        plates = {plate for own in self.counts for plate in own}
        return {
            plate: span([own[plate] for own in self.counts if plate in own])
            for plate in sorted(plates)
        }

    def check_finite(self, skipped: bool = False) -> None:
        finite = np.isfinite(self.fetch())
        if finite.all() or (skipped and finite.any()):
            return
        number = int(np.argmin(finite))
        counts = self.counts[number].items()
        held = [f"{count} rows of plate '{plate}'" for plate, count in counts]
        raise FloatingPointError(
            f"The loss is {self.losses[number]} in {self.what} {number} of epoch "
            f"{self.epoch} (both from 0), with {', '.join(held) or 'no plate named'}. "
            "Likely reasons: the data are not finite; rows or counts that "
            "minibatch(...) did not check are out of range; the step size is too "
            "large. jax.debug_nans(True) names the operation, stable_update=True skips "
            "such steps, and check_finite=False goes on."
        )


def span(counts: Sequence[int] | np.ndarray) -> str:
    """Name the smallest and the largest of some counts."""
    low, high = np.min(counts), np.max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _batches_of(batches: Batches, epoch: int) -> Iterator[Minibatch]:
    """Go through the batches of an epoch."""
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
