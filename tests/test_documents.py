"""What the documents name is there."""

import pkgutil
import re

from tests.commands import ROOT


def test_names_in_the_guide_for_contributors():
    names = re.findall(r"`((?:\w+\.)+\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    objects = [name for name in names if not name.endswith((".py", ".md", ".sh"))]
    assert len(objects) > 15
    for name in objects:
        pkgutil.resolve_name(name)
