"""The integration test: builds the component and runs the conformance kit on it, with the samples of samples/.

The kit is part of the windlass program; WINDLASS names it where it is not on the PATH.
"""

import os
import subprocess
import unittest

from tests import ROOT


class Component(unittest.TestCase):
    def test_the_component_conforms(self):
        windlass = os.environ.get("WINDLASS", "windlass")
        run = subprocess.run([windlass, "plugin", "test", str(ROOT)], capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
