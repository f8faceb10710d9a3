"""The training loop, beside the bare one, exact posteriors, and ends of all kinds."""

import re
import signal
from contextlib import nullcontext
from functools import partial
from threading import current_thread, main_thread

import grain
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from checks import assert_close, assert_equal
from models import Tensor, hierarchy
from numpyro_dynamic_subsample import (
    MisalignedSubsampleWarning,
    SubsampleSVI,
    minibatch,
)

ROWS, CAPACITY = 20, 8
DATA = np.random.default_rng(0).normal(1.0, 1.0, ROWS).astype("f4")
KEY = jax.random.key(0)


local = hierarchy(ROWS, "rows", 0.5)


def mean(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def svi_of(model=local, guide=AutoNormal, optimizer=None, **options):
    optimizer = optimizer or optax.adam(0.05)
    return SubsampleSVI(model, guide(model), optimizer, Trace_ELBO(), **options)


def batches(epoch, data=DATA):
    """Make batches of 8, 8 and 4 rows, in an order of their own in each epoch."""
    order = np.random.default_rng(epoch).permutation(ROWS)
    for rows in np.split(order, [8, 16]):
        yield minibatch(data[rows], rows={"rows": rows}, capacity=CAPACITY)


def quiet(svi, *args, **options):
    return svi.fit(KEY, *args, progress_bar=False, **options)


copy = partial(jax.tree.map, jnp.copy)


@pytest.mark.parametrize(
    ("options", "together"), [({}, 1), ({}, 2), ({"rowwise": True}, 2)]
)
def test_fit_is_the_bare_loop_and_can_be_resumed(options, together):
    # Alone, steps are those of the bare loop bit for bit.
    same = assert_equal if together == 1 else partial(assert_close, rtol=1e-5)
    together = {"steps_per_dispatch": together}
    svi = svi_of(**options)
    step = jax.jit(svi.update, donate_argnums=0)
    state, losses, states = svi.init(KEY, next(batches(0))), [], []
    for epoch in range(3):
        for batch in batches(epoch):
            state, loss = step(state, batch)
            losses.append(float(loss))
        states.append(copy(state))

    seen = []

    def callback(epoch, state, loss):
        seen.append((epoch, copy(state), loss))

    whole = quiet(svi, batches, 3, callback=callback, **together)
    same(whole.losses, np.array(losses))
    same(whole.state, state)
    same(whole.params, svi.get_params(state))
    assert (whole.compilations, whole.stopped) == (1, None)
    # Batches of 8, 8 and 4: so each row weighs the same.
    expected = whole.losses.reshape(3, 3) @ [0.4, 0.4, 0.2]
    np.testing.assert_allclose(whole.epoch_losses, expected, rtol=1e-12)
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]
    assert [loss for _, _, loss in seen] == whole.epoch_losses.tolist()
    same([state for _, state, _ in seen], states)

    first = seen[0][1]
    rest = quiet(
        svi_of(**options), batches, 3, state=first, initial_epoch=1, **together
    )
    assert rest.losses.tolist() == whole.losses[3:].tolist()
    assert_equal(rest.state, whole.state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_state_whose_types_change_is_no_loop():
    adam = optax.adam(0.05)

    def update(gradients, state, params=None):
        count, own = state
        updates, own = adam.update(gradients, own, params)
        return updates, (count + 1.5, own)

    optimizer = optax.GradientTransformation(
        lambda params: (jnp.int32(0), adam.init(params)), update
    )
    changing = quiet(svi_of(optimizer=optimizer), batches, 2)
    assert (
        changing.losses.tolist()
        == quiet(svi_of(), batches, 2, steps_per_dispatch=1).losses.tolist()
    )
    assert changing.compilations == 2


def test_loader_may_use_the_svi():
    svi = svi_of()
    state = svi.init(KEY, next(batches(0)))
    expected = svi.guide.median(svi.get_params(state))["z"]

    def using(epoch):
        for batch in batches(epoch):
            assert current_thread() is main_thread()
            found = svi.guide.median(svi.get_params(state))["z"]
            np.testing.assert_array_equal(found, expected)
            yield batch

    assert quiet(svi, using, 2).losses.shape == (6,)


def test_posterior_is_the_exact_one():
    optimizer = optax.adam(optax.exponential_decay(0.1, 1800, 0.001))
    result = quiet(svi_of(mean, optimizer=optimizer), batches, 600)
    precision = 1 + ROWS
    loc, scale = (result.params[f"mu_auto_{name}"] for name in ("loc", "scale"))
    assert loc == pytest.approx(DATA.sum() / precision, abs=0.02)
    assert scale == pytest.approx(precision**-0.5, rel=0.1)


@pytest.mark.parametrize("patience", [2, 30])
def test_early_stopping_hands_back_the_best_state(patience):
    # On its way to the mean of the data, 5, the estimate comes past 1.
    svi = svi_of(mean, AutoDelta, optax.sgd(2e-3))
    held_out = [minibatch(np.ones(4, "f4"), rows={"rows": None})]
    states = []
    result = quiet(
        svi,
        partial(batches, data=np.full(ROWS, 5, "f4")),
        30,
        validation=held_out,
        patience=patience,
        callback=lambda epoch, state, loss: states.append(copy(state)),
    )
    estimates = [float(svi.get_params(state)["mu_auto_loc"]) for state in states]
    # The density of four ones, for twenty rows, and the prior's.
    expected = ROWS * np.square(np.subtract(1, estimates)) + np.square(estimates)
    constant = (ROWS + 1) * np.log(2 * np.pi)
    found = result.validation_losses
    np.testing.assert_allclose(found, (expected + constant) / 2, rtol=1e-5)
    best = int(np.argmin(found))
    assert 0 < best < len(found) - 1
    assert len(found) == min(best + 1 + patience, 30)
    assert result.stopped == (None if patience == 30 else "patience")
    assert_equal(result.state, states[best])


def test_validation_draws_the_same_numbers_each_time():
    result = quiet(
        svi_of(optimizer=optax.sgd(0.0)), [*batches(0)], 3, validation=[*batches(1)]
    )
    assert len(set(result.validation_losses)) == 1
    assert len(set(result.epoch_losses)) == 3


@pytest.mark.parametrize("where", ["batch", "callback"])
def test_interrupt_hands_back_what_has_been_reached(where):
    svi = svi_of(mean)

    def interrupted(epoch):
        for number, batch in enumerate(batches(epoch)):
            if where == "batch" and (epoch, number) == (1, 2):
                raise KeyboardInterrupt
            yield batch

    def callback(epoch, *_):
        if where == "callback" and epoch == 1:
            raise KeyboardInterrupt

    result = quiet(svi, interrupted, 3, callback=callback)
    steps, epochs = (5, 1) if where == "batch" else (6, 2)
    assert result.stopped == "interrupt"
    assert (len(result.losses), len(result.epoch_losses)) == (steps, epochs)
    state = svi.init(KEY, next(batches(0)))
    step = jax.jit(svi.update)
    for batch in [*batches(0), *batches(1)][:steps]:
        state, _ = step(state, batch)
    assert_equal(result.state, state)


def test_ctrl_c_waits_for_the_end_of_a_step():
    runs = []

    def model(y):
        runs.append(len(y))
        if runs.count(5) == 1 and len(y) == 5:
            signal.raise_signal(signal.SIGINT)
        mean(y)

    batches = [minibatch(DATA[:n], rows={"rows": None}) for n in (4, 5, 6)]
    before = signal.getsignal(signal.SIGINT)
    result = quiet(svi_of(model), batches)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.stopped == "interrupt"
    assert result.losses.shape == (2,)
    assert 6 not in runs
    expected = quiet(svi_of(mean), batches[:2])
    assert_equal(result.state, expected.state)


def test_second_ctrl_c_does_not_wait():
    def model(y):
        for _ in range(2 if len(y) == 5 else 0):
            signal.raise_signal(signal.SIGINT)
        mean(y)

    batches = [minibatch(DATA[:n], rows={"rows": None}) for n in (4, 5)]
    result = quiet(svi_of(model), batches)
    assert (result.stopped, result.losses.shape) == ("interrupt", (1,))


def test_interrupt_before_the_first_step_is_raised():
    def none(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(svi_of(mean), none)


def fails_in_loader(epoch):
    yield from batches(epoch)
    if epoch == 1:
        raise OSError("no such file")


def fails_in_callback(epoch, state, loss):
    if epoch == 1:
        raise OSError("no space left")


def fails_in_step(epoch):
    yield from batches(epoch)
    if epoch == 1:
        yield minibatch(DATA[:3], unknown=DATA[:3], rows={"rows": np.arange(3)})


@pytest.fixture(scope="module")
def two_epochs():
    return quiet(svi_of(), batches, 2)


@pytest.mark.parametrize(
    ("given", "callback", "error"),
    [
        (fails_in_loader, None, OSError),
        (batches, fails_in_callback, OSError),
        (fails_in_step, None, TypeError),
    ],
)
def test_error_brings_what_has_been_reached(two_epochs, given, callback, error):
    with pytest.raises(error) as raised:
        quiet(svi_of(), given, 3, callback=callback)
    found = raised.value.fit_result
    assert_equal((found.state, found.params), (two_epochs.state, two_epochs.params))
    assert found.losses.tolist() == two_epochs.losses.tolist()
    assert len(found.epoch_losses) == (1 if callback is None else 2)
    assert (found.stopped, found.compilations) == ("error", 1)
    # JAX adds notes of its own.
    note = "in epoch 1 (from 0), after 6 steps. The FitResult of these steps is"
    assert any(note in own for own in raised.value.__notes__)


def test_error_before_the_first_step_brings_nothing():
    with pytest.raises(ZeroDivisionError) as raised:
        quiet(svi_of(), lambda epoch: iter([1 // 0]))
    assert not hasattr(raised.value, "fit_result")


@pytest.mark.parametrize(
    ("key", "what"), [(0, "the integer 0"), ([], "list"), (DATA, "ndarray")]
)
def test_first_argument_is_a_key(key, what):
    message = rf"first argument is a random key: jax.random.key\(0\). .* is {what}"
    with pytest.raises(TypeError, match=message):
        svi_of().fit(key, batches)


def test_old_keys_are_keys(two_epochs):
    old = svi_of().fit(jax.random.PRNGKey(0), batches, progress_bar=False)
    assert old.losses.tolist() == two_epochs.losses[:3].tolist()


@pytest.mark.parametrize(
    ("sizes", "options", "told"),
    [
        ((4, 5), {}, None),
        ((4, 5, 6), {}, "3 shapes of batch, with 4, 5, 6 rows .* capacity={'rows': 6}"),
        ((3, 5, 9), {"capacity": "powers of two"}, None),
    ],
)
def test_each_size_compiled_is_told_once(sizes, options, told):
    given = [minibatch(DATA[:n], rows={"rows": None}, **options) for n in sizes]
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        result = quiet(svi_of(mean), given, 2)
    assert result.compilations == len(sizes)


def test_callback_stops():
    result = quiet(svi_of(mean), batches, 5, callback=lambda epoch, *_: epoch == 1)
    assert (result.stopped, len(result.epoch_losses)) == ("callback", 2)


def test_loss_that_is_not_finite():
    bad = DATA.copy()
    row = np.random.default_rng(1).permutation(ROWS)[-1]
    bad[row] = np.nan

    def fit(bad=bad, **options):
        def data(epoch):
            return batches(epoch, bad if epoch == 1 else DATA)

        return quiet(svi_of(mean), data, 3, **options)

    message = (
        "(nan|inf) in step 2 of epoch 1 .*4 rows of plate 'rows'.*minibatch.*step size"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit()
    went_on = fit(check_finite=False)
    assert np.isfinite(went_on.epoch_losses).tolist() == [True, False, False]
    skipped = fit(stable_update=True)
    assert np.isnan(skipped.losses).tolist() == [False] * 5 + [True] + [False] * 3
    of_epoch = skipped.losses[3:5]  # of 8 rows each
    assert skipped.epoch_losses[1] == pytest.approx(of_epoch.mean())
    with pytest.raises(FloatingPointError, match="step 0 of epoch 1"):
        fit(np.full(ROWS, np.nan, "f4"), stable_update=True)
    assert np.isnan(
        fit(
            np.full(ROWS, np.nan, "f4"), stable_update=True, check_finite=False
        ).epoch_losses[1]
    )
    with pytest.raises(FloatingPointError, match="validation batch 2 of epoch 0"):
        held_out = list(batches(1, bad))
        quiet(svi_of(mean), batches, validation=held_out)


def two(x, y):
    w = numpyro.sample("w", dist.Normal(0, 1))
    with numpyro.plate("rows", ROWS, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(w * x, 1), obs=y)


def test_batches_without_rows():
    x, y = DATA[:5], DATA[5:10]
    apart = [(x, y), [Tensor(x), Tensor(y)], minibatch(x, y=y, rows={"rows": None})]
    losses = [quiet(svi_of(two), [item]).losses.tolist() for item in apart]
    assert losses[0] == losses[1] == losses[2]
    alone = [quiet(svi_of(mean), [item]).losses.tolist() for item in (x, Tensor(x))]
    assert alone[0] == alone[1]


def test_loader_of_grain():
    def make(rows):
        return minibatch(DATA[rows], rows={"rows": rows}, capacity=8)

    def loader(epoch):
        order = grain.MapDataset.range(ROWS).seed(epoch).shuffle().batch(8).map(make)
        return order.to_iter_dataset(grain.ReadOptions(num_threads=1))

    of_each = quiet(svi_of(mean), loader, 2)
    assert of_each.losses.shape == (6,)
    assert of_each.compilations == 1
    again = quiet(svi_of(mean), loader(0), 2)
    assert again.losses[:3].tolist() == of_each.losses[:3].tolist()
    assert again.losses.shape == (6,)


@pytest.mark.parametrize("known", [True, False])
def test_progress_bar(capsys, known):
    given = [*batches(0)] if known else batches
    svi_of(mean).fit(KEY, given, 2, validation=batches)
    first, second, *shown = re.split("[\\r\\n]+", capsys.readouterr().err.strip())
    assert "initialising" in first and "compiling" in second
    assert all(("/6 [" in own) >= known for own in shown)
    last = shown[-1]
    for part in ("epoch 2/2", "6/6", "loss=", "validation=", "rows=4 to 8"):
        assert part in last


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (batches(0), {"epochs": 2}, "batches is an iterator .generator., .* of 2"),
        (batches, {"epochs": 2, "validation": iter([])}, "validation is an iterator"),
        (next(batches(0)), {}, "single Minibatch. Put it into a list"),
        (DATA, {}, "single ndarray. Put it into a list"),
        (3, {}, "batches must be a list .*, not int"),
        (batches, {"validation": 3}, "validation must be a list .*, not int"),
        ([], {}, "no batch in epoch 0. Give an iterable that starts anew"),
        (batches, {"epochs": 0}, "epochs must be at least 1, but is 0"),
        (
            batches,
            {"patience": 0, "validation": []},
            "patience must be at least 1, but is 0",
        ),
        (batches, {"patience": 3}, "patience is 3, but there is no validation"),
        (batches, {"initial_epoch": 1}, "initial_epoch is 1, but there is no state"),
    ],
)
def test_mistakes_are_errors(given, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(svi_of(mean), given, **options)


def test_fit_that_has_no_epoch_left():
    svi = svi_of(mean)
    done = quiet(svi, batches, 2)
    again = quiet(svi, batches, 2, state=done.state, initial_epoch=2)
    assert_equal(again.state, done.state)
    assert len(again.losses) == 0
    with pytest.raises(ValueError, match="No epoch is left after 2 of 2"):
        quiet(svi_of(mean), batches, 2, state=done.state, initial_epoch=2)


def test_iterator_for_one_epoch():
    assert quiet(svi_of(mean), batches(0)).losses.shape == (3,)


def test_plain_loader_is_told_of_minibatch():
    message = r"pin the rows that it holds: minibatch\(..., rows={'rows': rows}\)"
    with pytest.warns(MisalignedSubsampleWarning, match=message):
        quiet(svi_of(), [DATA[:4], DATA[4:8]])


class Endless:
    def __iter__(self):
        return batches(0)

    def __len__(self):
        return 2**60


def test_loader_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="batches never ends: .* 1,152,9.*repeat"):
        quiet(svi_of(), Endless(), 2)


def test_more_epochs_done_than_asked_for_are_told():
    svi = svi_of()
    done = quiet(svi, batches, 3)
    with pytest.warns(UserWarning, match="epochs=2 counts those before initial_epoch"):
        again = quiet(svi, batches, 2, state=done.state, initial_epoch=3)
    assert len(again.losses) == 0


def test_result_is_shown_in_a_line():
    result = quiet(svi_of(), batches, 2)
    loss = f"{result.epoch_losses[-1]:,.4f}"
    assert repr(result) == (
        f"FitResult(4 parameters, 6 steps, 2 epochs, last loss {loss}, stopped=None, "
        "1 compilations)"
    )


@pytest.mark.parametrize(
    ("model", "optimizer", "seen", "message"),
    [
        (mean, optax.adam(0.05), True, r"has the parameters \['mu_auto_loc'.*have \["),
        (local, optax.sgd(0.05), False, "is not one of this SubsampleSVI's optimizer"),
    ],
)
def test_fit_refuses_the_state_of_another(model, optimizer, seen, message):
    first = next(batches(0))
    state = svi_of(model, optimizer=optimizer).init(KEY, first)
    svi = svi_of()
    if seen:
        svi.init(KEY, first)
    with pytest.raises(ValueError, match=message):
        quiet(svi, batches, 2, state=state)
