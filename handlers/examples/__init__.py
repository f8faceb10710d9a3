"""Programs to copy from: ``python -m numpyro_dynamic_subsample.examples.NAME``."""
