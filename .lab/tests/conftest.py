"""What the tests of .lab share: the fixtures of test_sdar.py, and where everything is."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAB, ROOT = HERE.parent, HERE.parent.parent
for folder in (HERE, LAB / "trl", LAB / "kernel", LAB / "course", LAB / "experiments", LAB, ROOT):
    sys.path.insert(0, str(folder))

import test_sdar  # noqa: E402

test_sdar.TURNS = 0  # small runs play whole episodes here

from test_sdar import checkpoint, hub, policy, tiny  # noqa: E402, F401
