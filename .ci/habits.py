"""Habits that a tool can check: python .ci/habits.py

- The budget: how large the parts may be. A tenth over it is an error.
- No method of a library is replaced from outside. Asserts and private names are rules of ruff."""

import ast
import re
import sys
from pathlib import Path

# An attribute of a module or class, or a function that becomes one of another object.
REPLACED = (
    r"\n *((?:torch|transformers|np|F|[A-Z]\w*)\.[\w.]+ = .*"
    r"|(?!self)\w+\.[\w.]+ = (?:lambda|partial\().*)"
)


def nodes(tree):
    """Syntax nodes. Doc strings and other texts over four lines are no code."""
    prose = {None}  # lines; a node without one is no code either
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and node.end_lineno - node.lineno > 3
        is_text |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text:
            prose |= set(range(node.lineno, node.end_lineno + 1))
    return sum(getattr(node, "lineno", None) not in prose for node in ast.walk(tree))


def size(pattern):
    """Nodes of all files that fit a pattern."""
    return sum(nodes(ast.parse(path.read_text("utf-8"))) for path in Path().glob(pattern))


def budget():
    """What is counted, how much of it there is, and how much there may be."""
    source = Path("sdar.py").read_text("utf-8")
    part_1, part_2 = source.split("PART II")
    yield "nodes of sdar.py, Part I", nodes(ast.parse(part_1)), 3400
    # 4,600, and what busy cores, paths, cards and templates took.
    yield "nodes of sdar.py", size("sdar.py"), 4620
    yield "nodes of envs.py", size("envs.py"), 3500
    yield "nodes of test_sdar.py", size("test_sdar.py"), 6500
    tests = size(".lab/tests/*.py")
    # 6,500, and tests of what is named below.
    yield "nodes of .lab/tests", tests, 7010
    rest = size(".lab/**/*.py") + size(".ci/*.py") - tests
    # 15,000, and what came later: probe, tables from data, a language model's imitation, practice.
    yield "nodes of .lab and .ci, without tests", rest, 15740

    config = part_1.split("class Config:")[1].split("\ndef ")[0]
    yield "settings", len(re.findall(": .*  # ", config)), 42
    called = [name for name in re.findall(r"\ndef (\w+)", part_2) if f"{name}(" in part_1]
    yield "names of Part II that Part I calls", len(called), 8
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    longest = max(node.end_lineno - node.lineno + 1 for node in functions)
    yield "lines of the longest function of sdar.py", longest, 50
    yield "imports at the top of sdar.py", len(re.findall("\n(?:import|from) ", source)), 25


if __name__ == "__main__":
    wrong = []
    for what, count, limit in budget():
        print(count, what, "of", limit)
        if count > 1.1 * limit:
            wrong.append(f"over the budget: {what}")
    for path in (*Path().glob("*.py"), *Path().glob(".lab/**/*.py")):
        for line in re.findall(REPLACED, path.read_text("utf-8")):
            wrong.append(f"{path} replaces what is not its own: {line}")
    sys.exit("\n".join(wrong) or 0)
