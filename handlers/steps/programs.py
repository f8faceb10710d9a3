"""Compile what runs once, or find the program that computes the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import util as initialisation

from ..effect.internals import eval_jaxpr, replaced

# The last ones; each holds memory of the process.
_programs: OrderedDict[Any, Callable] = OrderedDict()
_MOST = 256

# They run once, so that compiling is most of what they take.
QUICKLY: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}
# Operations that run one after another round as they do by themselves.
EXACTLY = QUICKLY | {"xla_disable_hlo_passes": "constant_folding,fusion"}


def compiled(
    function: Callable, *args: Any, options: Mapping[str, Any] = QUICKLY
) -> Callable:
    """Compile a function of arrays, or find the program that computes the same.

    The program computes at once, whatever is being traced. What the function closes
    over is none of its constants, so that other data need no other program. A program
    that calls back to the host is used by nobody else, since its text does not tell
    what it calls. XLA's `options` are `QUICKLY`, `EXACTLY`, or none for a program that
    runs long.
    """
    if jax.config.jax_disable_jit:  # ty: ignore[missing-attribute]
        return function
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    consts = [jnp.asarray(const) for const in jaxpr.consts]
    lowered = jax.jit(partial(eval_jaxpr, jaxpr.jaxpr)).lower(
        consts, *jax.tree.leaves(args)
    )
    text = lowered.as_text()
    # The text leaves out the arguments that nothing is computed of.
    given = [
        (jnp.shape(leaf), jnp.result_type(leaf), getattr(leaf, "sharding", None))
        for leaf in jax.tree.leaves((consts, args))
    ]
    key = sha256(text.encode()).digest(), str(given), str(options)
    is_own = "callback" in text or bool(jaxpr.effects)
    program = None if is_own else _programs.get(key)
    if program is None:
        program = lowered.compile(dict(options))
        if not is_own:
            _programs[key] = program
            if len(_programs) > _MOST:
                _programs.popitem(last=False)
    structure = jax.tree.structure(shapes)

    def run(*args: Any) -> Any:
        leaves = program(consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return run


@contextmanager
def search_compiled() -> Generator[None]:
    """Let autoguides look for initial values in one program, instead of in hundreds."""
    search = initialisation.find_valid_initial_params

    def search_at_once(
        rng_key: jax.Array, model: Callable, *, prototype_params: Any, **options: Any
    ) -> Any:
        def find(rng_key: jax.Array) -> Any:
            # Not an argument, since JAX would sort its sites: each draws in its turn.
            return search(rng_key, model, prototype_params=prototype_params, **options)

        try:
            (params, *others), is_valid = compiled(find, rng_key)(rng_key)
        except Exception:
            # The model needs values, or is being traced already.
            return find(rng_key)
        return ({name: params[name] for name in prototype_params}, *others), is_valid

    with replaced(initialisation, find_valid_initial_params=search_at_once):
        yield
