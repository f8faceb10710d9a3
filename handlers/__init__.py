"""Mini-batches of any size for NumPyro's automatic guides."""

from .dynamic_subsample import dynamic_subsample

__all__ = ["dynamic_subsample"]
