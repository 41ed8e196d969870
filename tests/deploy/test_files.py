"""What is deployed is checked by what runs it: systemd, Prometheus, and the names that the code really has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "compose" / "grafana" / "dashboards" / "ensemble-server.json"
RULES = DEPLOY / "compose" / "alerts.yml"


def run(*command: str | Path) -> str:
    """Its output; fails with it if the command does."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_takes_the_unit(tmp_path):
    text = (DEPLOY / "systemd" / "ensemble-server.service").read_text()
    assert "/opt/ensemble-server/bin/ensemble" in text
    unit = tmp_path / "ensemble-server.service"
    unit.write_text(
        text.replace("/opt/ensemble-server/bin/ensemble", sys.executable)
    )  # systemd asks whether it is there
    found = run("systemd-analyze", "verify", "--man=no", unit)
    assert "ensemble-server.service" not in found, found  # it warns without failing


def test_prometheus_takes_its_config_and_its_alerts():
    run("promtool", "check", "rules", RULES)
    run("promtool", "check", "config", DEPLOY / "compose" / "prometheus.yml")


def test_dashboard_and_alerts_name_metrics_that_exist():
    known = {metric.name for metric in Metrics().registry.collect()}
    text = DASHBOARD.read_text() + RULES.read_text()
    for name in set(re.findall(r"ensemble:\w+", text)):
        family = re.sub(r"_(bucket|sum|count|total)$", "", name)
        assert family in known or name in known, name


def test_panels_have_places_of_their_own():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)


def test_compose_mounts_files_that_are_there():
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / "compose" / source).exists(), source
    config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["server:8000"]
    assert "server" in services


def test_the_manifests_parts_fit_together(tmp_path):
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "ensemble-server.yaml").read_text()))
    by_kind = {part["kind"]: part for part in parts}
    assert all(part["metadata"]["name"] == "ensemble-server" for part in parts)
    pod = by_kind["Deployment"]["spec"]["template"]
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    [container] = pod["spec"]["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    config = parse_config(yaml.safe_load(by_kind["ConfigMap"]["data"]["config.yaml"]), source=tmp_path / "config.yaml")
    assert config.server.api_keys_env == container["env"][0]["name"]
    assert config.server.port == container["ports"][0]["containerPort"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.server.shutdown_timeout_s
    probes = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"/ready", "/live"}
