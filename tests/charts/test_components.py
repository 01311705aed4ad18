"""What each kind of component becomes, where a mistake would show only in a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router_training.__main__ import _parser as training_parser
from router_training.config import read_config
from services.cli.arguments import command_line
from services.gateway.settings import GatewaySettings
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc.settings import ServerSettings, read_settings
from tests.charts.cases import CASES, TRAINING
from tests.charts.rendering import (
    COMPONENTS,
    MODELS,
    NAMESPACE,
    Object,
    containers,
    environment,
    notes,
    of_kind,
    pod_of,
    pods,
    rendered,
)
from tests.services.redis_servers import RedisServer

pytestmark = pytest.mark.deploy

SETTINGS: dict[str, type[ServerSettings]] = {
    "services.orchestrator": OrchestratorSettings,
    "services.generator": GeneratorSettings,
    "services.prm": PrmSettings,
    "services.router": RouterSettings,
    "services.gateway": GatewaySettings,
}


def plain(value: Any) -> str:
    """Returns a value of the environment, something where a Secret has it."""
    return value if isinstance(value, str) else "redis://of-a-secret:6379"


def container_of(objects: list[Object], component: str, name: str) -> Object:
    """Returns a container of a component's pod."""
    return next(one for one in containers(pod_of(objects, component)) if one["name"] == name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program_takes_the_settings_that_it_is_given(case: str) -> None:
    read = set()
    for _, pod in pods(rendered(*CASES[case])):
        for container in containers(pod):
            module = container.get("command", [""])[-1]
            if module in SETTINGS:
                given = environment(pod, container["name"])
                settings = read_settings(
                    SETTINGS[module], {name: plain(value) for name, value in given.items()}
                )
                assert settings.host == "0.0.0.0"
                read.add(module)
    assert "services.orchestrator" in read


@pytest.mark.parametrize("case", CASES, ids=str)
def test_probes_ask_for_the_service_by_name_or_on_the_metrics_port_where_grpc_has_tls(
    case: str,
) -> None:
    for name, pod in pods(rendered(*CASES[case])):
        for container in containers(pod):
            if container.get("command", [""])[-1] not in SETTINGS:
                continue
            has_tls = "ARBITRAGE_TLS_CERTIFICATE" in environment(pod, container["name"])
            for kind, path in (
                ("startup", "/ready"),
                ("readiness", "/ready"),
                ("liveness", "/live"),
            ):
                probe = container[f"{kind}Probe"]
                if has_tls or container["name"] == "gateway":
                    assert probe["httpGet"] == {"port": "metrics", "path": path}, name
                else:
                    assert probe["grpc"]["service"].startswith("arbitrage.v1."), name
                    assert probe["grpc"]["port"] in {p["containerPort"] for p in container["ports"]}


def test_a_slow_model_has_the_time_that_its_startup_probe_gives_it() -> None:
    startup = container_of(rendered(), "target", "target")["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 600


@pytest.mark.parametrize(
    ("component", "begins"),
    [
        ("draft", ["text-generation-launcher", "--model-id", "org/small"]),
        ("target", ["python3", "-m", "sglang.launch_server", "--model-path", "org/large"]),
    ],
)
def test_a_server_beside_a_generator_starts_before_it_and_ends_after_it(
    component: str, begins: list[str]
) -> None:
    objects = rendered(*CASES["servers"])
    [server] = pod_of(objects, component)["spec"]["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert server["command"] == begins
    assert server["args"][-2:] == ["--revision", "0123abc"]
    assert server["startupProbe"]["httpGet"]["path"] == "/health"
    # torch asks who the user is, and the image does not know them.
    assert {"name": "USER", "value": "arbitrage"} in server["env"]
    told = environment(pod_of(objects, component), component)
    assert told["ARBITRAGE_ENGINE_URL"] == "http://127.0.0.1:8000"
    assert told["ARBITRAGE_MODEL"] == begins[-1]
    assert told["ARBITRAGE_ENGINE_REVISION"] == "0123abc"


def test_gpus_go_to_what_runs_the_model() -> None:
    objects = rendered(*CASES["servers"])
    server, generator = containers(pod_of(objects, "target"))
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in generator["resources"]["limits"]
    # Under KServe that is another pod.
    objects = rendered(*CASES["kserve"])
    engine = of_kind(objects, "InferenceService")["try-arbitrage-target-engine-kserve"]
    model = engine["spec"]["predictor"]["model"]
    assert model["resources"]["limits"]["nvidia.com/gpu"] == 1
    thin = container_of(objects, "target", "target")
    assert "nvidia.com/gpu" not in thin["resources"]["limits"]
    own = rendered({"target": {"gpu": {"count": 1}}})
    assert container_of(own, "target", "target")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert environment(pod_of(own, "target"), "target")["ARBITRAGE_DEVICE"] == "cuda"
    for count in (0, 1):
        told = rendered({"target": {"gpu": {"count": count}, "settings": {"DEVICE": "cuda:1"}}})
        devices = [
            one["value"]
            for one in container_of(told, "target", "target")["env"]
            if one["name"] == "ARBITRAGE_DEVICE"
        ]
        assert devices == ["cuda:1"]


def test_a_pack_is_fetched_once_into_a_claim_and_waited_for_by_every_pod() -> None:
    objects = rendered(*CASES["pulled"])
    jobs = of_kind(objects, "Job")
    assert len(jobs) == 2
    for name, job in jobs.items():
        [pull] = job["spec"]["template"]["spec"]["containers"]
        parsed = command_line().parse_args(pull["command"][1:] + pull.get("args", []))
        assert (parsed.command, parsed.action) == ("models", "pull"), name
    [wait] = pod_of(objects, "target")["spec"]["initContainers"]
    assert command_line().parse_args(wait["command"][1:]).action == "verify"
    claims = of_kind(objects, "PersistentVolumeClaim")
    assert claims["try-arbitrage-target-models"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_job_that_changes_gets_another_name_because_jobs_cannot_be_changed() -> None:
    values, *_ = CASES["pulled"]
    before = of_kind(rendered(values), "Job").keys()
    for change in (
        {"image": {"tag": "next"}},
        {"image": {"pullPolicy": "Always"}},
        {"commonLabels": {"team": "maths"}},
        {"defaults": {"security": {"runAsUser": 20000}}},
    ):
        assert not before & of_kind(rendered({**values, **change}), "Job").keys(), change


def test_a_label_of_one_object_goes_before_that_of_all() -> None:
    objects = rendered(*CASES["extras"])
    for kind in ("PodMonitor", "PrometheusRule"):
        for one in of_kind(objects, kind).values():
            labels = one["metadata"]["labels"]
            assert (labels["team"], labels["part"]) == ("metrics", "all"), kind
    of_pods = {
        name: one["spec"]["template"]["metadata"]["labels"]["team"]
        for name, one in of_kind(objects, "Deployment").items()
    }
    assert of_pods.pop("try-arbitrage-orchestrator") == "maths"
    assert set(of_pods.values()) == {"physics"}


def test_the_helm_test_asks_for_one_solution_as_the_command_takes_it() -> None:
    for case in ("defaults", "paper-vllm", "extras"):
        objects = rendered(*CASES[case])
        pod = of_kind(objects, "Pod")["try-arbitrage-test"]
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        [solve] = pod["spec"]["containers"]
        asked = command_line().parse_args([*solve["command"], *solve["args"]][1:])
        assert asked.command == "ask"
        assert asked.address == f"try-arbitrage-orchestrator.{NAMESPACE}.svc:50050"


def test_certificates_cover_the_name_under_which_each_is_called() -> None:
    objects = rendered(*CASES["paper-vllm"])
    certificates = of_kind(objects, "Certificate")
    told = environment(pod_of(objects, "orchestrator"), "orchestrator")
    for name in COMPONENTS:
        spec = certificates[f"try-arbitrage-{name}"]["spec"]
        mounted = pod_of(objects, name)["spec"]["volumes"]
        assert {"secretName": spec["secretName"]} in [volume.get("secret") for volume in mounted]
        if name in MODELS:
            called = told[f"ARBITRAGE_{name.upper()}_ADDRESS"].rpartition(":")[0]
            assert called in spec["dnsNames"]
            allowed = environment(pod_of(objects, name), name)["ARBITRAGE_ALLOWED_CALLERS"]
            callers = ["orchestrator"] if name == "router" else ["orchestrator", "router-training"]
            for caller, host in zip(callers, allowed.split(","), strict=True):
                assert host in certificates[f"try-arbitrage-{caller}"]["spec"]["dnsNames"]


def test_tls_without_mutual_takes_any_caller() -> None:
    values, *_ = CASES["secrets"]
    objects = rendered({**values, "tls": {**values["tls"], "mutual": False}})
    told = environment(pod_of(objects, "draft"), "draft")
    assert "ARBITRAGE_TLS_CERTIFICATE" in told
    assert "ARBITRAGE_ALLOWED_CALLERS" not in told


def test_callers_from_outside_may_be_asked_for_certificates() -> None:
    asked = {"settings": {"TLS_CLIENT_CA": "/ca/ca.crt", "ALLOWED_CALLERS": "a.example"}}
    values, *_ = CASES["secrets"]
    objects = rendered({**values, "gateway": asked, "orchestrator": asked})
    for name in ("gateway", "orchestrator"):
        assert environment(pod_of(objects, name), name)["ARBITRAGE_TLS_CLIENT_CA"] == "/ca/ca.crt"


def test_a_name_that_a_certificate_has_already_is_not_given_twice() -> None:
    manager = {"enabled": True, "issuerRef": {"name": "ca"}, "extraDnsNames": ["localhost", "a.b"]}
    objects = rendered({"tls": {"enabled": True, "certManager": manager}})
    names = of_kind(objects, "Certificate")["try-arbitrage-gateway"]["spec"]["dnsNames"]
    assert names.count("localhost") == names.count("a.b") == 1
    assert f"try-arbitrage-gateway-balanced.{NAMESPACE}.svc" in names


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_real_redis_takes_the_configuration(tmp_path: Path, is_kept: bool) -> None:
    values = {"redis": {"bundled": {"persistence": {"enabled": is_kept}, "maxMemoryMib": 64}}}
    text = of_kind(rendered(values), "ConfigMap")["try-arbitrage-redis"]["data"]["redis.conf"]
    path = tmp_path / "redis.conf"
    path.write_text(text.replace("dir /data", f"dir {tmp_path}").replace("bind * -::*", ""))
    server = RedisServer(tmp_path, is_bare=True)
    server.options = (str(path), "--port", str(server.port), "--bind", "127.0.0.1")
    try:
        server.start()
        with server.client() as client:
            told: Any = client.config_get("*")
    finally:
        server.kill()
    assert told["maxmemory-policy"] == "volatile-ttl"
    assert told["maxmemory"] == str(64 << 20)
    assert told["appendonly"] == ("yes" if is_kept else "no")


@pytest.mark.parametrize("case", ["trained", "kserve", "paper-vllm"])
def test_retraining_takes_its_configuration_and_every_stage_its_arguments(
    case: str, tmp_path: Path
) -> None:
    objects = rendered(*CASES[case])
    data = of_kind(objects, "ConfigMap")["try-arbitrage-router-training"]["data"]
    path = tmp_path / "router.toml"
    path.write_text(data["router.toml"])
    config = read_config(path)
    assert config.services.target == f"try-arbitrage-target.{NAMESPACE}.svc:50052"
    assert config.promote.location.endswith("/routers")
    assert (config.services.tls_ca is not None) is (case == "paper-vllm")
    jobs = of_kind(objects, "CronJob")
    stages = [
        training_parser().parse_args(container["args"]).command
        for name in ("collect", "train")
        for container in containers(
            jobs[f"try-arbitrage-router-training-{name}"]["spec"]["jobTemplate"]["spec"]["template"]
        )
    ]
    assert stages == ["collect", "collect", "label", "train", "evaluate", "promote"]


def test_a_judge_of_the_shipped_models_is_warned_of_where_others_write() -> None:
    other = {"model": {"reference": "qwen-smollm"}}
    told = notes({"target": other, "draft": other, "prm": {"enabled": False}})
    assert "router.model.reference is tiny" in told
    assert "but others run as draft and target:" in told
    assert "but others run as target:" in notes({"target": other})
    assert "prm.model.reference is tiny" in notes({"target": {"address": "target.other:1"}})
    assert "prm.model.reference is tiny" not in told
    judges = {"prm": other, "router": {"model": {"reference": "/store/routers"}}}
    assert "is tiny" not in notes({"target": other, **judges})


def test_the_openai_api_alone_may_be_outside() -> None:
    values = {
        "ingress": {"enabled": True, "httpHost": "a.example"},
        "gatewayApi": {
            "enabled": True,
            "parentRefs": [{"name": "public"}],
            "httpHostnames": ["b.example"],
            "backendCa": "ca",
        },
        "tls": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
    }
    objects = rendered(values)
    for kind in ("Ingress", "HTTPRoute", "BackendTLSPolicy"):
        assert of_kind(objects, kind).keys() == {"try-arbitrage-gateway"}, kind
    assert of_kind(objects, "GRPCRoute") == {}
    told = notes(values)
    for name in ("a.example", "b.example"):
        assert f"https://{name}/v1 for the OpenAI API" in told


@pytest.mark.parametrize(
    ("values", "mend", "warning"),
    [
        (
            {"target": {"model": {"reference": "org/large@main"}}},
            {"target": {"resources": {"limits": {"memory": "40Gi"}}}},
            "target.resources.limits.memory is 1Gi, as for the shipped models",
        ),
        (
            {"draft": {"engine": {"image": "vllm/vllm-openai:v0.11.0"}}},
            {"draft": {"engine": {"mode": "sidecar"}}},
            "draft.engine.mode is inProcess, so what draft.engine says of a server is not used",
        ),
        (
            {"routerTraining": TRAINING, "target": {"replicas": 0}},
            {"target": {"replicas": 1}},
            "routerTraining asks the target itself, which starts nothing",
        ),
        (
            {
                "routerTraining": {**TRAINING, "promoteTo": "s3://a/b"},
                "router": {"model": {"reference": "s3://a/b"}},
            },
            {"router": {"enabled": False}},
            "The router does not start until there is a first one in s3://a/b",
        ),
    ],
)
def test_what_will_not_work_is_warned_of(
    values: dict[str, Any], mend: dict[str, Any], warning: str
) -> None:
    assert warning in notes(values)
    assert warning not in notes(merged(values, mend))


def merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns values with others laid over them."""
    both = {
        key: merged(values[key], over[key])
        for key in values.keys() & over.keys()
        if isinstance(values[key], dict)
    }
    return {**values, **over, **both}


def test_notes_ask_by_a_policy_that_there_is() -> None:
    assert "--policy arbitrage" in notes()
    told = notes({"router": {"enabled": False}})
    assert "--policy draft_only" in told
    assert '"model": "draft_only"' in told


def test_feedback_that_nobody_makes_is_warned_of() -> None:
    values = {"routerTraining": {**TRAINING, "train": {"fromFeedback": True}}}
    made = {"orchestrator": {"settings": {"FEEDBACK_SAMPLE_RATE": 0.02}}}
    assert "so there is no feedback" in notes(values)
    assert "so there is no feedback" not in notes({**values, "router": {"enabled": False}})
    assert "so there is no feedback" not in notes({**values, **made})


def test_feedback_is_read_with_the_ca_that_the_url_names() -> None:
    redis = {"mode": "external", "external": {"urlSecret": {"name": "url"}, "caSecret": "redis-ca"}}
    training = {**TRAINING, "train": {"fromFeedback": True}}
    objects = rendered({"redis": redis, "routerTraining": training})
    job = of_kind(objects, "CronJob")["try-arbitrage-router-training-train"]["spec"]["jobTemplate"]
    pod = job["spec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in pod["initContainers"][0]["volumeMounts"]}
    told = pod_of(objects, "orchestrator")["spec"]["containers"][0]["volumeMounts"]
    assert mounts["redis-ca"] in [m["mountPath"] for m in told if m["name"] == "redis-ca"]
    # Nothing is mounted below a volume that is read only.
    assert mounts["configuration"] not in mounts["redis-ca"]


def test_a_newer_chart_that_says_the_same_restarts_nothing() -> None:
    restarted = [*rendered(*CASES["trained"]), *rendered(*CASES["pulled"])]
    for name, pod in pods(restarted):
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & pod["metadata"][
            "labels"
        ].keys() or (name.startswith("Pod/")), name


def test_each_pod_of_collect_walks_its_own_part() -> None:
    jobs = of_kind(rendered(*CASES["trained"]), "CronJob")
    spec = jobs["try-arbitrage-router-training-collect"]["spec"]["jobTemplate"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    [walk] = spec["template"]["spec"]["containers"]
    assert walk["args"][:2] == ["collect", "--shard=$(JOB_COMPLETION_INDEX)/4"]


def test_the_router_reads_what_is_promoted_and_may_not_write_it() -> None:
    pod = pod_of(rendered(*CASES["trained"]), "router")
    [mount] = [m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "store"]
    assert mount["readOnly"] is True
    elsewhere = rendered({"routerTraining": {**TRAINING, "promoteTo": "s3://bucket/routers"}})
    assert "store" not in str(pod_of(elsewhere, "router")["spec"])


def test_a_component_that_runs_elsewhere_is_asked_and_not_deployed() -> None:
    objects = rendered({"prm": {"address": "prm.other:1"}, "router": {"enabled": False}})
    told = environment(pod_of(objects, "orchestrator"), "orchestrator")
    assert told["ARBITRAGE_PRM_ADDRESS"] == "prm.other:1"
    assert "ARBITRAGE_ROUTER_ADDRESS" not in told
    for one in objects:
        assert one["metadata"]["name"] not in {"try-arbitrage-prm", "try-arbitrage-router"}


def test_a_block_says_only_what_differs_from_the_defaults() -> None:
    values = {
        "defaults": {"scheduling": {"nodeSelector": {"zone": "a"}}, "pdb": {"enabled": True}},
        "target": {"scheduling": {"nodeSelector": {"gpu": "b"}}, "pdb": {"enabled": False}},
        "orchestrator": {"replicas": 3},
    }
    objects = rendered(values)
    assert pod_of(objects, "draft")["spec"]["nodeSelector"] == {"zone": "a"}
    found = dict(pods(objects))
    for name in ("StatefulSet/try-arbitrage-redis", "Pod/try-arbitrage-test"):
        assert found[name]["spec"]["nodeSelector"] == {"zone": "a"}
    assert pod_of(objects, "target")["spec"]["nodeSelector"] == {"zone": "a", "gpu": "b"}
    assert of_kind(objects, "PodDisruptionBudget").keys() == {
        "try-arbitrage-orchestrator",
        "try-arbitrage-gateway",
    }


def test_an_image_is_named_by_its_digest_where_there_is_one() -> None:
    digest = f"sha256:{'ab' * 32}"
    objects = rendered({"draft": {"image": {"digest": digest, "registry": "mirror.example/x"}}})
    image = container_of(objects, "draft", "draft")["image"]
    assert image == f"mirror.example/x/generator@{digest}"


def test_a_registry_may_be_left_to_the_nodes() -> None:
    objects = rendered({"image": {"registry": ""}})
    assert container_of(objects, "draft", "draft")["image"] == "generator:0.1.0"


def test_clients_from_outside_reach_what_is_public_and_no_reflection() -> None:
    [route] = of_kind(rendered(*CASES["paper-vllm"]), "GRPCRoute").values()
    [rule] = route["spec"]["rules"]
    assert [match["method"]["service"] for match in rule["matches"]] == [
        "arbitrage.v1.OrchestratorService",
        "grpc.health.v1.Health",
    ]
    ingresses = of_kind(rendered(*CASES["external"]), "Ingress")
    protocols = [
        one["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"]
        for one in ingresses.values()
    ]
    assert protocols == ["GRPC", "HTTP"]


def test_the_openai_api_has_a_name_of_its_own_outside() -> None:
    ingresses = of_kind(rendered(*CASES["secrets"]), "Ingress")
    protocols = {
        one["spec"]["rules"][0]["host"]: one["metadata"]["annotations"][
            "nginx.ingress.kubernetes.io/backend-protocol"
        ]
        for one in ingresses.values()
    }
    assert protocols == {"arbitrage.example.com": "GRPCS", "openai.example.com": "HTTPS"}
    for one in ingresses.values():
        told = one["metadata"]["annotations"]
        assert told["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "3600"
    mine = {"nginx.ingress.kubernetes.io/proxy-read-timeout": "60"}
    values, *_ = CASES["secrets"]
    mended = rendered({**values, "ingress": {**values["ingress"], "annotations": mine}})
    for one in of_kind(mended, "Ingress").values():
        assert mine.items() <= one["metadata"]["annotations"].items()
    certificates = {
        tuple(tls["hosts"]): tls["secretName"]
        for one in ingresses.values()
        for tls in one["spec"]["tls"]
    }
    assert certificates == {
        ("arbitrage.example.com",): "grpc-tls",
        ("openai.example.com",): "openai-tls",
    }
    objects = rendered(*CASES["routes"])
    [route] = of_kind(objects, "HTTPRoute").values()
    [rpc] = of_kind(objects, "GRPCRoute").values()
    assert route["spec"]["hostnames"] == ["openai.example.com"]
    assert not set(route["spec"]["hostnames"]) & set(rpc["spec"]["hostnames"])
    [backend] = route["spec"]["rules"][0]["backendRefs"]
    assert backend == {"name": "try-arbitrage-gateway-balanced", "port": 8080}


def test_a_gateway_speaks_tls_with_services_by_a_name_that_their_certificates_have() -> None:
    objects = rendered(*CASES["paper-vllm"])
    policies = of_kind(objects, "BackendTLSPolicy")
    certificates = of_kind(objects, "Certificate")
    routes = [*of_kind(objects, "GRPCRoute").values(), *of_kind(objects, "HTTPRoute").values()]
    called = {
        backend["name"]
        for route in routes
        for rule in route["spec"]["rules"]
        for backend in rule["backendRefs"]
    }
    assert called == {one["spec"]["targetRefs"][0]["name"] for one in policies.values()}
    for name, policy in policies.items():
        checked = policy["spec"]["validation"]
        assert checked["hostname"] in certificates[name]["spec"]["dnsNames"]
        assert checked["caCertificateRefs"][0]["name"] == "arbitrage-ca"
    values = {
        "tls": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
        "gatewayApi": {"enabled": True, "parentRefs": [{"name": "public"}]},
    }
    warning = "WARNING: The Gateway is not told that the services speak TLS"
    assert warning in notes(values)
    told = {**values, "gatewayApi": {**values["gatewayApi"], "backendCa": "ca"}}
    assert warning not in notes(told)
    assert of_kind(rendered(told), "BackendTLSPolicy").keys() == {"try-arbitrage-orchestrator"}


def test_kserve_fetches_a_gated_model_with_the_token() -> None:
    objects = rendered(*CASES["kserve"])
    engine = of_kind(objects, "InferenceService")["try-arbitrage-target-engine-kserve"]
    account = engine["spec"]["predictor"]["serviceAccountName"]
    accounts = of_kind(objects, "ServiceAccount")
    assert accounts[account]["secrets"] == [{"name": "hub-token"}]
    assert [name for name, one in accounts.items() if "secrets" in one] == [account]


def test_a_volume_that_many_only_read_is_mounted_so() -> None:
    volumes = pod_of(rendered(*CASES["paper-vllm"]), "target")["spec"]["volumes"]
    [models] = [volume for volume in volumes if volume["name"] == "models"]
    claim = {"claimName": "models", "readOnly": True}
    assert models["persistentVolumeClaim"] == claim
    volumes = pod_of(rendered(*CASES["pulled"]), "target")["spec"]["volumes"]
    [models] = [volume for volume in volumes if volume["name"] == "models"]
    assert "readOnly" not in models["persistentVolumeClaim"]


def test_every_stage_of_retraining_has_the_credentials_and_the_identity_that_it_is_given() -> None:
    objects = rendered(*CASES["trained"])
    jobs = [pod for name, pod in pods(objects) if name.startswith("CronJob/")]
    stages = [container for pod in jobs for container in containers(pod)]
    assert len(stages) == 6
    assert all(one["envFrom"] == [{"secretRef": {"name": "bucket"}}] for one in stages)
    account = of_kind(objects, "ServiceAccount")["try-arbitrage-router-training"]
    assert account["metadata"]["annotations"] == {"role": "trainer"}


def test_what_the_notes_say_to_type_has_the_names_of_certificates_and_the_key() -> None:
    values, *files = CASES["paper-vllm"]
    for name, one in of_kind(rendered(values, *files), "Certificate").items():
        assert ("localhost" in one["spec"]["dnsNames"]) is name.endswith(
            ("-orchestrator", "-gateway")
        )
    told = notes({"auth": {"keysSecret": "keys"}, "tests": {"enabled": False}})
    assert "ARBITRAGE_API_KEY=KEY arbitrage ask" in told
    assert '-H "Authorization: Bearer KEY" -d' in told
    assert "KEY" not in notes()


def test_the_gateway_asks_the_orchestrator_and_passes_keys_on() -> None:
    address = f"try-arbitrage-orchestrator.{NAMESPACE}.svc:50050"
    for case, expected in (
        ("defaults", {}),
        ("routes", {"ARBITRAGE_ALLOW_PLAINTEXT_KEYS": "true"}),
        ("secrets", {"ARBITRAGE_ORCHESTRATOR_TLS_CA": "/etc/arbitrage/tls/ca.crt"}),
    ):
        told = environment(pod_of(rendered(*CASES[case]), "gateway"), "gateway")
        given = {k: v for k, v in told.items() if "ORCHESTRATOR" in k or "KEYS" in k}
        assert given == {"ARBITRAGE_ORCHESTRATOR_ADDRESS": address, **expected}, case


def test_under_kserve_the_first_port_is_the_one_that_kserve_calls() -> None:
    found = dict(pods(rendered(*CASES["kserve"])))
    prm = found["InferenceService/try-arbitrage-prm-kserve"]["spec"]["containers"][0]
    assert prm["name"] == "kserve-container"
    assert prm["ports"][0]["containerPort"] == 8080
    router = found["InferenceService/try-arbitrage-router-kserve"]["spec"]["containers"][0]
    assert router["ports"][0]["containerPort"] == 50054


def test_large_numbers_stay_whole_numbers() -> None:
    user = {"runAsUser": 1000660000, "runAsGroup": 1000660000, "fsGroup": 1000660000}
    values = {
        "defaults": {"security": user},
        "orchestrator": {"settings": {"MAX_TOKENS": 2000000, "HEDGE_QUANTILE": 0.95}},
        "redis": {"bundled": {"maxMemoryMib": 2000000, "resources": {"limits": {"memory": "3Ti"}}}},
        "routerTraining": {**TRAINING, "train": {"activeDeadlineSeconds": 2000000}},
    }
    objects = rendered(values)
    pod = pod_of(objects, "orchestrator")
    assert user.items() <= pod["spec"]["securityContext"].items()
    told = environment(pod, "orchestrator")
    assert told["ARBITRAGE_MAX_TOKENS"] == "2000000"
    assert told["ARBITRAGE_HEDGE_QUANTILE"] == "0.95"
    assert "maxmemory 2000000mb" in str(of_kind(objects, "ConfigMap"))
    assert "'activeDeadlineSeconds': 2000000" in str(of_kind(objects, "CronJob"))
