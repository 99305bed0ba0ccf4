"""The chart through real Helm: it lints, renders valid and restricted manifests, and refuses what it does not know."""

import copy
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

EXTRA = "pip install 'loraplex[ops]'"
helm = pytest.importorskip("helm_python", reason=EXTRA)
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=EXTRA)
yaml = pytest.importorskip("yaml", reason=EXTRA)

KUBERNETES = ("1.30", "1.34")  # the chart's floor, and a recent one
CUSTOM = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "InferencePool"}  # kinds of CRDs: no schema at hand

EVERYTHING = {
    "fullnameOverride": "lp",
    "image": {"tag": "1.2.3", "pullSecrets": ["regcred"]},
    "model": {
        "revision": "v1: final",
        "cache": {"persistent": True, "accessMode": "ReadWriteMany", "storageClass": "nfs"},
    },
    "lora": {
        "maxLoras": 4,
        "maxHostLoras": 32,
        "maxHostBytes": 8_589_934_592,
        "maxRank": 16,
        "adapterWeights": {"team/a": 2, "base": 0.5},
    },
    "server": {
        "replicas": 2,
        "maxModelLen": 1_048_576,
        "maxRows": 16,
        "maxQueue": 64,
        "kvCacheBytes": 68_719_476_736,
        "requestTimeout": 1_000_000,
        "goldenCheck": False,
        "prefixCache": False,
        "lean": True,
        "apiKeys": {"existingSecret": "keys"},
        "requireSignature": {"existingSecret": "signers", "keys": ["release.key.pub", "old.pub"]},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"note": "yes"},
        "podLabels": {"team": "ml"},
        "extraEnv": [{"name": "HF_ENDPOINT", "value": "https://hub.example.com"}],
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
    },
    "registry": {
        "rateLimit": "600/min",
        "tokens": {"existingSecret": "tokens"},
        "serverToken": {"existingSecret": "server-token"},
        "storage": {"storageClass": "fast"},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"operator": "Exists"}],
    },
    "hfToken": {"existingSecret": "hf"},
    "autoscaling": {"type": "hpa"},
    "gateway": {"inferencePool": {"enabled": True}},
    "metrics": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True},
    },
    "networkPolicy": {
        "serverFrom": [{"namespaceSelector": {"matchLabels": {"team": "ml"}}}],
        "registryFrom": [{"podSelector": {"matchLabels": {"app": "trainer"}}}],
        "extraEgress": [{"ports": [{"protocol": "TCP", "port": 3128}]}],
    },
    "serviceAccount": {"annotations": {"a": "b"}},
    "extraObjects": [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "object"},
            "data": {"at": "{{ .Release.Name }}"},
        },
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: text}\ndata: {at: '{{ .Release.Namespace }}'}",
    ],
}
VALUE_SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": EVERYTHING,
    "minimal": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
        "server": {"topologySpread": {"enabled": False}},
    },
    "external registry": {
        "registry": {
            "enabled": False,
            "externalUrl": "https://adapters.example.com",
            "serverToken": {"existingSecret": "t"},
        },
        "networkPolicy": {"allowDownloads": False},
    },
    "external registry at a port": {"registry": {"enabled": False, "externalUrl": "http://adapters.example.com:9000"}},
    "gpu": {"server": {"device": "cuda", "gpu": {"count": 1, "runtimeClassName": "nvidia"}}},
    "hpa": {"autoscaling": {"type": "hpa", "minReplicas": 2, "maxReplicas": 8}},
    "existing claims": {
        "model": {"cache": {"persistent": True, "existingClaim": "models"}},
        "registry": {"storage": {"existingClaim": "adapters"}},
    },
    "a team": {
        "registry": {
            "replicas": 3,
            "database": {"existingSecret": "catalog", "upgrade": True},
            "store": {"url": "s3://adapters/team", "existingSecret": "bucket"},
        },
        "networkPolicy": {"registryExtraEgress": [{"ports": [{"protocol": "TCP", "port": 6432}]}]},
    },
    "one node": {"model": {"cache": {"persistent": True}}, "metrics": {"serviceMonitor": {"enabled": True}}},
}


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "helm/loraplex"


@pytest.fixture(scope="module")
def chart(folder: Path) -> Iterator[Any]:
    with helm.Chart.load(folder) as loaded:
        yield loaded


def render(chart: Any, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    rendered = chart.render(values or {}, name="rel", namespace="ns")
    texts = [text for name, text in rendered.items() if not name.endswith("NOTES.txt")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def find(documents: list[dict[str, Any]], kind: str, ending: str = "") -> dict[str, Any]:
    (found,) = (d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(ending))
    return found


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of all that run a pod."""
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod":
            yield document["metadata"]["name"], document["spec"]


def server(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return find(documents, "Deployment")["spec"]["template"]["spec"]


every_value_set = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)


@every_value_set
def test_it_lints_without_a_word(folder: Path, values: dict[str, Any]):
    report = helm.lint(folder, values, strict=True)
    assert (report["messages"], report["errors"]) == ([], [])


@every_value_set
def test_every_manifest_is_valid(chart: Any, values: dict[str, Any]):
    documents = render(chart, values)
    assert {"Deployment", "Service", "Pod"} <= {document["kind"] for document in documents}
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(names) == len(set(names))
    for document in documents:
        if document["kind"] not in CUSTOM:
            for version in KUBERNETES:
                kubernetes_validate.validate(document, version, strict=True)


@every_value_set
def test_every_pod_is_restricted(chart: Any, values: dict[str, Any]):
    for name, pod in pods(render(chart, values)):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}, name
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["privileged"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            if container in pod["containers"]:
                assert mounted == {volume["name"] for volume in pod["volumes"]}
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])


def test_the_user_is_the_images_user(chart: Any, root: Path):
    (user,) = re.findall(r"^USER (\d+):\d+$", (root / "Dockerfile").read_text(), re.MULTILINE)
    assert {pod["securityContext"]["runAsUser"] for _, pod in pods(render(chart))} == {int(user)}


@every_value_set
def test_selectors_find_their_own_pods_alone(chart: Any, values: dict[str, Any]):
    documents = render(chart, values)
    labels = {
        d["metadata"]["name"]: d["spec"].get("template", d)["metadata"]["labels"]
        for d in documents
        if d["kind"] in ("Deployment", "StatefulSet", "Pod")
    }
    for document in documents:
        if document["kind"] == "Service":
            wanted = document["spec"]["selector"].items()
            found = [name for name, own in labels.items() if wanted <= own.items()]
            assert found == [document["metadata"]["name"]]


def test_a_values_file_with_every_default_is_accepted(chart: Any, folder: Path):
    defaults = yaml.safe_load((folder / "values.yaml").read_text())
    chart.validate_schema(defaults)
    assert render(chart, defaults) == render(chart)


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]


def test_every_default_stands_in_the_schema_and_the_other_way_round(folder: Path):
    schema = json.loads((folder / "values.schema.json").read_text())

    def resolved(part: dict[str, Any]) -> dict[str, Any]:
        return schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part

    def compare(part: dict[str, Any], values: dict[str, Any], path: str) -> None:
        part = resolved(part)
        if "properties" not in part or "probes" in path or "resources" in path:
            return
        assert part["additionalProperties"] is False, path
        assert set(part["properties"]) - {"global"} == set(values), path
        for key, value in values.items():
            compare(part["properties"][key], value, f"{path}.{key}")

    compare(schema, yaml.safe_load((folder / "values.yaml").read_text()), "values")


def another(value: Any, path: tuple[str, ...]) -> Any:
    """A value of the same type that differs and that the schema takes."""
    choices = {"quantization": "none", "accessMode": "ReadWriteMany", "pullPolicy": "Always", "device": "cpu"}
    choices |= {
        "dtype": "float32",
        "whenUnsatisfiable": "DoNotSchedule",
        "type": "NodePort",
        "failureMode": "FailClose",
    }
    choices |= {"adapterWeights": {"another": 7}}
    choices |= {
        "externalUrl": "http://elsewhere",
        "rateLimit": "7/s",
        "url": "s3://elsewhere/x",
        "size": "7Gi",
        "interval": "7s",
        "cpu": "7",
        "memory": "7Gi",
    }
    if path == ("autoscaling", "type"):
        return "hpa"
    if path[-1] in choices:
        return choices[path[-1]]
    match value:
        case bool():
            return not value
        case int() | None:
            return 7
        case str():
            return "another"
        case dict():
            return {"another": "one"}
        case _:
            return ["another"] if path[-1] in ("pullSecrets", "keys") else [{"name": "another"}]


def test_every_value_changes_what_is_rendered(chart: Any):
    """A value that changes nothing, in any of the value sets, is a promise that nobody keeps."""

    def rendered(values: dict[str, Any]) -> str | dict[str, str]:
        try:
            chart.validate_schema(values)
            documents = chart.render(values, name="rel", namespace="ns")
        except helm.HelmRenderError as refused:  # by the chart's own words: then the value is looked at
            return str(refused)
        return {name: text for name, text in documents.items() if not name.endswith("NOTES.txt")}

    before = [(values, rendered(values)) for values in VALUE_SETS.values()]
    defaults = chart.values
    for path in leaves(defaults):

        def changed(values: dict[str, Any], path: tuple[str, ...] = path) -> dict[str, Any]:
            whole = part = copy.deepcopy(values)
            default = defaults
            for key in path[:-1]:
                part, default = part.setdefault(key, {}), default[key]
            part[path[-1]] = another(default[path[-1]], path)
            return whole

        assert any(rendered(changed(values)) != first for values, first in before), ".".join(path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"nmae": "x"}}, "nmae"),
        ({"server": {"probes": {"liveness": {"period": 3}}}}, "period"),
        ({"server": {"replicas": "three"}}, "replicas"),
        ({"server": {"port": 70000}}, "port"),
        ({"model": {"quantization": "int3"}}, "quantization"),
        ({"lora": {"maxRank": 512}}, "maxRank"),
        ({"registry": {"externalUrl": "adapters"}}, "externalUrl"),
        ({"registry": {"store": {"url": "file:///data"}}}, "url"),
        ({"registry": {"rateLimit": "600"}}, "rateLimit"),
        ({"registry": {"rateLimit": "0/s"}}, "rateLimit"),
        ({"registry": {"database": {"upgrade": "yes"}}}, "upgrade"),
        ({"server": {"requireSignature": {"keys": ["../x"]}}}, "keys"),
        ({"registry": {"store": {"url": "s3://key:secret@bucket"}}}, "url"),
        ({"autoscaling": {"type": "keda"}}, "type"),
        ({"server": {"apiKeys": {"existingSecret": "Not A Name"}}}, "existingSecret"),
        ({"server": {"kvCacheBytes": "4Gi"}}, "kvCacheBytes"),
        ({"server": {"requestTimeout": -1}}, "requestTimeout"),
        ({"lora": {"adapterWeights": {"team": 0}}}, "adapterWeights"),
        ({"lora": {"adapterWeights": {"team": "2"}}}, "adapterWeights"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_name(chart: Any, values: dict[str, Any], named: str):
    with pytest.raises(helm.HelmError, match=named):
        chart.validate_schema(values)
    with pytest.raises(helm.HelmError, match=named):
        render(chart, values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"registry": {"externalUrl": "http://x"}}, "set registry.enabled=false to use another registry"),
        ({"registry": {"enabled": False}}, "name the registry to use in registry.externalUrl"),
        ({"registry": {"tokens": {"existingSecret": "t"}}}, "registry.serverToken.existingSecret is empty"),
        ({"registry": {"replicas": 2}}, "set registry.database.existingSecret and registry.store.url"),
        ({"registry": {"replicas": 2, "store": {"url": "s3://a/b"}}}, "registry.replicas is more than 1"),
        ({"registry": {"store": {"existingSecret": "bucket"}}}, "registry.store.url is empty"),
        ({"registry": {"database": {"upgrade": True}}}, "registry.database.existingSecret is empty"),
        ({"server": {"requireSignature": {"existingSecret": "s"}}}, "server.requireSignature.keys is empty"),
        ({"server": {"requireSignature": {"keys": ["a.pub"]}}}, "server.requireSignature.existingSecret is empty"),
        ({"server": {"replicas": 2}, "model": {"cache": {"persistent": True}}}, "set ReadWriteMany"),
        ({"autoscaling": {"type": "hpa"}, "model": {"cache": {"persistent": True}}}, "set ReadWriteMany"),
        ({"autoscaling": {"type": "hpa", "minReplicas": 5}}, "autoscaling.minReplicas is greater"),
        ({"server": {"drain": {"preStopSeconds": 150}}}, "leaves nothing"),
        (
            {"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
            "scrape every server twice",
        ),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_are_refused_in_words(chart: Any, values: dict[str, Any], said: str):
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        render(chart, values)


def test_probes_ask_what_each_is_for(chart: Any):
    (container,) = server(render(chart))["containers"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800  # a large base is downloaded first


def test_every_path_that_the_chart_asks_is_a_route(chart: Any):
    routes = pytest.importorskip("loraplex_server.routes", reason="pip install 'loraplex[serve]'").ROUTES
    registry = importlib.import_module("loraplex_registry.http")
    served = {
        "server": {route.path for route in routes},
        "registry": {route.path for route in registry.ROUTES},
    }
    documents = render(chart, EVERYTHING)
    for _, pod in pods(documents):
        for container in pod["containers"]:
            for probe in (container[key] for key in container if key.endswith("Probe")):
                assert probe["httpGet"]["path"] in served[container["name"]]
    for endpoint in find(documents, "PodMonitor")["spec"]["podMetricsEndpoints"]:
        assert endpoint["path"] in served["server"]
    for path in re.findall(r'get\("([^"]+)"\)', json.dumps(find(documents, "Pod")).replace('\\"', '"')):
        assert path in served["server"]


@pytest.mark.parametrize(
    ("grace", "sleep", "drain"), [(None, None, 120), (600, 20, 570), (40, 15, 15), (25, 15, 1), (20, 19, 1)]
)
def test_the_drain_fits_into_the_grace_period(chart: Any, grace: int | None, sleep: int | None, drain: int):
    """preStop and the server's own wait for streams both count against the grace period; then the kernel kills."""
    values = {"gracePeriodSeconds": grace, "preStopSeconds": sleep}
    pod = server(render(chart, {"server": {"drain": values}} if grace else {}))
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["LORAPLEX_DRAIN_SECONDS"] == f"{drain}"
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause + drain <= pod["terminationGracePeriodSeconds"]
    assert grace or 15 <= pause <= 30


def test_every_variable_is_one_that_the_server_reads(chart: Any):
    command = pytest.importorskip("loraplex_server.__main__", reason="pip install 'loraplex[serve]'").serve
    read = {parameter.envvar for parameter in command.params} | {"LORAPLEX_HOME", "LORAPLEX_REGISTRY_TOKEN"}
    (container,) = server(render(chart, EVERYTHING))["containers"]
    named = {entry["name"] for entry in container["env"] if entry["name"].startswith("LORAPLEX_")}
    assert "LORAPLEX_DRAIN_SECONDS" in named <= read


def test_shares_of_the_service_are_given_by_name(chart: Any):
    (container,) = server(render(chart, EVERYTHING))["containers"]
    assert {"--adapter-weight=team/a=2", "--adapter-weight=base=0.5"} <= set(container["args"])
    assert {"--no-golden-check", "--no-prefix-cache", "--lean"} <= set(container["args"])


@pytest.mark.parametrize("name", ["server", "registry"])
def test_every_argument_is_an_option_that_the_program_takes(chart: Any, name: str):
    if name == "server":
        command = pytest.importorskip("loraplex_server.__main__", reason="pip install 'loraplex[serve]'").serve
    else:
        command = importlib.import_module("loraplex_registry.cli").cli.commands["serve"]
    parameters = {option: parameter for parameter in command.params for option in parameter.opts}
    context = click.Context(command)
    for values in VALUE_SETS.values():
        for _, pod in pods(render(chart, values)):
            (container,) = pod["containers"]
            for argument in container["args"] if container["name"] == name else ():
                option, _, value = argument.partition("=")
                assert option in parameters, f"{name} has no option {option}"
                if parameters[option].is_flag:
                    assert "=" not in argument, argument
                elif not value.startswith("/etc/loraplex"):  # a mounted file: not here
                    given = [value] if parameters[option].multiple else value
                    parameters[option].type_cast_value(context, given)  # raises when the program would


def test_an_option_that_is_left_null_is_left_to_the_server(chart: Any):
    (container,) = server(render(chart))["containers"]
    left = "--(max-model-len|max-rows|max-queue|kv-cache-bytes|max-host-bytes|request-timeout|adapter-weight|lean|no-)"
    assert not [a for a in container["args"] if re.match(left, a)]


def test_large_numbers_stay_whole(chart: Any):
    (container,) = server(render(chart, EVERYTHING))["containers"]
    whole = {"--max-model-len=1048576", "--max-host-bytes=8589934592", "--kv-cache-bytes=68719476736"}
    assert whole <= set(container["args"])


def test_text_from_values_stays_text(chart: Any):
    (container,) = server(render(chart, EVERYTHING))["containers"]
    assert "--revision=v1: final" in container["args"]


def test_secrets_are_read_where_they_are_kept(chart: Any):
    documents = render(chart, EVERYTHING)
    pod = server(documents)
    env = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token"}
    assert env["LORAPLEX_REGISTRY_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "server-token", "key": "token"}
    assert "--api-key-file=/etc/loraplex/api-keys" in pod["containers"][0]["args"]
    assert [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v] == ["keys", "signers"]
    assert not [d for d in documents if d["kind"] == "Secret"]


def test_only_the_named_public_keys_are_mounted(chart: Any):
    pod = server(render(chart, EVERYTHING))
    (container,) = pod["containers"]
    (volume,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "signers"]
    names = ["release.key.pub", "old.pub"]
    assert volume["items"] == [{"key": name, "path": name} for name in names]
    (mount,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "signers"]
    assert [f"--require-signature={mount}/{name}" for name in names] == [
        argument for argument in container["args"] if argument.startswith("--require-signature")
    ]
    assert not [argument for argument in server(render(chart))["containers"][0]["args"] if "signature" in argument]


def test_the_catalog_is_upgraded_before_the_registry_starts(chart: Any):
    pod = find(render(chart, VALUE_SETS["a team"]), "StatefulSet")["spec"]["template"]["spec"]
    (first,), (registry,) = pod["initContainers"], pod["containers"]
    assert (first["image"], first["env"]) == (registry["image"], registry["env"])
    assert {"name": "catalog", "key": "url"} in [
        entry.get("valueFrom", {}).get("secretKeyRef") for entry in first["env"]
    ]
    program, group, verb = first["command"]
    commands = importlib.import_module("loraplex_registry.cli").cli.commands
    assert program == "registry"
    assert verb in commands[group].commands
    for values in ({}, EVERYTHING):
        plain = find(render(chart, values), "StatefulSet")["spec"]["template"]["spec"]
        assert "initContainers" not in plain


def test_the_registrys_rate_limit(chart: Any):
    def asked(values: dict[str, Any]) -> list[str]:
        (container,) = find(render(chart, values), "StatefulSet")["spec"]["template"]["spec"]["containers"]
        return [argument for argument in container["args"] if argument.startswith("--rate-limit")]

    assert (asked({}), asked(EVERYTHING)) == ([], ["--rate-limit=600/min"])


def test_the_server_asks_the_registry_of_the_release_or_the_one_named(chart: Any):
    def asked(values: dict[str, Any]) -> list[str]:
        return [a for a in server(render(chart, values))["containers"][0]["args"] if a.startswith("--registry=")]

    documents = render(chart)
    port = find(documents, "Service", "-registry")["spec"]["ports"][0]["port"]
    assert asked({}) == [f"--registry=http://rel-loraplex-registry:{port}"]
    values = VALUE_SETS["external registry"]
    assert asked(values) == ["--registry=https://adapters.example.com"]
    assert not [d for d in render(chart, values) if d["kind"] in ("StatefulSet", "PersistentVolumeClaim")]


@pytest.mark.parametrize(
    ("values", "ports"),
    [("default", {53, 8100, 443}), ("external registry", {53, 443}), ("external registry at a port", {53, 9000, 443})],
)
def test_the_server_may_reach_its_registry_and_little_else(chart: Any, values: str, ports: set[int]):
    policy = find(render(chart, VALUE_SETS[values]), "NetworkPolicy", "-loraplex")
    assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} == ports


def test_the_registry_reaches_nobody_and_keeps_its_claim(chart: Any):
    documents = render(chart)
    assert find(documents, "NetworkPolicy", "-registry")["spec"]["egress"] == []
    claim = find(documents, "PersistentVolumeClaim", "-registry")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert find(documents, "StatefulSet")["spec"]["replicas"] == 1


def test_a_teams_registry_runs_more_than_once_and_keeps_nothing(chart: Any):
    documents = render(chart, VALUE_SETS["a team"])
    registry = find(documents, "StatefulSet")["spec"]
    (container,) = registry["template"]["spec"]["containers"]
    assert registry["replicas"] == 3
    assert "--store=s3://adapters/team" in container["args"]
    env = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
    assert env["LORAPLEX_REGISTRY_DATABASE"] == {"secretKeyRef": {"name": "catalog", "key": "url"}}
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    volumes = {volume["name"]: volume for volume in registry["template"]["spec"]["volumes"]}
    assert volumes["data"]["emptyDir"] == {}
    assert not [d for d in documents if d["kind"] in ("PersistentVolumeClaim", "Secret")]
    egress = find(documents, "NetworkPolicy", "-registry")["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {53, 5432, 443, 6432}


@pytest.mark.parametrize(
    ("values", "ports"),
    [({"database": {"existingSecret": "catalog"}}, {53, 5432}), ({"store": {"url": "gs://adapters"}}, {53, 443})],
    ids=str,
)
def test_half_of_it_still_needs_the_volume(chart: Any, values: dict[str, Any], ports: set[int]):
    documents = render(chart, {"registry": values})
    assert find(documents, "PersistentVolumeClaim", "-registry")
    volumes = find(documents, "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    assert "persistentVolumeClaim" in next(volume for volume in volumes if volume["name"] == "data")
    egress = find(documents, "NetworkPolicy", "-registry")["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == ports


def test_a_gpu_is_asked_for_beside_the_other_limits(chart: Any):
    pod = server(render(chart, VALUE_SETS["gpu"]))
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}


def test_the_autoscaler_owns_the_number_of_replicas(chart: Any):
    documents = render(chart, VALUE_SETS["hpa"])
    assert "replicas" not in find(documents, "Deployment")["spec"]
    scaler = find(documents, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == find(documents, "Deployment")["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)


def test_a_volume_of_one_node_is_handed_over_not_shared(chart: Any):
    assert find(render(chart, VALUE_SETS["one node"]), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_custom_resources_come_only_when_asked_for(chart: Any):
    assert not CUSTOM & {document["kind"] for document in render(chart)}
    assert CUSTOM - {"ServiceMonitor"} <= {document["kind"] for document in render(chart, EVERYTHING)}


def test_the_rules_and_the_dashboard_travel_unchanged(chart: Any, folder: Path):
    documents = render(chart, EVERYTHING)
    rules = find(documents, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((folder / "rules/loraplex.yaml").read_text())
    board = find(documents, "ConfigMap", "-dashboards")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["data"]["loraplex.json"] == (folder / "dashboards/loraplex.json").read_text()


def test_the_pool_selects_the_servers_and_names_the_picker(chart: Any):
    documents = render(chart, EVERYTHING)
    pool, deployment = find(documents, "InferencePool")["spec"], find(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert pool["selector"]["matchLabels"].items() <= labels.items()
    assert labels["llm-d.ai/engine-type"] == "vllm"
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert pool["targetPorts"] == [{"number": port["containerPort"]} for port in container["ports"]]
    assert pool["endpointPickerRef"]["name"] == "loraplex-epp"


def test_extra_objects_may_use_templates(chart: Any):
    documents = render(chart, EVERYTHING)
    assert find(documents, "ConfigMap", "object")["data"] == {"at": "rel"}
    assert find(documents, "ConfigMap", "text")["data"] == {"at": "ns"}


def test_a_long_release_name_gives_names_that_kubernetes_takes(chart: Any):
    rendered = chart.render({}, name="r" * 53, namespace="ns")
    for text in (text for name, text in rendered.items() if not name.endswith("NOTES.txt")):
        for document in filter(None, yaml.safe_load_all(text)):
            assert len(document["metadata"]["name"]) <= 63


def test_the_notes_say_what_is_open(chart: Any):
    notes = chart.render({}, name="rel", namespace="ns")["loraplex/templates/NOTES.txt"]
    assert "server.apiKeys.existingSecret" in notes
    assert "registry.tokens.existingSecret" in notes
    closed = chart.render(EVERYTHING, name="rel", namespace="ns")["loraplex/templates/NOTES.txt"]
    assert "existingSecret" not in closed


def test_the_chart_carries_the_projects_version(chart: Any, root: Path):
    (version,) = re.findall(r'^version = "([^"]+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert chart.metadata["appVersion"] == version


def test_every_value_that_the_page_names_exists(chart: Any, root: Path):
    page = (root / "docs/kubernetes.md").read_text()
    known = {".".join(path[:n]) for path in leaves(chart.values) for n in range(1, len(path) + 1)}
    named = set(re.findall(rf"`((?:{'|'.join(chart.values)})\.[\w.]+)`", page))
    assert named
    assert named <= known, named - known
