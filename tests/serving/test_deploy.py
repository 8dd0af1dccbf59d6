"""deploy/: manifests against Kubernetes' schemas, and against what they rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from xshare_trtllm.serving.repository import LAUNCH
from xshare_trtllm.serving.supervise import EXIT_TIMEOUT

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = [
    manifest for file in DEPLOY.glob("kubernetes/*.yaml") for manifest in yaml.safe_load_all(file.read_text())
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_are_kubernetes(manifest: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    validate.validate(manifest, validate.latest_version(), strict=True)
    broken = {**manifest, "spec": {**manifest["spec"], "replica": 1}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, validate.latest_version(), strict=True)


def test_the_grace_period_is_longer_than_a_drain() -> None:
    [deployment] = [manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(environment["DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] >= pause + drain + EXIT_TIMEOUT + 5
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm"}


def test_containers_end_by_the_signal_that_drains() -> None:
    for file in DEPLOY.glob("Containerfile*"):
        lines = file.read_text().splitlines()
        assert "STOPSIGNAL SIGTERM" in lines
        [entry] = [line for line in lines if line.startswith("ENTRYPOINT")]
        assert f"/models/{LAUNCH}" in entry
