import os

# Compiling is what this suite spends its time on. The programs that it compares
# are compiled alike.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpyro
import pytest
from numpyro.infer import autoguide
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import _PYRO_STACK


def numpyro_state():
    """What a handler of this library touches in NumPyro."""
    classes = [vars(autoguide)[name] for name in autoguide.__all__]
    return (
        list(_PYRO_STACK),
        vars(numpyro.plate)["_subsample"],
        [dict(vars(cls)) for cls in classes],
        "__init_subclass__" in vars(AutoGuide),
    )


@pytest.fixture(autouse=True)
def numpyro_stays_as_it_was():
    before = numpyro_state()
    yield
    after = numpyro_state()
    _PYRO_STACK.clear()
    assert after == before
