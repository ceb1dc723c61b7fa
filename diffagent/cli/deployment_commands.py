"""Commands on the deployments of prefect.yaml, by their short names.

They are Prefect's own commands, run as child processes, since this library does without Prefect:
Prefect wants FLOW/DEPLOYMENT for a name, which in prefect.yaml are the same word twice, and the id
of a schedule, which nobody knows.
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

app = typer.Typer(help="Run deployments of prefect.yaml, by name.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A deployment of prefect.yaml: 'build-dabench'.")
]


@app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, name: Name) -> None:
    """Start a run of a deployment; a worker takes it.

    Options of 'prefect deployment run' may follow: -p refresh=true, --watch, --start-in '1 hour'.
    """
    _prefect("run", full_name(name), *context.args)


@app.command("resume")
def resume(name: Name) -> None:
    """Let the schedules of a deployment start runs."""
    _set_schedules(name, "resume")


@app.command("pause")
def pause(name: Name) -> None:
    """Stop the schedules of a deployment."""
    _set_schedules(name, "pause")


def full_name(name: str) -> str:
    """FLOW/DEPLOYMENT of a short name: in prefect.yaml a deployment is named as its flow."""
    return name if "/" in name else f"{name}/{name}"


def _set_schedules(name: str, verb: str) -> None:
    """Resume or pause every schedule of a deployment.

    Raises:
        ConfigError: it has none.
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
    """Run 'prefect deployment WORDS'; returns its output when ``capture``.

    Raises:
        ConfigError: Prefect is not installed.
        DiffAgentError: the command failed.
    """
    if importlib.util.find_spec("prefect") is None:
        raise ConfigError("this command needs Prefect: pip install 'diffagent[prefect]'")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", *words],
        # A server for the length of one command would know no deployment.
        env={**os.environ, "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"},
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        output = (done.stderr or done.stdout or f"exit code {done.returncode}").strip()
        reason = output.splitlines()[-1]
        raise DiffAgentError(
            f"'prefect deployment {words[0]}' failed: {reason.rstrip('.')}. Is the server running "
            "('make serve-dashboard'), does PREFECT_API_URL name it "
            f"({os.environ.get('PREFECT_API_URL', 'it is not set')}), and was the deployment made "
            "('prefect deploy --all')?"
        )
    return done.stdout or ""
