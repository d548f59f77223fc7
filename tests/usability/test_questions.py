"""The 25 questions by which a stranger judges it: each is answered by tests that are there."""

import ast
import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUESTIONS = tomllib.loads((ROOT / "tests/usability/questions.toml").read_text())["question"]


def functions_of(file: str) -> list[str]:
    path = ROOT / file
    return [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)] if path.exists() else []


def test_each_of_the_25_questions_is_answered_by_tests_that_are_there() -> None:
    assert [q["number"] for q in QUESTIONS] == list(range(1, 26))
    named = [(q["number"], test) for q in QUESTIONS for test in q["tests"]]
    missing = [(number, test) for number, test in named if not fnmatch.filter(functions_of(test.partition("::")[0]), test.partition("::")[2])]
    assert missing == []
    assert all(q["tests"] for q in QUESTIONS) and len(named) >= 25
