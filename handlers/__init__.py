"""Mini-batches of any size for NumPyro's automatic guides."""

from importlib.metadata import version as _version

from .alignment import MisalignedSubsampleWarning, UnscaledSubsampleWarning
from .dynamic_subsample import dynamic_subsample
from .minibatch import Minibatch, minibatch
from .padding import pad_minibatch, valid_rows
from .subsample_svi import SubsampleSVI

__all__ = [
    "Minibatch",
    "MisalignedSubsampleWarning",
    "SubsampleSVI",
    "UnscaledSubsampleWarning",
    "dynamic_subsample",
    "minibatch",
    "pad_minibatch",
    "valid_rows",
]

__version__ = _version("numpyro-dynamic-subsample")
