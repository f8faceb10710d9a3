"""Which rows of local latents a batch uses, and that they meet their own data."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from numpyro_dynamic_subsample import dynamic_subsample

N = 8
TRUTH = jnp.arange(float(N))


def plate(rows):
    return numpyro.plate("n", N, subsample_size=len(rows))


def pinned_plate(rows):
    with handlers.substitute(data={"n": rows}):
        return plate(rows)


def latent_and_obs(obs):
    z = numpyro.sample("z", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(z, 1), obs=obs)


def indexing(rows, make=pinned_plate):
    with make(rows) as idx:
        latent_and_obs(TRUTH[idx])


def sliced(rows, make=pinned_plate):
    with make(rows):
        latent_and_obs(TRUTH[rows])


def subsampling(rows, make=pinned_plate):
    with make(rows):
        latent_and_obs(numpyro.subsample(TRUTH, event_dim=0))


MODELS = {"indexes": indexing, "sliced": sliced, "subsamples": subsampling}


def shuffled_batches(steps):
    rng = np.random.default_rng(0)
    for step in range(steps):
        rows = rng.permutation(N)
        yield jnp.asarray(rows if step % 2 else rows[: N // 2])


def fit(model, guide, steps=400):
    """Train on shuffled batches, every second of them the whole plate."""
    optim = optax.adam(optax.exponential_decay(0.5, steps, 1e-3))
    svi = SVI(model, guide, optim, Trace_ELBO())
    update = jax.jit(svi.update)
    batches = shuffled_batches(steps)
    state = svi.init(jax.random.key(0), next(batches))
    for rows in batches:
        state, _ = update(state, rows)
    return svi.get_params(state)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_posterior_of_every_row(model):
    """Hand-written plates leave a shuffled full batch in its original order, so that
    latents are trained on other rows' data there."""
    # A wrapped guide alone cannot make the model take a shuffled `numpyro.subsample`.
    with dynamic_subsample() if model is subsampling else nullcontext():
        params = fit(model, dynamic_subsample(AutoNormal(model)), steps=1500)
    exact_mean, exact_sd = TRUTH / 1.01, (1 / 1.01) ** 0.5
    np.testing.assert_allclose(params["z_auto_loc"], exact_mean, atol=0.2)
    np.testing.assert_allclose(params["z_auto_scale"], exact_sd, atol=0.1)


def two_latents(rows, make=pinned_plate):
    with make(rows) as idx:
        a = numpyro.sample("a", dist.Normal(0, 10))
        numpyro.sample("y_a", dist.Normal(a, 1), obs=TRUTH[idx])
        b = numpyro.sample("b", dist.Normal(0, 10))
        numpyro.sample("y_b", dist.Normal(b, 1), obs=-TRUTH[idx])


def two_parts(model):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(handlers.block(model, hide=["a", "y_a"])))
    guide.append(AutoDelta(handlers.block(model, hide=["b", "y_b"]), prefix="other"))
    return guide


def list_in_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(handlers.block(model, hide=["a", "y_a"])))
    inner = AutoGuideList(handlers.block(model, hide=["b", "y_b"]))
    inner.append(AutoDelta(handlers.block(model, hide=["b", "y_b"]), prefix="other"))
    guide.append(inner)
    return guide


def with_callable(model):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(handlers.block(model, hide=["a", "y_a"])))

    def part(rows, make=None):
        with numpyro.plate("n", N, subsample_size=2):
            loc = numpyro.param("a_other_loc", jnp.full(N, 0.5), event_dim=0)
            return {"a": numpyro.sample("a", dist.Delta(loc))}

    guide.append(part)
    return guide


LISTS = [two_parts, list_in_list, with_callable]


@pytest.mark.parametrize("parts", LISTS)
def test_parts_of_a_list_share_their_rows(parts):
    """With hand-written plates each part of a list draws rows of its own."""

    def drawing(rows):
        two_latents(rows, plate)

    svi = SVI(drawing, dynamic_subsample(parts(drawing)), optax.sgd(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), range(3))
    before = svi.get_params(state)
    for size in (3, 5):
        moved = svi.get_params(svi.update(state, range(size))[0])
        a, b = (moved[k] != before[k] for k in ("a_other_loc", "b_auto_loc"))
        assert a.sum() == size
        np.testing.assert_array_equal(a, b)


def test_list_recovers_every_row():
    params = fit(two_latents, dynamic_subsample(two_parts(two_latents)))
    np.testing.assert_allclose(params["a_other_loc"], TRUTH / 1.01, atol=0.02)
    np.testing.assert_allclose(params["b_auto_loc"], -TRUTH / 1.01, atol=0.02)


ROWS = [jnp.array([6, 1, 3]), jnp.array([2]), jnp.arange(N)[::-1]]


def latents(guide, params, rows, **kwargs):
    guide = handlers.substitute(handlers.seed(guide, 0), params)
    trace = handlers.trace(guide).get_trace(rows, **kwargs)
    return trace["n"]["value"], trace["z"]["value"], trace["z"]["scale"]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=["some", "one", "all"])
@pytest.mark.parametrize("where", ["in the model", "around the call"])
def test_pinned_rows_are_the_guides(where, rows, traced):
    guide = dynamic_subsample(AutoDelta(indexing))
    with handlers.seed(rng_seed=0):
        guide(jnp.arange(4))
    params = {"z_auto_loc": TRUTH * 10}

    def run(rows):
        if where == "in the model":
            return latents(guide, params, rows)
        with handlers.substitute(data={"n": rows}):
            return latents(guide, params, rows, make=plate)

    taken, z, scale = (jax.jit(run) if traced else run)(rows)
    np.testing.assert_array_equal(taken, rows)
    np.testing.assert_array_equal(z, rows * 10)
    assert (scale or 1) == N / len(rows)


@pytest.mark.filterwarnings("ignore:subsample_size does not match:UserWarning")
@pytest.mark.parametrize("length", [2, 6, N])
def test_pins_of_another_length_than_the_model_asks_for(length):
    """As in the model, so in the guide the pinned rows win."""

    def asks_for_four(rows):
        indexing(range(4), plate)

    guide = dynamic_subsample(AutoDelta(asks_for_four))
    svi = SVI(asks_for_four, guide, optax.sgd(0.5), Trace_ELBO())
    state = svi.init(jax.random.key(0), None)
    rows = jnp.arange(N)[::-1][:length]
    before = svi.get_params(state)["z_auto_loc"]
    with handlers.substitute(data={"n": rows}):
        after = svi.get_params(svi.update(state, None)[0])["z_auto_loc"]
    # One step of gradient descent on the exact gradient of the pinned rows.
    grad = N / length * (before / 100 + before - TRUTH)
    expected = before.at[rows].add(-0.5 * grad[rows])
    np.testing.assert_allclose(after, expected, rtol=1e-4)


def test_permutation_that_a_model_both_keeps_and_follows():
    def mixed(rows):
        with pinned_plate(rows) as idx:
            latent_and_obs(numpyro.subsample(TRUTH, event_dim=0) + TRUTH[idx])

    guide = dynamic_subsample(AutoDelta(mixed))
    with handlers.seed(rng_seed=0):
        guide(jnp.arange(4))
        with pytest.raises(ValueError, match="All 8 rows of plate 'n' are pinned"):
            guide(jnp.arange(N)[::-1])


def test_numpyros_own_pattern_without_create_plates():
    """The pinned batches of NumPyro's ``test_subsample_guide``, the last one smaller,
    with latents in a scan."""

    def model(batch, rows, full_size):
        drift = numpyro.sample("drift", dist.LogNormal(-1, 0.5))
        with handlers.substitute(data={"data": rows}):
            data = numpyro.plate("data", full_size, subsample_size=len(rows))

        def transition(z, y):
            with data:
                z = numpyro.sample("state", dist.Normal(z, drift))
                y = numpyro.sample("obs", dist.Bernoulli(logits=z), obs=y)
            return z, y

        start = jnp.zeros(len(rows))
        return scan(transition, start, batch, length=3)[1]

    def by_hand(batch, rows, full_size):
        with handlers.substitute(data={"data": rows}):
            return numpyro.plate("data", full_size, subsample_size=len(rows))

    data = handlers.seed(model, 0)(None, jnp.arange(10), 10)
    losses = {}
    for guide in (
        dynamic_subsample(AutoNormal(model)),
        AutoNormal(model, create_plates=by_hand),
    ):
        svi = SVI(model, guide, optax.adam(0.02), Trace_ELBO())
        state = svi.init(jax.random.key(0), data[:, :4], jnp.arange(4), 10)
        update = jax.jit(svi.update, static_argnums=3)
        for rows in (jnp.arange(4), jnp.arange(4, 8), jnp.arange(8, 10)):
            state, loss = update(state, data[:, rows], rows, 10)
            losses.setdefault(type(guide), []).append(loss)
    assert losses[dynamic_subsample] == losses[AutoNormal]
