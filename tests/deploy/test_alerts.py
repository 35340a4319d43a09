"""The rules, the dashboard and the page about them; and an event on a server that fires its alert, all the way."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from tests.server.transport.test_metrics import CONTRACT

from glasshouse.client import Client, ProbeWeights, generated
from glasshouse.tour.server_process import ServerProcess

from .conftest import Programs

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
ALERT = "GlasshouseMonitorAborted"
WITHIN_S = 90.0


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression names, as the page has them."""
    found = set(re.findall(r"\bglasshouse_\w+", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def panels() -> list[dict[str, Any]]:
    board = json.loads((DEPLOY / "grafana" / "glasshouse.json").read_text())
    return list(board["panels"])


def test_rules_and_configurations_are_what_prometheus_reads(programs: Programs) -> None:
    folder = DEPLOY / "prometheus"
    for arguments in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ):
        done = subprocess.run(
            [programs.promtool, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_that_is_asked_for_exists() -> None:
    for rule in rules():
        assert metrics_in(rule["expr"]) <= CONTRACT.keys(), rule["alert"]
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    assert len(asked) > 20
    for expression in asked:
        assert metrics_in(expression), expression
        assert metrics_in(expression) <= CONTRACT.keys(), expression
    board = (DEPLOY / "grafana" / "glasshouse.json").read_text()
    assert metrics_in(board) <= CONTRACT.keys()
    # Nothing that is counted goes unseen.
    assert metrics_in(board) == set(CONTRACT)


def test_every_alert_is_tried_and_explained() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    page = (DEPLOY / "alerts.md").read_text()
    assert re.findall(r"^## (Glasshouse\w+)$", page, re.MULTILINE) == names
    tests = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    untried = {name for name in names if name not in tests}
    assert untried <= {"GlasshouseMonitorSteered", "GlasshouseMonitorScoresNotFinite"}, untried
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"alerts.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_dashboard_is_sound() -> None:
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    cells: set[tuple[int, int]] = set()
    for panel in found:
        at = panel["gridPos"]
        own = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not own & cells, panel["title"]
        cells |= own
        if panel["type"] != "row":
            assert panel["description"] and panel["datasource"]["uid"] == "${datasource}", panel["title"]
    board = json.loads((DEPLOY / "grafana" / "glasshouse.json").read_text())
    declared = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(found))) - {"__rate_interval"}
    assert used <= declared


# -- from an event to whoever is told ----------------------------------------------------------------------------


class Receiver:
    """What Alertmanager posts to."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        received = self.alerts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/alerts"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(folder: Path, name: str, *command: str) -> Iterator[None]:
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(holds: Callable[[], Any], what: str, folder: Path) -> Any:
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        try:
            found = holds()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(0.1)
    logs = "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in folder.glob("*.log"))
    raise AssertionError(f"{what} did not happen within {WITHIN_S:g} s\n{logs}")


def answer(url: str) -> Any:
    with urlopen(url, timeout=10) as page:
        text = page.read()
    return json.loads(text)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def test_an_abort_is_told_to_the_operators(programs: Programs, receiver: Receiver, tmp_path: Path) -> None:
    """The deployed rules and configurations, with addresses and intervals of the test's."""
    port, alerts_port = free_port(), free_port()
    with ServerProcess(
        "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--threads", "1", "--registry", "memory"
    ) as server:
        scraped = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
        write_configurations(tmp_path, scraped, alerts_port, receiver.url)
        alertmanager = (
            programs.alertmanager, "--config.file=alertmanager.yml", "--storage.path=alerts-data",
            f"--web.listen-address=127.0.0.1:{alerts_port}", "--cluster.listen-address=",
        )  # fmt: skip
        prometheus = (
            programs.prometheus, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
            f"--web.listen-address=127.0.0.1:{port}",
        )  # fmt: skip
        with (
            running(tmp_path, "alertmanager", *alertmanager),
            running(tmp_path, "prometheus", *prometheus),
            Client(server.target) as client,
        ):
            model = client.model()
            weights = np.zeros((model.info.d_model, 1), np.float32)
            model.create_probe(
                "always", ProbeWeights(layers=[(weights, np.full(1, 9.0, np.float32))]), labels=["no", "yes"],
                hook_points="blocks.3.hook_resid_post", pooling="token",
            )  # fmt: skip
            model.create_monitor("planted", probe="always", above=0.5, action="abort", positions=generated())
            base = f"http://127.0.0.1:{port}/api/v1"
            query = f'{base}/query?query=glasshouse_monitor_events_total{{monitor="planted"}}'
            quiet = query.replace("{", "%7B").replace("}", "%7D").replace('"', "%22")
            until(lambda: answer(quiet)["data"]["result"], "the first scrape of the monitor", tmp_path)
            assert not any(alert["labels"]["alertname"] == ALERT for alert in receiver.alerts)
            ended = model.generate("Once upon a time", max_tokens=8, temperature=0.0).result()
            assert ended.finish_reason == "aborted"

            def firing() -> list[dict[str, Any]]:
                held = answer(f"http://127.0.0.1:{alerts_port}/api/v2/alerts")
                return [alert for alert in held if alert["labels"]["alertname"] == ALERT]

            (alert,) = until(firing, "the alert in Alertmanager", tmp_path)
            assert alert["labels"]["monitor"] == "planted" and alert["labels"]["severity"] == "page"
            assert alert["annotations"]["summary"].startswith("planted has ended streams on 127.0.0.1:")
            told = until(
                lambda: [one for one in receiver.alerts if one["labels"]["alertname"] == ALERT],
                "the notice to the operators",
                tmp_path,
            )
            assert told[0]["status"] == "firing"
            # Nothing else is wrong with the server.
            everything = answer(f"{base}/alerts")["data"]["alerts"]
            assert {one["labels"]["alertname"] for one in everything if one["state"] == "firing"} == {ALERT}


def write_configurations(folder: Path, scraped: str, alerts_port: int, receiver: str) -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    prometheus["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alerts_port}"]
    prometheus["scrape_configs"][0]["static_configs"][0]["targets"] = [scraped]
    alertmanager = yaml.safe_load((DEPLOY / "alertmanager" / "alertmanager.yml").read_text())
    alertmanager["route"]["group_wait"] = "0s"
    alertmanager["receivers"][0]["webhook_configs"][0]["url"] = receiver
    (folder / "prometheus.yml").write_text(yaml.safe_dump(prometheus))
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(alertmanager))
    (folder / "alerts.yml").write_text(RULES.read_text())
