"""Docstrings explain every parameter where it stands, and their examples run."""

import doctest
import inspect
import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_dynamic_subsample as library
from numpyro_dynamic_subsample import SubsampleSVI, minibatch


def public():
    """Public names, and public methods of their own, by the names they are asked by."""
    for name in library.__all__:
        yield name, getattr(library, name)
        for method, value in vars(getattr(library, name)).items():
            if inspect.isfunction(value) and not method.startswith("_"):
                yield f"{name}.{method}", value
    yield "RaggedGroups.__call__", library.RaggedGroups.__call__


PUBLIC = dict(public())


def sections(documented):
    """The sections of a docstring, by title."""
    text = inspect.cleandoc(documented.__doc__)
    parts = re.split(r"^(\w[\w ]+)\n-+\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def names_in(section):
    """The names that a section explains, each by a line or more below it."""
    entries = re.findall(r"^(\S.*?)(?: :.*)?\n(    \S.*)$", section, re.MULTILINE)
    return {name.strip("*") for names, _ in entries for name in names.split(", ")}


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_are_explained_where_they_stand(name):
    documented = PUBLIC[name]
    given = sections(documented)
    explained = names_in(given.get("Parameters", "") + given.get("Attributes", ""))
    if not name.endswith("Warning"):
        expected = inspect.signature(documented).parameters.keys() - {"self"}
        assert explained >= expected and explained
    assert "Examples" in given
    assert not re.search("As for ``|see the class", documented.__doc__)


def model_of(namespace):
    """A model that reads how many rows there are when it runs."""

    def model(X, y=None):  # noqa: N803
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1).to_event(1))
        with numpyro.plate("people", namespace["N"], subsample_size=len(X)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(X @ w + z, 1), obs=y)

    return model


def shared(trained):
    """What examples may use without saying so; some of it only if one has `trained`."""
    names = {name: getattr(library, name) for name in library.__all__}
    names |= {"jax": jax, "jnp": jnp, "np": np, "numpyro": numpyro, "dist": dist}
    names |= {"handlers": handlers, "optax": optax, "SVI": SVI, "partial": partial}
    names |= {"AutoNormal": AutoNormal, "Trace_ELBO": Trace_ELBO, "warnings": warnings}
    draw, n = np.random.default_rng(0), 100
    x, x_new = (draw.normal(size=(k, 2)).astype("float32") for k in (n, 7))
    y = draw.normal(size=n).astype("float32")
    names |= {"N": n, "X": x, "y": y, "X_new": x_new, "key": jax.random.key(0)}
    model = model_of(names)
    svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.01), Trace_ELBO())
    batches = [
        minibatch(x[rows], y[rows], rows={"people": rows}, capacity=40)
        for rows in np.split(np.arange(n), [40, 53, 90])
    ]
    names |= {"model": model, "svi": svi, "batches": batches}
    if trained:
        names["state"] = svi.init(names["key"], batches[0])
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name):
    source = inspect.getdoc(PUBLIC[name])
    names = shared(trained="(state" in source or "key, state" in source)
    example = doctest.DocTestParser().get_doctest(source, {}, name, name, 0)
    example.globs = names  # itself, as the model reads in there how many rows there are
    assert example.examples
    with warnings.catch_warnings():
        result = doctest.DocTestRunner(verbose=False).run(example, clear_globs=False)
    assert result.failed == 0


def test_help_shows_how_methods_are_called():
    called = {
        name: list(inspect.signature(getattr(SubsampleSVI, name)).parameters)[:4]
        for name in ("fit", "predict", "log_likelihood", "grow")
    }
    assert called == {
        "fit": ["self", "rng_key", "batches", "epochs"],
        "predict": ["self", "rng_key", "fitted", "batches"],
        "log_likelihood": ["self", "rng_key", "fitted", "batches"],
        "grow": ["self", "svi_state", "args", "kwargs"],
    }
