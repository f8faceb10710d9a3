"""Mini-batches of any size for NumPyro's automatic guides."""

from importlib.metadata import version as _version

from .batches.groups import RaggedGroups
from .batches.minibatch import Minibatch, minibatch
from .batches.padding import valid_rows
from .effect.alignment import MisalignedSubsampleWarning, UnscaledSubsampleWarning
from .effect.dynamic_subsample import dynamic_subsample
from .steps.subsample_svi import SubsampleSVI

__all__ = [
    "Minibatch",
    "MisalignedSubsampleWarning",
    "RaggedGroups",
    "SubsampleSVI",
    "UnscaledSubsampleWarning",
    "dynamic_subsample",
    "minibatch",
    "valid_rows",
]

__version__ = _version("numpyro-dynamic-subsample")
