"""prefect.yaml: every deployment loads, and its parameters fit the flow's signature."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

import flows
import tasks
from diffagent.schemas.config import load_config
from tests.conftest import ROOT

FILE = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in FILE["deployments"]}


def test_every_flow_has_a_deployment() -> None:
    assert set(DEPLOYMENTS) == {
        "build-dabench",
        "train-sft",
        "train-rrhf",
        "evaluate-agent",
        "run-stage",
        "run-pipeline",
    }
    assert {d["work_pool"]["work_queue_name"] for d in DEPLOYMENTS.values()} == {"cpu", "gpu"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_entrypoint_and_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    deployment = DEPLOYMENTS[name]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert flow.name == name and flow.retries == 0
    scheduled = [s.get("parameters", {}) for s in deployment.get("schedules", [])]
    if name == "run-stage":  # a flow asks for it, with what it was given itself
        config = load_config("configs/sandbox.yaml").model_dump(mode="json")
        flow.validate_parameters({"key": "render-0", "config": config})
        return
    for parameters in [{}, *scheduled]:
        flow.validate_parameters({**deployment["parameters"], **parameters})
    load_config(deployment["parameters"]["config"])


def test_the_dataset_refresh_is_scheduled() -> None:
    deployment = DEPLOYMENTS["build-dabench"]
    [schedule] = deployment["schedules"]
    # Not the schedule's parameters: Prefect's PATCH of a schedule (resume, the UI's toggle) drops
    # them (https://github.com/PrefectHQ/prefect/issues/17982).
    assert deployment["parameters"]["refresh"] is True and "parameters" not in schedule
    assert schedule["slug"] and len(schedule["cron"].split()) == 5
    assert ZoneInfo(schedule["timezone"])


@pytest.mark.parametrize("package", [flows, tasks])
def test_generic_package_names_are_ours(package: object) -> None:
    assert str(ROOT) in package.__file__
