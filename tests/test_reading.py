"""What a model shows when it runs hidden: plates, sizes, and data that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from checks import told
from models import TRUTH, N, X, initialised, plate_of, rows_moved, rows_plate, svi_of
from numpyro_dynamic_subsample import dynamic_subsample, minibatch


def boolean_index(x, g):
    return x[x > -10].sum() + g.sum()


def shape_from_data(x, g):
    return jnp.zeros(g.max() + 1).sum()


def python_set(x, g):
    return len(set(g.tolist()))


def edited_copy(x, g):
    x = np.array(x)
    x[0] = 3.0
    return x.sum()


def f_string(x, g):
    assert f"{float(x.sum()):.2f}"
    return int(g[0])


HOST_CODE = [boolean_index, shape_from_data, python_set, edited_copy, f_string]


@pytest.mark.parametrize("host_code", HOST_CODE)
def test_host_code_of_a_model_runs(host_code):
    def model(x, g, size=4):
        offset = host_code(x, g)
        with numpyro.plate("n", N, subsample_size=size):
            z = numpyro.sample("z", dist.Normal(offset, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(x[:size]))

    svi = svi_of(model)
    x, g = np.arange(8.0), np.arange(8)
    state = svi.init(jax.random.key(0), x, g)
    assert len(rows_moved(svi, state, x, g, 3)) == 3


@pytest.mark.parametrize("setting", [numpyro.validation_enabled, jax.debug_nans])
def test_reading_validates_and_debugs_no_made_up_value(setting):
    """A latent of any value would be no scale, and its logarithm not finite."""

    def model(size):
        a = numpyro.sample("a", dist.Normal(5, 0.1))
        scale = jnp.sqrt(a - 3)
        numpyro.sample("b", dist.Normal(0, scale))
        with rows_plate(size) as idx:
            z = numpyro.sample("z", dist.Normal(0, scale))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    init = init_to_value(values={"a": jnp.array(5.0)})
    svi = svi_of(model, AutoDelta(model, init_loc_fn=init))
    with setting(True):
        state = svi.init(jax.random.key(0), 4)
        assert len(rows_moved(svi, state, 3)) == 3


def test_model_that_catches_exceptions():
    def model(size):
        try:
            plate = rows_plate(size)
        except Exception:
            plate = None
        assert plate is not None
        with plate as idx:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=X[idx])

    svi = svi_of(model)
    assert len(rows_moved(svi, svi.init(jax.random.key(0), 4), 3)) == 3


def test_effects_of_a_model_happen_once_more_unless_all_rows_are_named():
    counts = []

    def model(x):
        jax.debug.callback(lambda: counts.append(1))
        with numpyro.plate("n", N, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = svi_of(model, AutoDelta, "SubsampleSVI")
    rows = jnp.arange(3)
    state = svi.init(jax.random.key(0), told(X[:3], rows={"n": rows}))
    step = jax.jit(lambda s: svi.evaluate(s, told(X[:3], rows={"n": rows})))
    for _ in range(2):
        counts.clear()
        step(state).block_until_ready()
        jax.effects_barrier()
    assert len(counts) == 1


def test_data_that_the_model_takes_only_later():
    def model(x, rows, more=False):
        with plate_of(rows):
            z = numpyro.sample("z", dist.Normal(0, 1))
            x = x + numpyro.subsample(TRUTH, event_dim=0) if more else x
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi, rows = svi_of(model, AutoDelta), jnp.arange(N)[::-1]
    state = svi.init(jax.random.key(0), X, rows)
    svi.evaluate(state, X, rows)
    with pytest.raises(ValueError, match="All 8 rows of plate 'n' are pinned"):
        svi.evaluate(state, X, rows, more=True)


def test_argument_of_all_rows_is_no_data_of_rows():
    grid = jnp.linspace(0, 1, 5)

    def model(grid, size):
        with numpyro.plate("n", N, subsample_size=size):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.factor("smooth", -((z[:, None] * grid) ** 2).sum(-1))

    svi_of(model).init(jax.random.key(0), grid, 3)


def latent_plus(x, **size):
    with numpyro.plate("people", 100, **size):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=x)


def covariates(x):
    with numpyro.plate("people", 100):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z + x, 1), obs=0 * x)


@pytest.mark.parametrize("form", ["wrapper", "SubsampleSVI"])
@pytest.mark.parametrize("model", [latent_plus, covariates])
def test_sliced_batch_for_a_plate_without_a_subsample_size(model, form):
    message = r"'people' takes all of its 100 rows, but the batch brings 16. .*"
    message += r"numpyro.plate\('people', 100, subsample_size=len\(batch\)\)"
    svi = svi_of(model, form=form)
    with pytest.raises(ValueError, match=message):
        svi.init(jax.random.key(0), np.ones(16))
    state = svi.init(jax.random.key(0), np.ones(100))
    with pytest.raises(ValueError, match=message):
        svi.update(state, np.ones(16))


def test_data_of_all_rows_in_a_plate_of_one():
    """NumPyro would let all data meet the one latent."""

    def one(x):
        latent_plus(x, subsample_size=1)

    message = r"'y' has data for 100 rows, .* 'people', which takes 1 of its 100"
    with pytest.raises(ValueError, match=message):
        svi_of(one).init(jax.random.key(0), np.ones(100))


def test_size_of_the_batch_for_that_of_the_plate():
    def model(x):
        with numpyro.plate("people", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=x)

    svi = svi_of(model, form="SubsampleSVI")
    state = svi.init(jax.random.key(0), np.ones(100))
    message = r"^Give plate 'people' the number of rows of the whole data set, here 100"
    with pytest.raises(ValueError, match=message):
        svi.update(state, np.ones(16))


def test_one_name_for_plates_of_two_sizes():
    def model(x):
        with numpyro.plate("people", 100, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(0, 1))
        with numpyro.plate("people", 50, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(0, 1), obs=x)

    message = r"makes plate 'people' twice: .* 16 of 100 rows, and once 16 of 50"
    with pytest.raises(ValueError, match=message):
        svi_of(model).init(jax.random.key(0), np.ones(16))


def test_rows_decide_where_the_plate_asks_for_no_size():
    """Scale included: loss and step are those of a plate that asks for the size."""

    def sized(x):
        latent_plus(x, subsample_size=len(x))

    rows = np.array([7, 99, 3])
    x = np.linspace(-1, 1, 3).astype("float32")
    steps = []
    for model in (latent_plus, sized):
        for capacity in (None, 8):
            batch = minibatch(x, rows={"people": rows}, capacity=capacity)
            svi = svi_of(model, form="SubsampleSVI")
            state = svi.init(jax.random.key(0), np.ones(100))
            state, loss = svi.update(state, batch)
            steps.append((loss, svi.get_params(state)["z_auto_loc"]))
    for loss, loc in steps[1:]:
        np.testing.assert_allclose(loss, steps[0][0], rtol=1e-6)
        np.testing.assert_allclose(loc, steps[0][1], rtol=1e-6)


def test_number_of_rows_that_is_traced():
    def indexing(size):
        with numpyro.plate("n", N, subsample_size=size) as rows:
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(X)[rows])

    svi = svi_of(indexing, form="SubsampleSVI")
    batch = minibatch(3, rows={"n": [5, 0, 3]})
    state = svi.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"'n' \(size 8\) .* traced.*Leave subsample"):
        jax.jit(svi.update)(state, batch)


def test_guide_of_global_latents_costs_no_run_of_the_model():
    runs = []

    def model(size):
        runs.append(size)
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with rows_plate(size) as idx:
            numpyro.sample("y", dist.Normal(mu, 1), obs=X[idx])

    guide = initialised(dynamic_subsample(AutoNormal(model)))
    runs.clear()
    with handlers.seed(rng_seed=0):
        guide(6)
    assert not runs
