"""The README's code runs, ``python tests/test_readme.py``; names and links exist."""

import contextlib
import io
import re
from pathlib import Path

import numpyro_dynamic_subsample as package

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_prints_what_the_readme_shows():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    shown = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "readme"})
    assert printed.getvalue().splitlines() == shown != []


def test_api_has_every_public_name():
    api = README.split("\n## API\n")[1].split("\n## ")[0]
    names = re.findall(r"^\| `(\w+)` \|", api, flags=re.MULTILINE)
    assert sorted(names) == sorted(package.__all__)
    methods = {name for name in vars(package.SubsampleSVI) if name[0] != "_"}
    assert methods <= set(re.findall(r"`(\w+)`", api))


def test_every_file_has_tests_by_its_name_or_in_the_table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = {path.stem for path in (ROOT / "handlers").rglob("*.py")}
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert modules <= set(re.findall(r"`(\w+)\.py`", text))
    table = text.split("| Tests |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    assert named <= tests <= named | {f"test_{module}" for module in modules}
    others = {module for module in modules if f"test_{module}" not in tests}
    assert others <= set(re.findall(r"`(\w+)\.py`", table)) | {"__init__"}


def test_links_lead_to_files():
    pages = ["README.md", "CONTRIBUTING.md", "tests/README.md", "benchmarks/README.md"]
    for page in map(ROOT.joinpath, [*pages, "CHANGELOG.md"]):
        links = re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", page.read_text())
        assert [own for own in links if not (page.parent / own).exists()] == []


if __name__ == "__main__":
    test_code_prints_what_the_readme_shows()
