"""The page docs/families.md: it is what the policies say today, of every family and of every refusal."""

from __future__ import annotations

import ast
import traceback
from pathlib import Path

import pytest

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies import POLICIES
from headrace.kernels.policies.coverage import COMMAND, page
from headrace.kernels.policies.examples import examples

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_policies_say():
    committed = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert committed == page(), f"the policies, their examples or the operations changed; run: {COMMAND}"


def test_every_family_has_examples():
    families = {policy.family for policy in POLICIES}
    assert families == examples().keys(), "kernels/policies/examples.py holds some configs of each family"


def refusals() -> set[tuple[str, int]]:
    """Where the policies refuse a config: file and line."""
    found = set()
    for path in (ROOT / "kernels/policies").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and "UnsupportedModelError" in ast.dump(node) and path.stem != "__init__":
                found.add((path.name, node.lineno))
    return found


def test_every_refusal_is_on_the_page():
    met, cases = set(), examples()
    for policy in POLICIES:
        for config in cases[policy.family].refused:
            with pytest.raises(UnsupportedModelError) as caught:
                policy.spec(config)
            raised = traceback.extract_tb(caught.tb)[-1]
            met.add((Path(raised.filename).name, raised.lineno))
            assert caught.value.param == "model"
            assert "Choose " in caught.value.message, "it says what to do"
    assert met == refusals(), "kernels/policies/examples.py holds a config for each refusal"
