"""What the documents name is there, and the source keeps its rules of style."""

import ast
import pkgutil
import re

import pytest

from tests.commands import ROOT

PATHS = [path for top in ROOT.iterdir() if top.name[0] != "." for path in [top, *top.rglob("*")]]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(path for path in PATHS if path.suffix == ".py" and ROOT / "tests" not in path.parents)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def name_of(path):
    return str(path.relative_to(ROOT))


def test_names_in_the_guide_for_contributors():
    names = re.findall(r"`((?:\w+\.)+\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    objects = [name for name in names if not name.endswith((".py", ".md", ".sh"))]
    assert len(objects) > 15
    for name in objects:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_and_tests_in_a_document(document):
    text = document.read_text()
    tests = {
        node.name
        for path in (ROOT / "tests").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    modules = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert set(re.findall(r"\btest_\w+", text)) <= tests | modules
    files = {path.name for path in PATHS}
    assert set(re.findall(r"\w+\.(?:py|sh|md|sbatch)\b", text)) <= files


def definitions(path):
    """The functions and classes of a source file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DEFINITIONS)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_have_no_annotations(path):
    annotated = set()
    for function in definitions(path):
        if not isinstance(function, ast.ClassDef):
            arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
            if function.returns or any(argument.annotation for argument in arguments):
                annotated.add(function.name)
    assert annotated == set()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_errors_are_named_in_a_section_of_their_own(path):
    """In docstrings of more than one line."""
    wrong = set()
    for definition in definitions(path):
        prose, _, errors = (ast.get_docstring(definition) or "").partition("\nRaises:\n")
        if "\n" in prose + errors and re.search(r"\b\w+Error\b", prose):
            wrong.add(definition.name)
    assert wrong == set()
