"""The README's code runs as it stands: ``python tests/test_readme.py``."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_blocks():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {"__name__": "readme"})


def test_files_that_are_named():
    modules = {path.stem for path in (ROOT / "handlers").rglob("*.py")}
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert modules <= set(re.findall(r"`(\w+)\.py`", README))
    # Tests that are called after a module need no name of their own.
    named = set(re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", README))
    assert named <= tests <= named | {f"test_{module}" for module in modules}
    assert all(
        (ROOT / link).exists() for link in re.findall(r"\]\((\w[\w./]+)\)", README)
    )


if __name__ == "__main__":
    test_code_blocks()
