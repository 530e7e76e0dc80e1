"""``fibldm doctor``."""

from typing import Any


def doctor() -> dict[str, Any]:
    """Show what FibLDM finds here: versions, device, memory, disk, data, extras. Exit code 1: it cannot work."""
    from dataclasses import asdict

    from fibldm.doctor import diagnose

    findings = diagnose()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        remedy = f"  -> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.level:<7}  {finding.name:<{width}}  {finding.value}{remedy}")
    return {
        "ok": all(finding.level != "problem" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
