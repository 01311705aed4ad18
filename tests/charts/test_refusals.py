"""Values that cannot be used are refused, with a message that names the value and the fix."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.charts.cases import TRAINING
from tests.charts.rendering import CHART, Refused, refusal, rendered

pytestmark = pytest.mark.deploy

TARGET_HPA = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "mine"},
    "spec": {"scaleTargetRef": {"name": "try-arbitrage-target"}},
}
FEEDBACK = {"FEEDBACK_SAMPLE_RATE": 0.02}
SIDECAR = {"mode": "sidecar", "image": "a/b:1"}
TWO = {"requests": {"cpu": 2}}
ROUTES: dict[str, Any] = {"enabled": True, "parentRefs": [{"name": "g"}]}
KEDA: dict[str, Any] = {"mode": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}


def of(name: str, **block: Any) -> dict[str, Any]:
    """Returns values of one component."""
    return {name: block}


def deeply(path: str, value: Any) -> dict[str, Any]:
    """Returns values with one key, however deep."""
    for key in reversed(path.split(".")):
        value = {key: value}
    found: dict[str, Any] = value
    return found


# What the schema refuses: the values, and what Helm says.
BY_SCHEMA = [
    (deeply("target.replicas", "two"), ("/target/replicas", "got string, want integer")),
    (deeply("target.replicas", -1), ("/target/replicas", "minimum")),
    (deeply("taget.replicas", 1), ("additional properties 'taget' not allowed",)),
    (deeply("target.replica", 1), ("/target'", "additional properties 'replica' not allowed")),
    (deeply("target.autoscaling.keda.url", "x"), ("/target/autoscaling/keda", "'url' not allowed")),
    (deeply("redis.bundled.persistence.on", True), ("/redis/bundled/persistence", "'on'")),
    (
        deeply("target.autoscaling.mode", "vpa"),
        ("/target/autoscaling/mode", "one of 'none', 'hpa'"),
    ),
    (deeply("target.autoscaling.mode", ["hpa", "keda"]), ("/target/autoscaling/mode", "one of")),
    (deeply("target.security.runAsUser", 0), ("/target/security/runAsUser", "minimum")),
    (deeply("target.resources.limits.memory", "lots"), ("/target/resources/limits/memory", "lots")),
    (deeply("target.service.port", 70000), ("/target/service/port", "maximum")),
    (deeply("target.address", "http://target"), ("/target/address", "http://target")),
    (deeply("target.settings.max_batch", 1), ("/target/settings", "'max_batch' not allowed")),
    (deeply("target.settings.MAX_BACH", 1), ("/target/settings", "'MAX_BACH' not allowed")),
    (deeply("prm.settings.ARBITRAGE_DEVICE", "cpu"), ("/prm/settings", "'ARBITRAGE_DEVICE' not")),
    (deeply("gateway.settings.MAX_BATCH", 1), ("/gateway/settings", "'MAX_BATCH' not allowed")),
    (deeply("defaults.settings.MAX_BATCH", 1), ("/defaults/settings", "'MAX_BATCH' not allowed")),
    (
        deeply("draft.extraEnv", [{"name": "A", "value": 5}]),
        ("/draft/extraEnv/0/value", "got number, want string"),
    ),
    (
        deeply("draft.engine.env", [{"name": "A", "valu": "5"}]),
        ("/draft/engine/env/0", "'valu' not allowed"),
    ),
    (deeply("target.resources.requests.cpu", -1), ("/target/resources/requests/cpu", "minimum")),
    (
        deeply("metrics.prometheusRule.thresholds.availability", 0.9),
        ("/metrics/prometheusRule/thresholds/availability", "minimum"),
    ),
    (deeply("networkPolicy.dns.ports", []), ("/networkPolicy/dns/ports", "minItems")),
    (deeply("target.resources.limits.gpu", 1), ("/target/resources/limits", "'gpu' not allowed")),
    (deeply("target.podLabels", {"a b": "c"}), ("/target/podLabels", "'a b' not allowed")),
    (deeply("target.modelCache.accessMode", "RWX"), ("/target/modelCache/accessMode", "one of")),
    (deeply("target.model.dtype", "int4"), ("/target/model/dtype", "one of")),
    (deeply("image.pullPolicy", "Sometimes"), ("/image/pullPolicy", "one of")),
    (deeply("image.registry", "https://a.b/c"), ("/image/registry", "https://a.b/c")),
    (deeply("image.registry", "a.b/c/"), ("/image/registry", "a.b/c/")),
    (
        deeply("target.autoscaling.keda.authModes", "Bearer"),
        ("/target/autoscaling/keda/authModes", "Bearer"),
    ),
    (deeply("target.image.digest", "sha256:abc"), ("/target/image/digest", "sha256:abc")),
    (deeply("metrics.serviceMonitor.interval", "often"), ("/metrics/serviceMonitor/interval",)),
    (deeply("tracing.endpoint", "collector:4317"), ("/tracing/endpoint", "collector:4317")),
    (deeply("tracing.sampleRate", 2), ("/tracing/sampleRate", "maximum")),
    (deeply("redis.external.url", "http://redis"), ("/redis/external/url", "http://redis")),
    (deeply("redis.bundled.image", "redis"), ("/redis/bundled/image", "redis")),
    (deeply("routerTraining.collect.schedule", "daily"), ("/routerTraining/collect/schedule",)),
    (deeply("logLevel", "LOUD"), ("/logLevel", "one of")),
]

# What the templates refuse, because it is about values together.
BY_TEMPLATE = [
    (of("target", enabled=False), "target.enabled: is false, but no request goes without it"),
    (of("orchestrator", address="a:1"), 'orchestrator.address: is "a:1"'),
    (
        of("target", drain={"graceSeconds": 300}),
        "target.drain.terminationGracePeriodSeconds: is 135, and the pod would be killed while "
        "calls run; set it to at least 310 (preStopSeconds 5 + graceSeconds 300 + 5)",
    ),
    (of("target", strategy={"maxSurge": 0}), "target.strategy: maxSurge and maxUnavailable are"),
    (of("prm", service={"port": 9464}), "prm.service.metricsPort: is 9464 as service.port is"),
    (
        of("target", autoscaling={"minReplicas": 9, "maxReplicas": 4}),
        "target.autoscaling.minReplicas: is 9, more than maxReplicas, 4; lower it",
    ),
    (
        of("target", autoscaling={"mode": "hpa", "minReplicas": 0}),
        "target.autoscaling.minReplicas: is 0, which an HPA cannot do; set it to 1, or take",
    ),
    (
        of("orchestrator", autoscaling={**KEDA, "minReplicas": 0}),
        "orchestrator.autoscaling.minReplicas: is 0, but without it nobody is told what is wanted",
    ),
    (
        of("target", autoscaling={"mode": "keda"}),
        "target.autoscaling.keda.serverAddress: is empty, so there is nothing to scale by; give",
    ),
    (
        of("target", autoscaling={"mode": "hpa", "hpa": {"metricType": "Pods"}}),
        "target.autoscaling.hpa.metricName: is empty; metricType Pods needs",
    ),
    (
        of("prm", kind="InferenceService", autoscaling=KEDA),
        "prm.autoscaling.mode: is keda, but a InferenceService is scaled by KServe; set mode none",
    ),
    (
        of("target", address="target.other:50052", autoscaling=KEDA),
        "target.autoscaling.mode: is keda, but no target is deployed here; set mode none",
    ),
    (
        {**of("target", autoscaling=KEDA), "extraObjects": [TARGET_HPA]},
        "extraObjects: the HorizontalPodAutoscaler of try-arbitrage-target would be a second "
        "autoscaler beside target.autoscaling.mode keda, and both would fight; drop it",
    ),
    (
        of("target", settings={"KV_CACHE_MIB": 9, "MODEL": "tiny"}),
        "target.settings.MODEL: ARBITRAGE_MODEL is made by the chart of other values; set those",
    ),
    (
        {**of("orchestrator", settings=FEEDBACK), "router": {"enabled": False}},
        "orchestrator.settings.FEEDBACK_SAMPLE_RATE: is 0.02, but router.enabled is false",
    ),
    (
        {**of("orchestrator", settings=FEEDBACK), "redis": {"mode": "none"}},
        "orchestrator.settings.FEEDBACK_SAMPLE_RATE: is 0.02, but redis.mode is none, so it has",
    ),
    (
        {"routerTraining": {**TRAINING, "extraEnv": [{"name": "HF_HOME", "value": "/x"}]}},
        "routerTraining.extraEnv: HF_HOME is given by the chart already, and would be there twice",
    ),
    (
        {
            "routerTraining": {
                **TRAINING,
                "train": {"fromFeedback": True},
                "extraEnv": [{"name": "ARBITRAGE_STORE_URL", "value": "redis://a"}],
            },
        },
        "routerTraining.extraEnv: ARBITRAGE_STORE_URL is given by the chart already",
    ),
    (
        {
            "tls": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
            **of("orchestrator", settings={"MODELS_TLS_CA": "/x"}),
        },
        "orchestrator.settings.MODELS_TLS_CA: ARBITRAGE_MODELS_TLS_CA is made by the chart",
    ),
    (
        of("draft", extraEnv=[{"name": "HOME", "value": "/x"}]),
        "draft.extraEnv: HOME is given by the chart already, and would be there twice; leave it",
    ),
    (
        of("draft", engine={"mode": "sidecar", "image": "a/b:1", "env": [{"name": "USER"}]}),
        "draft.engine.env: USER is given by the chart already, and would be there twice",
    ),
    (
        of(
            "draft",
            engine={"mode": "sidecar", "image": "a/b:1", "env": [{"name": "HF_TOKEN"}]},
            modelCache={"tokenSecret": "hub"},
        ),
        "draft.engine.env: HF_TOKEN is given by the chart already",
    ),
    (
        of("prm", service={"kservePort": 9464}),
        "prm.service.kservePort: is 9464 as service.port or service.metricsPort is; give it",
    ),
    (
        {"routerTraining": {**TRAINING, "store": {"accessMode": "ReadOnlyMany"}}},
        "routerTraining.store.accessMode: is ReadOnlyMany, but its jobs write there; take",
    ),
    (
        {
            "routerTraining": {
                **TRAINING,
                "store": {"accessMode": "ReadWriteOnce"},
                "collect": {"shards": 1},
            },
            **of("router", model={"reference": "/store/routers"}),
        },
        "routerTraining.store.accessMode: is ReadWriteOnce, but the router reads it too, perhaps",
    ),
    (of("target", settings={"PORT": 1}), "target.settings.PORT: ARBITRAGE_PORT is made by the"),
    (
        of("target", extraEnv=[{"name": "ARBITRAGE_MAX_BATCH", "value": "1"}]),
        "target.extraEnv: ARBITRAGE_MAX_BATCH belongs in target.settings, as MAX_BATCH",
    ),
    (of("orchestrator", gpu={"count": 1}), "orchestrator: runs no model, so engine, modelCache"),
    (
        of("draft", modelCache={"mode": "pvc"}),
        "draft.strategy.maxSurge: is 1, but modelCache.accessMode is ReadWriteOnce, and a new pod",
    ),
    (
        of("draft", modelCache={"mode": "pvc", "pull": "qwen-smollm"}),
        "draft.modelCache.pull: is qwen-smollm, but a claim that is ReadWriteOnce is one node's",
    ),
    (
        of("target", engine={"mode": "external", "url": "http://x:8000"}, gpu={"count": 1}),
        "target.gpu.count: is 1, but engine.mode is external, so nothing here would use them",
    ),
    (
        of("target", gpu={"count": 4}),
        "target.gpu.count: is 4, but in the process a model is on one GPU; set it to 1",
    ),
    (of("gateway", modelCache={"mode": "pvc"}), "gateway: runs no model, so engine, modelCache"),
    (of("gateway", address="a:1"), 'gateway.address: is "a:1", but nothing here would call it'),
    (
        of("gateway", settings={"ORCHESTRATOR_ADDRESS": "a:1"}),
        "gateway.settings.ORCHESTRATOR_ADDRESS: ARBITRAGE_ORCHESTRATOR_ADDRESS is made by the",
    ),
    (of("ingress", httpHost="a.b"), 'ingress.httpHost: is "a.b", but ingress.enabled is false'),
    (
        of("ingress", enabled=True, host="a.b", httpHost="a.b"),
        'ingress.httpHost: is "a.b" as ingress.host is, and a controller speaks either gRPC',
    ),
    (
        {
            **of("ingress", enabled=True, host="a.b", httpHost="c.d"),
            **of("gateway", enabled=False),
        },
        'ingress.httpHost: is "c.d", but gateway.enabled is false, and nobody would answer',
    ),
    (
        of("gatewayApi", **ROUTES, hostnames=["a.b"], httpHostnames=["a.b"]),
        "gatewayApi.httpHostnames: a.b and gatewayApi.hostnames' a.b have names in common",
    ),
    (
        of("gatewayApi", **ROUTES, hostnames=["*.b.c"], httpHostnames=["a.b.c"]),
        "gatewayApi.httpHostnames: a.b.c and gatewayApi.hostnames' *.b.c have names in common",
    ),
    (
        of("gatewayApi", **ROUTES, hostnames=["*.a.b.c"], httpHostnames=["*.b.c"]),
        "gatewayApi.httpHostnames: *.b.c and gatewayApi.hostnames' *.a.b.c have names in common",
    ),
    (
        deeply("tls.secrets.draft", "mine"),
        "tls.secrets.draft: is mine, but tls.enabled is false, so everything is in plaintext",
    ),
    (
        {
            "tls": {
                "enabled": True,
                "certManager": {"enabled": True, "issuerRef": {"name": "ca"}},
                "secrets": {"draft": "mine"},
            }
        },
        "tls.secrets.draft: is mine, but tls.certManager.enabled is true and makes one of its own",
    ),
    (
        deeply("redis.external.urlSecret.name", "url"),
        "redis.external.urlSecret.name: is url, but redis.mode is bundled, so it is not used",
    ),
    (
        of("draft", engine={"mode": "external", "url": "vllm:8000"}),
        "draft.engine.url: is vllm:8000, without http:// or https://; put it before",
    ),
    (
        of("target", autoscaling={**KEDA, "keda": {**KEDA["keda"], "authModes": "bearer"}}),
        "target.autoscaling.keda.authModes: is bearer, but authenticationRef is empty",
    ),
    (
        of("draft", autoscaling={**KEDA, "minReplicas": 0}),
        "draft.autoscaling.minReplicas: is 0, but every policy save target_only begins",
    ),
    (
        of("draft", modelCache={"mode": "pvc", "accessMode": "ReadOnlyMany"}),
        "draft.modelCache.accessMode: is ReadOnlyMany, but a new claim is empty",
    ),
    (
        of("draft", modelCache={"mode": "emptyDir", "mountPath": "/tmp"}),
        "draft.modelCache.mountPath: is /tmp, where something else is; take another",
    ),
    (
        {
            **of(
                "gatewayApi",
                enabled=True,
                parentRefs=[{"name": "g"}],
                hostnames=["a.b"],
                httpHostnames=["c.d"],
            ),
            **of("gateway", enabled=False),
        },
        "gatewayApi.httpHostnames: are given, but gateway.enabled is false",
    ),
    (of("draft", model={"reference": ""}), "draft.model.reference: is empty; name a folder"),
    (
        of("target", replicas=2, modelCache={"mode": "pvc"}),
        "target.modelCache.accessMode: is ReadWriteOnce, and there may be several replicas, of "
        "which only those on one node could mount it; take ReadWriteMany, or mode emptyDir",
    ),
    (
        of("target", autoscaling=KEDA, modelCache={"mode": "existingClaim", "existingClaim": "m"}),
        "target.modelCache.accessMode: is ReadWriteOnce, and there may be several replicas",
    ),
    (
        of("target", modelCache={"mode": "existingClaim"}),
        "target.modelCache.existingClaim: is empty, but mode is existingClaim; name the claim",
    ),
    (
        of("target", modelCache={"existingClaim": "models"}),
        "target.modelCache.existingClaim: is models, but mode is none, so it is not used; set",
    ),
    (of("target", modelCache={"pull": "llama"}), "target.modelCache.pull: is llama, but there is"),
    (
        of("prm", modelCache={"mode": "pvc", "accessMode": "ReadOnlyMany", "pull": "llama"}),
        "prm.modelCache.pull: is llama, but a claim that is ReadOnlyMany cannot be written to",
    ),
    (
        of("draft", kind="InferenceService", engine={"mode": "external", "url": "http://x"}),
        "draft.kind: is InferenceService, but engine.mode is external; take kind Deployment",
    ),
    (
        {
            "redis": {
                "mode": "external",
                "external": {"url": "redis://a", "urlSecret": {"name": "b"}},
            }
        },
        "redis.external.url: is given, and so is redis.external.urlSecret.name; give one of them",
    ),
    (
        {"routerTraining": TRAINING, "tls": {"enabled": True}},
        "tls.secrets.router-training: is empty, but tls.enabled is true; name the Secret with",
    ),
    (
        of("prm", engine={"mode": "sidecar", "image": "a/b:1"}),
        "prm.engine.mode: is sidecar, which is for draft and target; set it to inProcess or ext",
    ),
    (
        of("router", engine={"mode": "external", "url": "a:1"}),
        "router.engine.kind: is vllm, which gives no scores; set it to oip",
    ),
    (
        of("prm", engine={"mode": "external", "kind": "tgi", "url": "a:1"}),
        "prm.engine.kind: is tgi, which gives no scores; set it to oip or vllm",
    ),
    (
        of("prm", engine={"mode": "external", "url": "http://vllm:8000"}),
        "prm.engine.tokenizer: is empty, but engine.kind is vllm, which is asked with token ids",
    ),
    (
        of("router", engine={"mode": "external", "kind": "oip", "url": "a:1"}),
        "router.engine.routerJson: is empty, but engine.mode is external; name a ConfigMap",
    ),
    (
        of("target", engine={"mode": "external", "kind": "oip", "url": "a:1"}),
        "target.engine.kind: is oip, which does not write; take vllm",
    ),
    (
        of("target", service={"kservePort": 8080}),
        "target.service.kservePort: is set, but only prm and router speak KServe's protocol",
    ),
    (
        {**of("prm", service={"kservePort": 8080}), "tls": {"enabled": True}},
        "prm.service.kservePort: is set, but tls.mutual lets only the orchestrator in",
    ),
    (of("target", engine={"mode": "external"}), "target.engine.url: is empty, but engine.mode is"),
    (of("target", engine={"url": "http://x"}), "target.engine.url: is http://x, but engine.mode"),
    (of("target", engine={"mode": "sidecar"}), "target.engine.image: is empty, but engine.mode"),
    (
        of("target", engine={"mode": "sidecar", "image": "a/b:1", "kind": "openai"}),
        "target.engine.kind: is openai, which is no server that can be started; take vllm",
    ),
    (
        of("target", engine={"mode": "sidecar", "image": "a/b:1", "port": 50052}),
        "target.engine.port: is 50052, which the generator listens on itself; give another",
    ),
    (of("target", engine={"mode": "kserve"}), "target.engine.storageUri: is empty, but engine.mod"),
    (
        of("target", engine={"mode": "external", "url": "http://x", "prompt": "chat"}),
        "target.engine.tokenizer: is empty, but engine.prompt is chat, whose template it has",
    ),
    ({"tls": {"enabled": True}}, "tls.secrets.target: is empty, but tls.enabled is true; name"),
    (deeply("tls.certManager.enabled", True), "tls.certManager.enabled: is true, but tls.enabled"),
    (
        {"tls": {"enabled": True, "certManager": {"enabled": True}}},
        "tls.certManager.issuerRef.name: is empty; name the issuer",
    ),
    (
        deeply("target.resources.requests.memory", "2Gi"),
        "target.resources.requests.memory: is 2Gi, more than limits.memory, 1Gi; lower it, or",
    ),
    (
        of("target", resources={"requests": {"memory": "1025Mi"}, "limits": {"memory": "1Gi"}}),
        "target.resources.requests.memory: is 1025Mi, more than limits.memory, 1Gi",
    ),
    (
        of("target", engine={**SIDECAR, "resources": {**TWO, "limits": {"cpu": "1500m"}}}),
        "target.engine.resources.requests.cpu: is 2, more than limits.cpu, 1500m",
    ),
    (
        {"routerTraining": {**TRAINING, "train": {"resources": {"limits": {"memory": "9G"}}}}},
        "routerTraining.train.resources.requests.memory: is 16Gi, more than limits.memory, 9G",
    ),
    (
        {"routerTraining": {**TRAINING, "collect": {"resources": {"limits": {"cpu": 0.5}}}}},
        "routerTraining.collect.resources.requests.cpu: is 1, more than limits.cpu, 0.5",
    ),
    (
        deeply("redis.bundled.resources.requests.memory", "1Ti"),
        "redis.bundled.resources.requests.memory: is 1Ti, more than limits.memory, 768Mi",
    ),
    (
        deeply("redis.bundled.maxMemoryMib", 700),
        "redis.bundled.resources.limits.memory: is 768Mi, and Redis would be killed before its "
        "700 MiB of data are full; raise it to at least 934Mi, or lower maxMemoryMib",
    ),
    (
        {"redis": {"mode": "external", "external": {"url": "rediss://redis:6380/0"}}},
        "redis.external.ports: lacks 6380, on which redis.external.url asks redis:6380",
    ),
    (
        {
            "redis": {
                "mode": "external",
                "external": {"url": "redis+sentinel://a:6379,b:26379/main/0?x=c:1"},
            }
        },
        "redis.external.ports: lacks 26379, on which redis.external.url asks b:26379",
    ),
    (
        deeply("commonLabels", {"app.kubernetes.io/instance": "x"}),
        "commonLabels: app.kubernetes.io/instance is a label that the chart gives and selects by",
    ),
    (
        deeply("metrics.serviceMonitor.labels", {"helm.sh/chart": "x"}),
        "metrics.serviceMonitor.labels: helm.sh/chart is a label that the chart gives",
    ),
    (
        deeply("draft.podLabels", {"app.kubernetes.io/component": "x"}),
        "draft.podLabels: app.kubernetes.io/component is a label that the chart gives",
    ),
    (
        deeply("fullnameOverride", "1.a"),
        'fullnameOverride: objects would be called "1.a", which no Service may be; give one',
    ),
    (
        deeply("ingress.httpTlsSecret", "tls"),
        "ingress.httpTlsSecret: is tls, but there is no ingress.httpHost that it would be for",
    ),
    (
        of("gatewayApi", enabled=True, parentRefs=[{"name": "g"}], backendCa="ca"),
        "gatewayApi.backendCa: is ca, but gatewayApi.enabled or tls.enabled is false",
    ),
    (deeply("redis.mode", "external"), "redis.external.url: is empty, but redis.mode is external"),
    (
        {"redis": {"mode": "external", "external": {"url": "redis://:secret@redis:6379"}}},
        "redis.external.url: holds a password, which everyone could read who may list pods; put",
    ),
    (
        deeply("redis.external.url", "redis://redis:6379"),
        "redis.external.url: is given, but redis.mode is bundled, so it is not used; set",
    ),
    (deeply("ingress.enabled", True), "ingress.host: is empty, but ingress.enabled is true; give"),
    (deeply("gatewayApi.enabled", True), "gatewayApi.parentRefs: is empty, but gatewayApi.enable"),
    (
        {"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}},
        "metrics.podMonitor.enabled: is true, and so is metrics.serviceMonitor.enabled; every pod",
    ),
    (deeply("routerTraining.enabled", True), "routerTraining.config: is empty; give a router_tr"),
    (
        {"routerTraining": {**TRAINING, "config": '[promote]\nlocation = "x"'}},
        "routerTraining.config: has [services], [promote] or work, which the chart gives",
    ),
    (
        {"routerTraining": TRAINING, "prm": {"enabled": False}},
        "routerTraining.enabled: is true, but prm.enabled is false, and without a PRM there",
    ),
    (
        {"routerTraining": {**TRAINING, "store": {"accessMode": "ReadWriteOnce"}}},
        "routerTraining.store.accessMode: is ReadWriteOnce, but 4 shards write to it at once",
    ),
    (
        {
            "routerTraining": {**TRAINING, "train": {"fromFeedback": True}},
            "redis": {"mode": "none"},
        },
        "routerTraining.train.fromFeedback: is true, but redis.mode is none, and the feedback",
    ),
    (deeply("auth.keysSecret", "keys"), "tests.apiKeySecret.name: is empty, but auth.keysSecret"),
]


@pytest.mark.parametrize(("values", "said"), BY_SCHEMA, ids=[said[0] for _, said in BY_SCHEMA])
def test_the_schema_refuses(values: dict[str, Any], said: tuple[str, ...]) -> None:
    message = refusal(values)
    assert "values don't meet the specifications of the schema" in message
    assert all(part in message for part in said), message


@pytest.mark.parametrize(("values", "said"), BY_TEMPLATE, ids=[s[:50] for _, s in BY_TEMPLATE])
def test_the_templates_refuse(values: dict[str, Any], said: str) -> None:
    message = refusal(values)
    assert f"\n  - {said}" in message, message


def test_all_that_is_wrong_is_told_at_once() -> None:
    message = refusal({"tls": {"enabled": True}, **of("target", engine={"mode": "external"})})
    assert message.count("\n  - ") == 7


def test_every_check_has_values_that_it_refuses() -> None:
    checks = (CHART / "templates" / "_checks.tpl").read_text()
    patterns = [
        re.sub(r"%[sdq]", ".*", re.escape(line.split('"')[1]))
        for line in checks.splitlines()
        if line.startswith(('- "', '- {{ printf "'))
    ]
    told = "\n".join(refusal(values) for values, _ in BY_TEMPLATE)
    assert len(patterns) > 35
    assert [pattern for pattern in patterns if not re.search(pattern, told)] == []


def test_what_is_right_beside_it_is_taken() -> None:
    assert rendered(of("target", drain={"graceSeconds": 300, "terminationGracePeriodSeconds": 310}))
    assert rendered(of("target", autoscaling={**KEDA, "minReplicas": 0}))
    external = {"url": "rediss://me@redis:6380/0", "ports": [6380]}
    assert rendered({"redis": {"mode": "external", "external": external}})
    assert rendered({"redis": {"mode": "external", "external": {"url": "redis://redis"}}})
    limits = {"memory": "1048576Ki", "cpu": 0.25}
    assert rendered(of("target", resources={"requests": {"memory": "1Gi"}, "limits": limits}))
    assert rendered(release="a-1")
    assert rendered(deeply("image.registry", "localhost:5000/a/b"))
    digest = f"sha256:{'0' * 64}"
    assert rendered(of("draft", engine={"mode": "sidecar", "image": f"a/b:1@{digest}"}))
    apart = {"hostnames": ["*.a.b", "a.c"], "httpHostnames": ["x.a.c", "a.b"]}
    assert rendered(of("gatewayApi", **ROUTES, **apart))
    # What is used by nobody is not looked at.
    assert rendered({"redis": {"mode": "none", "bundled": {"maxMemoryMib": 4096}}})
    assert rendered(of("target", address="a:1", resources={"requests": {"memory": "1Ti"}}))
    unused = {"env": [{"name": "HOME", "value": "/x"}], "resources": {**TWO, "limits": {"cpu": 1}}}
    assert rendered(of("draft", engine=unused))
    store = {"accessMode": "ReadWriteOnce", "existingClaim": "routers"}
    training = {**TRAINING, "collect": {"shards": 1}, "promoteTo": "/store/routers"}
    routers = of("router", model={"reference": "/store/routers"})
    assert rendered({**routers, "routerTraining": {**training, "store": store}})


def test_a_release_whose_name_no_service_may_have_is_told_the_way_out() -> None:
    with pytest.raises(Refused, match=r'would be called "1\.a-arbitrage", which no Service'):
        rendered(release="1.a")
    assert rendered({"fullnameOverride": "one"}, release="1.a")
