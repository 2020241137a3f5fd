import unittest

import tests  # noqa: F401, finds the plugin and the bindings

from wit_world.exports.diagnosis import FindingState

import plugin


class Diagnostic(unittest.TestCase):
    def test_the_fullest_disk_decides(self):
        for data, expect in [
            ('[{"path":"/","used_percent":40}]', FindingState.OK),
            ('[{"path":"/","used_percent":40},{"path":"/data","used_percent":97}]', FindingState.FAILED),
            ('{"path":"/","used_percent":90}', FindingState.FAILED),
            ("[]", FindingState.SKIPPED),
            ("no JSON", FindingState.SKIPPED),
        ]:
            self.assertEqual(plugin.judge(data, 90).state, expect, data)
