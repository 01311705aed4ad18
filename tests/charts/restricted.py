"""The `restricted` profile of the Pod Security Standards, rule by rule, and a little more."""

from __future__ import annotations

from tests.charts.rendering import Object, containers

_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}


def breaches(pod: Object) -> list[str]:
    """Returns the rules that a pod does not keep."""
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    found = [
        f"{field} is set" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)
    ]
    if spec.get("automountServiceAccountToken") is not False:
        found.append("a token is mounted")
    if spec.get("enableServiceLinks") is not False:
        found.append("names of Services would become settings")
    for volume in spec.get("volumes", ()):
        [kind] = volume.keys() - {"name"}
        if kind not in _VOLUMES:
            found.append(f"volume {volume['name']} is a {kind}")
    for container in containers(pod):
        found += [
            f"{container['name']}: {what}"
            for what in _container_breaches(container, security, container["securityContext"])
        ]
    return found


def _container_breaches(container: Object, pod: Object, own: Object) -> list[str]:
    both = {**pod, **own}
    found = []
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        found.append("may gain privileges")
    if own.get("capabilities") != {"drop": ["ALL"]}:
        found.append("keeps capabilities")
    if both.get("runAsNonRoot") is not True:
        found.append("may be root")
    if not isinstance(both.get("runAsUser"), int) or both["runAsUser"] < 1:
        found.append("runs as no number, or as root")
    if both.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        found.append("has no seccomp profile")
    if own.get("readOnlyRootFilesystem") is not True:
        found.append("may write to its image")
    if any("hostPort" in port for port in container.get("ports", ())):
        found.append("takes a port of the node")
    return found
