"""``diffagent deployment``: run, pause and resume deployments of prefect.yaml by short names.

The commands run Prefect's own commands as child processes, since this library does not import
Prefect. They save the user the long name FLOW/DEPLOYMENT and the id of a schedule.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Annotated

import typer

from diffagent.errors import ConfigError, DiffAgentError

app = typer.Typer(help="Run, pause and resume deployments of prefect.yaml.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Deployment of prefect.yaml, e.g. 'build-dabench'.")
]


@app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, name: Name) -> None:
    """Start a run of a deployment on a worker.

    Accepts the options of 'prefect deployment run': -p refresh=true, --watch, --start-in '1 hour'.
    """
    _prefect("run", full_name(name), *context.args)


@app.command("resume")
def resume(name: Name) -> None:
    """Activate the schedules of a deployment."""
    _set_schedules(name, "resume")


@app.command("pause")
def pause(name: Name) -> None:
    """Pause the schedules of a deployment."""
    _set_schedules(name, "pause")


def full_name(name: str) -> str:
    """Return FLOW/DEPLOYMENT for a short name; in prefect.yaml both have the same name."""
    return name if "/" in name else f"{name}/{name}"


def _set_schedules(name: str, verb: str) -> None:
    """Resume or pause every schedule of a deployment.

    Raises:
        ConfigError: the deployment has no schedule.
    """
    listed = _prefect("schedule", "ls", full_name(name), "--output", "json", capture=True)
    schedules = json.loads(listed)
    if not schedules:
        raise ConfigError(f"the deployment {name!r} has no schedule; see prefect.yaml")
    for schedule in schedules:
        if schedule["active"] == (verb == "resume"):
            state = "active" if schedule["active"] else "paused"
            typer.echo(f"{schedule['schedule']} of {name} is {state} already")
        else:
            _prefect("schedule", verb, full_name(name), schedule["id"])


def _prefect(*words: str, capture: bool = False) -> str:
    """Run 'prefect deployment WORDS'; return its output if ``capture``.

    Raises:
        ConfigError: Prefect is not installed.
        DiffAgentError: the command failed.
    """
    if importlib.util.find_spec("prefect") is None:
        raise ConfigError("this command needs Prefect: pip install 'diffagent[prefect]'")
    process = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", *words],
        # A server that lives for one command only would have no deployments.
        env={**os.environ, "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"},
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        output = (process.stderr or process.stdout or f"exit code {process.returncode}").strip()
        reason = output.splitlines()[-1]
        raise DiffAgentError(
            f"'prefect deployment {words[0]}' failed: {reason.rstrip('.')}. Is the server running "
            "('make serve-dashboard'), does PREFECT_API_URL name it "
            f"({os.environ.get('PREFECT_API_URL', 'it is not set')}), and was the deployment made "
            "('prefect deploy --all')?"
        )
    return process.stdout or ""
