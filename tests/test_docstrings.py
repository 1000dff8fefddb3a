"""Docstrings, also those of constants, begin with a verb or a noun, not with a question word."""

import ast
import re
from pathlib import Path

import pytest

import lightning_eplb

PACKAGE = Path(lightning_eplb.__file__).parent
REPOSITORY = Path(__file__).parents[1]
QUESTION = re.compile(r"\W*(What|Whether|Who|Whose|Where|Which|How|When)\b")


def docstrings(source: str) -> list[tuple[int, str]]:
    """Line and text of every string that stands alone as a statement."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def test_docstrings_of_package_open_with_no_question_word() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text.strip().splitlines()[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if QUESTION.match(text)
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_docstrings_of_tests_and_examples_open_with_no_question_word(folder: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {text.strip().splitlines()[0]}"
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if re.match(r"\W*(What|Whether|Who|Where)\b", text)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["What a step brought.", "Whether it is.", "\n    Who moves."])
def test_scan_of_question_word_finds_it(text: str) -> None:
    ((_, found),) = docstrings(f"'''{text}'''" if "\n" not in text else f'"""{text}"""')
    assert QUESTION.match(found)
