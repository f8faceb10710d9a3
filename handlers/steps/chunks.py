"""Several steps in one dispatch: batches of one shape, stacked on the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..batches.minibatch import Minibatch

# A dispatch takes some 0.1 ms on the host, most of what a step on a small batch takes
# and nothing beside one on a large batch. So batches go together up to so many bytes.
BYTES, STEPS = 2**22, 64
ON_HOST = (np.ndarray, np.generic)
# A device that has nothing to do waits for more batches, for so many seconds: several
# times of what a dispatch takes, which few batches are not worth.
WAIT = 2.5e-3


def in_turn(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    batch: Any,
    count: Any,
) -> tuple[Any, Any]:
    """Take one step, or some in turn, inside of a compiled function.

    Parameters
    ----------
    step : callable
        Takes what is carried, the place of the batch and the batch, and returns what is
        carried and the loss.
    carry : pytree
        What the first step takes.
    batch : pytree
        A batch, or several stacked along a first axis of size `room`.
    count : int, or None
        How many of the stacked batches to use, the first ones. None for one batch that
        is not stacked. As the count is traced, one program serves all of them.

    Returns
    -------
    carry : pytree
        What the last step returned.
    losses : array of shape () or (room,)
        The losses of the steps, and zeros.
    """
    if count is None:
        return step(carry, 0, batch)

    def body(place: Any, now: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, losses = now
        own = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False),
            batch,
        )
        carry, loss = step(carry, place, own)
        return carry, losses.at[place].set(loss)

    room = len(jax.tree.leaves(batch)[0])
    return jax.lax.fori_loop(0, count, body, (carry, jnp.zeros(room)))


class Chunks:
    """Hands batches on in chunks, and goes on to gather while the device works.

    A chunk ends when it is full, when a batch of another shape comes, at the end of the
    batches, and when the device waits. Results do not depend on where it ends.

    Parameters
    ----------
    dispatch : callable
        Called as ``dispatch(batch, count, number)`` with what ``in_turn`` takes and the
        number of the first batch. Returns the losses, still being computed.
    at_most : int, optional
        At most how many batches a chunk has; by default, as many as fit ``BYTES``.
    whole : context manager, optional
        Entered around all that must not be interrupted halfway.
    """

    def __init__(
        self,
        dispatch: Callable[[Any, Any, int], Any],
        at_most: int | None = None,
        whole: AbstractContextManager | None = None,
    ) -> None:
        self._dispatch, self._at_most = dispatch, at_most
        self._whole = nullcontext() if whole is None else whole
        self._gathered: list[Minibatch] = []
        self._running: deque[Any] = deque()
        self._shape: Any = None

    def run(
        self, batches: Iterable[Minibatch], done: Callable[[list, Any], None]
    ) -> None:
        """Hand on all batches.

        Parameters
        ----------
        batches : iterable
            The batches. If it raises an error, those before are handed on.
        done : callable
            Called with the batches of each chunk, and their losses.
        """
        self._done, self._number = done, 0
        self._since = time.perf_counter()
        try:
            for batch in batches:
                shape, size = _shape(batch)
                if self._gathered and shape != self._shape:
                    with self._whole:
                        self._hand_on()
                with self._whole:
                    self._add(batch, shape, size)
        finally:
            with self._whole:
                self._hand_on()

    def _add(self, batch: Minibatch, shape: Any, size: int) -> None:
        self._gathered.append(batch)
        self._shape, self._room = shape, self._room_for(shape, size)
        waits = all(losses.is_ready() for losses in self._running)
        late = time.perf_counter() - self._since > WAIT
        if len(self._gathered) >= self._room or (waits and late):
            self._hand_on()

    def _room_for(self, shape: Any, size: int) -> int:
        # JAX cannot tell which operation of a loop has made a NaN.
        debugs = [getattr(jax.config, f"jax_debug_{what}") for what in ("nans", "infs")]
        if shape is None or any(debugs):
            return 1
        return self._at_most or min(max(BYTES // max(size, 1), 1), STEPS)

    def _hand_on(self) -> None:
        # Taken first, so that what has failed is not tried again.
        batches, self._gathered = self._gathered, []
        if not batches:
            return
        while len(self._running) > 1:
            # The memory holds the chunk at work, the next and one that is gathered.
            self._running.popleft().block_until_ready()
        if self._room == 1:
            self._one_by_one(batches)
        else:
            stacked = _stacked(batches, self._room)
            try:
                self._go(batches, stacked, np.int32(len(batches)))
            except (NotImplementedError, TypeError):
                # A loop needs a state whose types stay, and knows fewer effects. If
                # that is not the reason, a single step fails, too.
                self._at_most = 1
                self._one_by_one(batches)
        self._since = time.perf_counter()

    def _one_by_one(self, batches: list[Minibatch]) -> None:
        for batch in batches:
            self._go([batch], batch, None)

    def _go(self, batches: list[Minibatch], given: Any, count: Any) -> None:
        losses = self._dispatch(given, count, self._number)
        self._running.append(losses)
        self._number += len(batches)
        self._done(batches, losses)


def _shape(batch: Minibatch) -> tuple[Any, int]:
    """Return what batches of a chunk have in common, if it can be, and the size."""
    leaves, structure = jax.tree.flatten(batch)
    shape, size = [structure], 0
    for leaf in leaves:
        if not isinstance(leaf, ON_HOST):
            return None, 0
        shape += leaf.shape, leaf.dtype
        size += leaf.nbytes
    return (shape, size) if leaves else (None, 0)


def _stacked(batches: list[Minibatch], room: int) -> Minibatch:
    """Stack batches along a new first axis of a size; the rest of it holds anything."""

    def stack(*leaves: Any) -> np.ndarray:
        dtype = jax.dtypes.canonicalize_dtype(leaves[0].dtype)
        # A new one each time: the device may still read the last one.
        whole = np.empty((room, *leaves[0].shape), dtype)
        for place, leaf in enumerate(leaves):
            whole[place] = leaf
        return whole

    return jax.tree.map(stack, *batches)
