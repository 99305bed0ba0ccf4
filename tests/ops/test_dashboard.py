"""The dashboard and the rules against the metrics that exist: by name, and by a real Prometheus where there is one."""

import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.metrics import Metrics

APT = "apt-get install -y prometheus"
yaml = pytest.importorskip("yaml", reason="pip install 'loraplex[ops]'")

# What may stand in an expression beside metric names and is no function call.
KEYWORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "or", "and", "unless", "offset", "bool"}


def metric_names(expr: str) -> set[str]:
    """The metric names in a PromQL expression: what is left without matchers, ranges, label lists and functions."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expr)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    return set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - KEYWORDS


def panels(dashboard: dict) -> Iterator[dict]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict:
    return json.loads((root / "helm/loraplex/dashboards/loraplex.json").read_text())


@pytest.fixture(scope="module")
def expressions(dashboard: dict) -> list[tuple[str, str]]:
    """(panel title, expression) of every target."""
    return [(panel["title"], target["expr"]) for panel in panels(dashboard) for target in panel.get("targets", [])]


@pytest.fixture(scope="module")
def rules_file(root: Path) -> Path:
    return root / "helm/loraplex/rules/loraplex.yaml"


@pytest.fixture(scope="module")
def rules(rules_file: Path) -> list[dict]:
    return [rule for group in yaml.safe_load(rules_file.read_text())["groups"] for rule in group["rules"]]


def served(metrics: Metrics) -> set[str]:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {sample.name for family in families for sample in family.samples}


def test_the_parser_of_expressions_sees_names_and_only_names():
    expr = (
        'topk(10, a:b:c{x="y_total"}) / on (job) group_left () sum by (le) (rate(b_total[5m])) or c offset 10m > 14.4e1'
    )
    assert metric_names(expr) == {"a:b:c", "b_total", "c"}


def test_every_name_on_the_dashboard_exists(expressions: list[tuple[str, str]], busy: Metrics):
    assert expressions
    for title, expr in expressions:
        names = metric_names(expr)
        assert names, f"{title}: no metric in {expr}"
        assert names <= served(busy), f"{title}: {names - served(busy)} is not a metric of the server"


def test_every_metric_is_on_the_dashboard(expressions: list[tuple[str, str]], busy: Metrics):
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for _, expr in expressions for name in metric_names(expr)}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in served(busy)} == shown


def test_every_name_in_a_rule_exists(rules: list[dict], busy: Metrics):
    known = served(busy) | {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        assert metric_names(rule["expr"]) <= known, rule


def test_the_objective_sits_on_a_bucket_edge(rules: list[dict], busy: Metrics):
    body = busy.render()[0].decode()
    for rule in rules:
        for edge in re.findall(r'le="([^"]+)"', rule["expr"]):
            (metric,) = {name for name in metric_names(rule["expr"]) if name.endswith("_bucket")}
            assert re.search(rf'^{metric}{{[^}}]*le="{re.escape(edge)}"', body, re.MULTILINE), rule


def test_the_error_budget_counts_every_code_that_is_the_servers_fault(rules: list[dict]):
    pytest.importorskip("torch", reason="pip install 'loraplex[serve]'")
    from loraplex_registry.errors import RegistryError
    from loraplex_server.engine.errors import BrokenLogits, Overloaded
    from loraplex_server.loop import EngineStopped
    from loraplex_server.problems import problem

    kinds = (Overloaded, RegistryError, EngineStopped, BrokenLogits, OSError, Exception)
    faults = [problem(kind.__new__(kind)) for kind in kinds]
    assert {fault.status for fault in faults} == {429, 500, 503}
    for rule in rules:
        if codes := re.findall(r'code=~"([^"]+)"', rule["expr"]):
            assert set(codes[0].split("|")) == {fault.code for fault in faults}, rule


def test_panels_do_not_overlap_and_have_their_own_ids(dashboard: dict):
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))


def test_every_variable_that_an_expression_uses_is_defined(dashboard: dict, expressions: list[tuple[str, str]]):
    defined = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    for title, expr in expressions:
        assert set(re.findall(r"\$(\w+)", expr)) <= defined, title


def test_every_alert_has_a_unit_test(rules: list[dict], root: Path):
    tested = (root / "tests/ops/loraplex_rules_test.yaml").read_text()
    for rule in rules:
        if "alert" in rule:
            assert re.search(rf"alertname: {rule['alert']}\n\s+exp_alerts:\n", tested), f"{rule['alert']} never fires"


@pytest.mark.parametrize("arguments", [("check", "rules", "{rules}"), ("test", "rules", "{tests}")], ids=" ".join)
def test_promtool(arguments: tuple[str, ...], rules_file: Path, root: Path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(APT)
    paths = {"rules": rules_file, "tests": root / "tests/ops/loraplex_rules_test.yaml"}
    command = [promtool, *(argument.format(**paths) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def scraped(metrics: Metrics, traffic: Callable[[Metrics], None]) -> Iterator[int]:
    """An HTTP endpoint with these metrics, where something happens between any two scrapes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            traffic(metrics)
            body, content_type = metrics.render()
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def prometheus(binary: str, target: int, rules_file: Path, folder: Path) -> Iterator[httpx.Client]:
    """A real Prometheus that scrapes 127.0.0.1:target each second; stopped on leaving."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules_file)],
        "scrape_configs": [{"job_name": "loraplex", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log, stdout=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_real_prometheus_answers_every_expression(
    expressions: list[tuple[str, str]],
    rules: list[dict],
    rules_file: Path,
    busy: Metrics,
    traffic: Callable[[Metrics], None],
    tmp_path: Path,
):
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip(APT)
    every = {expr for _, expr in expressions} | {rule["record"] for rule in rules if "record" in rule}
    deadline = time.monotonic() + 40
    with scraped(busy, traffic) as target, prometheus(binary, target, rules_file, tmp_path) as client:
        empty = every
        while empty and time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                empty = {expr for expr in empty if not answer(client, expr)}
            except httpx.ConnectError:
                continue  # it is still starting
        assert not empty, (tmp_path / "log").read_text()[-2000:]


def answer(client: httpx.Client, expr: str) -> list[dict]:
    """The series Prometheus finds for a dashboard expression, with Grafana's variables put in; NaN is no answer."""
    query = re.sub(r"\$(job|adapter)\b", ".*", expr).replace("$__rate_interval", "30s")
    response = client.get("/api/v1/query", params={"query": query})
    if response.status_code == 503:  # it is still starting
        return []
    assert response.status_code == 200, f"{query}: {response.text}"
    return [found for found in response.json()["data"]["result"] if found["value"][1] != "NaN"]
