"""``turbo-gguf doctor``: what is there, what is missing, and the command that fixes it."""

from __future__ import annotations

import click

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.make import doctor


@click.command(name="doctor")
def command() -> None:
    """Say what is there, what is missing, and the command that fixes it. Exit code 0: everything for a CPU build is there; 3: not."""
    findings = doctor.examine()
    click.echo(doctor.table(findings))
    missing = [finding for finding in findings if finding.status == "missing"]
    if missing:
        raise EnvironmentMissing(f"not ready for a CPU build: {', '.join(finding.name for finding in missing)}", missing[0].fix)
