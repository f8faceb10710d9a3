"""The README's code runs as it stands: ``python tests/test_readme.py``."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code_blocks():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {"__name__": "readme"})


if __name__ == "__main__":
    test_code_blocks()
