"""Several steps in one dispatch: each batch once, in order, and none waited for."""

import time
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpyro_dynamic_subsample.batches.minibatch import as_minibatch
from numpyro_dynamic_subsample.steps import chunks as chunks_module
from numpyro_dynamic_subsample.steps.chunks import Chunks


class Unfinished:
    """Losses that the device has not computed before somebody waits for them."""

    running = 0

    def __init__(self):
        Unfinished.running += 1
        assert Unfinished.running <= 2

    def is_ready(self):
        return False

    def block_until_ready(self):
        Unfinished.running -= 1


@given(st.lists(st.integers(1, 3), max_size=12), st.integers(1, 4), st.booleans())
def test_chunks_hold_each_batch_once_and_in_order(lengths, together, fails):
    sent, done = [], []

    def dispatch(batch, count, number):
        assert number == len(sent)
        (values,) = batch.args
        assert len(values) == together or count is None
        sent.extend(values[None] if count is None else values[:count])
        return Unfinished()

    def made():
        for number, length in enumerate(lengths):
            yield as_minibatch(np.full(length, number))
        if fails:
            raise OSError

    Unfinished.running = 0
    chunks = Chunks(dispatch, together)
    with pytest.raises(OSError) if fails else nullcontext():
        chunks.run(made(), lambda batches, losses: done.extend(batches))
    assert [own.tolist() for own in sent] == [
        [number] * length for number, length in enumerate(lengths)
    ]
    assert [own.args[0].tolist() for own in done] == [own.tolist() for own in sent]


def test_slow_loaders_do_not_let_the_device_wait():
    sent = []

    def dispatch(batch, count, number):
        sent.append(count)
        return np.zeros(1)

    class Ready(np.ndarray):
        is_ready = staticmethod(lambda: True)
        block_until_ready = staticmethod(lambda: None)

    def slow():
        for number in range(3):
            time.sleep(0.02)
            assert len(sent) == number
            yield as_minibatch(np.zeros(2))

    Chunks(lambda *of: dispatch(*of).view(Ready)).run(slow(), lambda *_: None)
    assert sent == [1, 1, 1]


@pytest.mark.parametrize(
    ("made", "debug", "counts"),
    [(np.zeros, False, [3]), (np.zeros, True, [None] * 3), (jnp.zeros, False, None)],
)
def test_steps_that_must_be_alone(made, debug, counts, monkeypatch):
    sent = []

    def dispatch(batch, count, number):
        sent.append(count)
        return jnp.zeros(4)

    monkeypatch.setattr(chunks_module, "WAIT", 60)
    with jax.debug_nans(debug):
        Chunks(dispatch).run([as_minibatch(made(2))] * 3, lambda *_: None)
    assert sent == (counts or [None] * 3)
