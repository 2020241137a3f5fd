"""Unit tests run natively: the contract's types come from target/bindings, which build.sh generates."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
for directory in (ROOT / "src", ROOT / "target" / "bindings"):
    sys.path.insert(0, str(directory))
