"""Values under which everything that the chart can render is rendered at least once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tests.charts.rendering import COMPONENTS, EXAMPLES

TRAINING: Final[dict[str, Any]] = {
    "enabled": True,
    "config": '[questions]\nsource = "org/problems"\n[train]\ninit = "org/prm"\n',
}
_PULLED: Final[dict[str, Any]] = {
    "model": {"reference": "qwen-smollm"},
    "modelCache": {"mode": "pvc", "accessMode": "ReadWriteMany", "pull": "qwen-smollm"},
}
_SERVER: Final[dict[str, Any]] = {
    "mode": "sidecar",
    "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
}

CASES: Final[dict[str, tuple[dict[str, Any], *tuple[Path, ...]]]] = {
    "defaults": ({},),
    **{path.stem: ({}, path) for path in EXAMPLES},
    "pulled": ({"draft": _PULLED, "target": {**_PULLED, "replicas": 3}},),
    "pulled-by-each": (
        {
            "draft": {
                "model": {"reference": "qwen-smollm"},
                "modelCache": {"mode": "emptyDir", "pull": "qwen-smollm", "mirror": "/mirror"},
            }
        },
    ),
    "servers": (
        {
            "draft": {
                "model": {"reference": "org/small@0123abc"},
                "engine": {**_SERVER, "kind": "tgi", "image": "ghcr.io/huggingface/tgi:3.3"},
            },
            "target": {
                "model": {"reference": "org/large@0123abc"},
                "gpu": {"count": 2},
                "engine": {**_SERVER, "kind": "sglang", "image": "lmsysorg/sglang:v0.5"},
            },
        },
    ),
    "scored-elsewhere": (
        {
            "prm": {
                "engine": {
                    "mode": "external",
                    "kind": "oip",
                    "url": "prm.models.svc:8081",
                    "caSecret": {"name": "models-ca"},
                },
            },
            "router": {
                "engine": {
                    "mode": "external",
                    "kind": "oip",
                    "url": "router.models.svc:8081",
                    "routerJson": "router-json",
                },
            },
            "extraObjects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "router-json"}}
            ],
        },
    ),
    "scored-by-vllm": (
        {
            "prm": {
                "model": {"reference": "org/prm@0123abc"},
                "engine": {
                    "mode": "external",
                    "kind": "vllm",
                    "url": "https://vllm.models.svc",
                    "tokenizer": "org/prm@0123abc",
                    "apiKeySecret": {"name": "vllm-key"},
                    "caSecret": {"name": "models-ca"},
                    "maxContextTokens": 4096,
                },
                "settings": {"PRM_FAMILY": "qwen2.5-math-prm"},
            },
        },
    ),
    "trained": (
        {
            "routerTraining": {
                **TRAINING,
                "train": {"gpu": {"count": 1}, "fromFeedback": True},
                "extraEnvFrom": [{"secretRef": {"name": "bucket"}}],
                "serviceAccountAnnotations": {"role": "trainer"},
                "extraNetworkPolicy": {"egress": [{"ports": [{"port": 9000}]}]},
            },
            "router": {"model": {"reference": "/store/routers"}},
            "extraObjects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}},
                'apiVersion: v1\nkind: ConfigMap\nmetadata: { name: "{{ .Release.Name }}-text" }',
            ],
        },
    ),
    "secrets": (
        {
            "tls": {
                "enabled": True,
                "secrets": {name: f"{name}-tls" for name in COMPONENTS},
            },
            "redis": {"bundled": {"passwordSecret": {"name": "redis"}}},
            "ingress": {
                "enabled": True,
                "host": "arbitrage.example.com",
                "httpHost": "openai.example.com",
                "tlsSecret": "grpc-tls",
                "httpTlsSecret": "openai-tls",
            },
            "auth": {"keysSecret": "keys"},
            "tests": {"enabled": False},
            "draft": {"extraContainers": [], "settings": {"MAX_BATCH": 16}},
        },
    ),
    "routes": (
        {
            "gatewayApi": {
                "enabled": True,
                "parentRefs": [{"name": "public"}],
                "hostnames": ["arbitrage.example.com"],
                "httpHostnames": ["openai.example.com"],
            },
            "auth": {"keysSecret": "keys"},
            "tests": {"apiKeySecret": {"name": "key"}},
        },
    ),
    "extras": (
        {
            "prm": {"enabled": False},
            "redis": {"mode": "none"},
            "orchestrator": {
                "podLabels": {"team": "maths"},
                "podAnnotations": {"note": "x"},
                "serviceAccountAnnotations": {"role": "y"},
                "extraEnv": [{"name": "OTEL_RESOURCE_ATTRIBUTES", "value": "a=b"}],
                "extraVolumes": [{"name": "more", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
                "scheduling": {"priorityClassName": "high", "runtimeClassName": "kata"},
                "extraNetworkPolicy": {"egress": [{"ports": [{"port": 4317}]}]},
            },
            "commonLabels": {"team": "physics", "part": "all"},
            "metrics": {
                "podMonitor": {"enabled": True, "labels": {"team": "metrics"}},
                "prometheusRule": {"enabled": True, "labels": {"team": "metrics"}},
                "dashboard": {"enabled": True, "labels": {"team": "metrics"}},
            },
        },
    ),
}
