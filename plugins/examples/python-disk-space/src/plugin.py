"""The diagnostic `disk-space`: whether a server's disks have room left.

It looks through `probes` and can change nothing. An item that cannot be looked at is skipped, and says why.
"""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports import diagnosis
from wit_world.exports.diagnosis import Finding, FindingState
from wit_world.imports import probes, types

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "failed_percent": {
            "type": "number", "minimum": 1, "maximum": 100, "default": 90,
            "description": "From this share on a disk counts as full.",
        },
    },
}


class PluginInfo(exports.PluginInfo):
    def describe(self) -> types.Descriptor:
        return types.Descriptor(
            name="disk-space",
            version="0.1.0",
            title="Disk space",
            summary="Whether the disks of a server have room left.",
            provider="you",
            category="server",
            parameters_schema=json.dumps(SCHEMA),
            operating_systems=["linux"],
            wishes=types.Wishes(users=[], path_roots=[], attributes=[]),
            items=[types.DiagnosticItem("disk", "Disk space", types.Severity.CRITICAL, [])],
            presets=[],
            attributes=[],
        )


class Diagnosis(exports.Diagnosis):
    def diagnose(self, request: diagnosis.DiagnosisRequest) -> diagnosis.Report:
        parameters = json.loads(request.parameters)
        unknown = sorted(set(parameters) - set(SCHEMA["properties"]))
        if unknown:
            raise Err(types.PluginError("invalid-parameter", f"unknown parameter {unknown[0]}", f"/{unknown[0]}"))
        if request.subject.kind != "server":
            raise Err(types.PluginError("unsupported", "only servers can be looked at", None))
        if request.items and "disk" not in request.items:
            return diagnosis.Report("nothing was asked for", None, [], [])
        try:
            answer = probes.run(request.subject.id, "disk", [], 10_000)
            finding = judge(answer.data, parameters.get("failed_percent", 90))
        except Err as error:
            finding = Finding("disk", FindingState.SKIPPED, error.value.message, "", [])
        summary = {
            FindingState.OK: "the disks have room left",
            FindingState.FAILED: "a disk is full",
        }.get(finding.state, "the disks could not be looked at")
        return diagnosis.Report(summary=summary, verdict=None, findings=[finding], attributes=[])


def judge(data: str, failed_percent: float) -> Finding:
    """The fullest disk decides. The probe answers one object with path and used_percent, or a list of them."""
    try:
        disks = json.loads(data)
        fullest = max(disks if isinstance(disks, list) else [disks], key=lambda disk: disk["used_percent"])
        percent, path = fullest["used_percent"], fullest["path"]
    except (ValueError, KeyError, TypeError):
        return Finding("disk", FindingState.SKIPPED, "the probe's answer has another shape", "", [])
    seen = f"{path} is {percent:.0f}% full"
    if percent >= failed_percent:
        return Finding("disk", FindingState.FAILED, seen, "Remove what is not needed, or make the disk larger.", [])
    return Finding("disk", FindingState.OK, seen, "", [])
