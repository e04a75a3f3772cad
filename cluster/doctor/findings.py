"""What the doctor says: findings, as lines and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        status: ok; note = jobs run, with less; wrong = some job will fail.
        found: what is there; fix: what to do, empty when ok. node: whose it is, empty = of all or of this host.
    """

    check: str
    status: Status
    found: str
    fix: str = ""
    node: str = ""

    def line(self) -> str:
        where = f"{self.node}: " if self.node else ""
        fix = f"; fix: {self.fix}" if self.fix else ""
        return f"{self.status:<6}{self.check:<16}{where}{self.found}{fix}"


def as_data(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs."""
    return {
        "healthy": not any(finding.status == "wrong" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
