"""How tests compare what they find, and count compilations."""

import re
from contextlib import contextmanager
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_dynamic_subsample import Minibatch


def numbers(tree):
    """A tree's leaves as NumPy's arrays, also those that are keys."""

    def of_leaf(leaf):
        is_key = jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(of_leaf, tree)


def compare(check, one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(check, numbers(one), numbers(other))


def assert_equal(one, other):
    """Bit for bit."""

    def check(a, b):
        np.testing.assert_array_equal(a, b, strict=True)
        assert a.tobytes() == b.tobytes()

    compare(check, one, other)


def assert_close(one, other, rtol=1e-12, atol=1e-12):
    """Whole numbers, and with them keys, must be equal."""

    def check(a, b):
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    compare(check, one, other)


def assert_same_mean(one, other, errors=5, atol=1e-3):
    """Within some standard errors, of draws along the first axis."""
    difference = one.mean(0) - other.mean(0)
    error = np.sqrt(one.var(0) / len(one) + other.var(0) / len(other))
    np.testing.assert_array_less(np.abs(difference), errors * error + atol)


@contextmanager
def compilations(name="backend_compile"):
    """Gather the events with this in their name, which JAX reports as it compiles."""
    found = []

    def listen(event, *_, **__):
        found.extend([event] if name in event else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        # Older versions of JAX listen to the end.
        stop = getattr(jax.monitoring, "unregister_event_duration_listener", None)
        if stop is not None:
            stop(listen)


def told(*args, rows=None, counts=None, **kwargs):
    """A batch whose rows and counts are given as they are, padding and all."""
    counts = dict(counts or {})
    return Minibatch(args, kwargs, dict(rows or {}), counts, padded=tuple(counts))


def pad(arrays, capacity):
    """Arrays of one length, padded by their last rows, and that length."""
    count = len(arrays[0])
    rows = np.minimum(np.arange(capacity), count - 1)
    return tuple(np.asarray(array)[rows] for array in arrays), count


def assert_prints(example, *printed):
    """What an example's docstring shows of its runs, numbers up to rounding."""
    shown = re.findall(r"^    \$ .*\n((?:    [^$ ].*\n)+)", example.__doc__, re.M)
    assert len(shown) == len(printed)
    number = re.compile(r"\d+(?:\.\d+)?")
    for one, other in zip(map(dedent, shown), printed, strict=True):
        other = "".join(other.splitlines(keepends=True)[: one.count("\n")])
        assert number.sub("#", one) == number.sub("#", other)
        numbers = [[float(n) for n in number.findall(text)] for text in (one, other)]
        np.testing.assert_allclose(*numbers, rtol=1e-3)
