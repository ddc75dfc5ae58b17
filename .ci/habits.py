"""No method of a library is replaced from outside, and no check of input is an assert, which an
optimising interpreter drops: python .ci/habits.py

Private names are ruff's rule SLF."""

import ast
import sys
from pathlib import Path

ALLOWED = {
    "cpp_extension.CUDA_HOME": "what _compile_kernel asks for; guarded with it",
    "env.cut": "an attribute of our environments",
    "sdar.compiled": "ours, in .lab/kernel_on_cpu.py",
}
MAY_ASSERT = {"test_sdar.py", "test_lab.py", "graders.py", "oracles.py", "fuzz.py"}
OURS = {"sdar", "envs"}


def replaced_names(tree):
    """Attributes that a syntax tree sets of imported modules, or to functions elsewhere than on
    self."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        is_function = isinstance(node.value, ast.Lambda)
        is_function |= ast.unparse(node.value).startswith("partial(")
        for target in node.targets:
            name = ast.unparse(target)
            root = name.split(".")[0]
            elsewhere = isinstance(target, ast.Attribute) and root != "self"
            if elsewhere and (is_function or root in imported - OURS):
                found.add(name)
    return found


PLANTED = (
    "import torch\ntorch.save = None",
    "from a import B as C\nC.size = 1",
    "cache.update = lambda k, v: 0",
    "layer.forward = partial(checkpoint, layer.forward)",
)

if __name__ == "__main__":
    for code in PLANTED:
        assert replaced_names(ast.parse(code)), code
    for path in (*Path().glob("*.py"), *Path().glob(".lab/**/*.py")):
        strange = replaced_names(ast.parse(path.read_text())) - {*ALLOWED}
        if "assert " in path.read_text() and path.name not in MAY_ASSERT:
            sys.exit(f"{path} checks by an assert")
        if strange:
            sys.exit(f"{path} replaces {', '.join(strange)}")
