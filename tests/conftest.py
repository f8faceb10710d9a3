import gc
import os
from importlib.metadata import version
from pathlib import Path

# Compiling is what this suite spends its time on. The programs that it compares are
# compiled alike, and often to the same; processes share what they compile, and later
# runs find it again, unless with ``--cache-clear``.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # an unknown flag would end the process
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# NumPyro adds sites up in the order of a set: now it is the same in all processes.
os.environ.setdefault("PYTHONHASHSEED", "0")
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "d" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import numpyro  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from numpyro.contrib.funsor.enum_messenger import plate as enum_plate  # noqa: E402
from numpyro.infer import Predictive, autoguide  # noqa: E402
from numpyro.infer.autoguide import AutoGuide  # noqa: E402
from numpyro.primitives import _PYRO_STACK  # noqa: E402

from numpyro_dynamic_subsample.steps import programs  # noqa: E402

# What JAX traces is many small objects, which Python would go through time and again.
gc.freeze()
gc.set_threshold(100_000)

# The same examples in every run, so that one fails for what has changed. Some compile.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")

CHANGED = [
    (numpyro.plate, "_subsample"),
    (numpyro.plate, "postprocess_message"),
    (enum_plate, "postprocess_message"),
    (Predictive, "__call__"),
]


def numpyro_state():
    """What a handler of this library touches in NumPyro."""
    classes = [vars(autoguide)[name] for name in autoguide.__all__]
    return (
        list(_PYRO_STACK),
        [vars(cls)[name] for cls, name in CHANGED],
        [dict(vars(cls)) for cls in classes],
        "__init_subclass__" in vars(AutoGuide),
    )


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """A process can map only so much memory, and each compiled program maps some."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        programs._programs.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def numpyro_stays_as_it_was():
    before = numpyro_state()
    yield
    after = numpyro_state()
    _PYRO_STACK.clear()
    assert after == before
