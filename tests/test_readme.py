"""The README is true: its code runs, ``python tests/test_readme.py``, as do its links."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import numpyro_dynamic_subsample

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_prints_what_the_readme_shows():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    shown = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    assert shown
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "readme"})
    assert printed.getvalue().splitlines() == shown


def test_api_table_has_every_public_name():
    table = README.split("\n## API\n")[1].split("\n## ")[0]
    names = re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE)
    exported = [name for name in names if "." not in name]
    assert sorted(exported) == sorted(numpyro_dynamic_subsample.__all__)
    svi = numpyro_dynamic_subsample.SubsampleSVI
    methods = {name.removeprefix("SubsampleSVI.") for name in names if "." in name}
    own = {name for name, value in vars(svi).items() if callable(value)}
    assert {name for name in own if not name.startswith("_")} <= methods
    assert all(callable(getattr(svi, name, None)) for name in methods)


def test_file_map_has_every_module_and_its_tests():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = {path.stem for path in (ROOT / "handlers").rglob("*.py")}
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert modules <= set(re.findall(r"`(\w+)\.py`", text))
    named = set(re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", text))
    # Tests that are called after a module need no name of their own.
    assert named <= tests <= named | {f"test_{module}" for module in modules}


PAGES = ["README.md", "CONTRIBUTING.md", "tests/README.md", "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((\w[\w./-]+)(?:#[\w-]*)?\)", (ROOT / page).read_text())
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert links and not missing


if __name__ == "__main__":
    test_code_prints_what_the_readme_shows()
