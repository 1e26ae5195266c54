"""Objects of Kubernetes as an API server tells them, in short: for tests without one.

    pod, service, workload, endpoints    what is in the JSON of one
    listed                               a list of them, as one page
"""

from __future__ import annotations

from typing import Any

Thing = dict[str, Any]


def pod(name: str, *, ready: bool = True, phase: str = "Running", uid: str = "", node: str = "node-1",
        ports: dict[str, int] | None = None, containers: tuple[str, ...] = ("main",), terminating: bool = False,
        waiting: str = "", sidecar_ports: dict[str, int] | None = None, init_ports: dict[str, int] | None = None,
        default: str = "", version: str = "7") -> Thing:
    """A pod.  Its ports are of its first container; `waiting`: what that one waits for."""
    def declared(ports: dict[str, int] | None) -> list[Thing]:
        return [{"name": key, "containerPort": number, "protocol": "TCP"} for key, number in (ports or {}).items()]

    metadata: Thing = {"name": name, "namespace": "prod", "uid": uid or f"uid-{name}", "resourceVersion": version}
    if terminating:
        metadata["deletionTimestamp"] = "2026-11-29T12:00:00Z"
    if default:
        metadata["annotations"] = {"kubectl.kubernetes.io/default-container": default}
    spec: Thing = {"containers": [{"name": each, "image": f"{each}:1", "ports": declared(ports) if not at else []}
                                  for at, each in enumerate(containers)]}
    if sidecar_ports or init_ports:
        spec["initContainers"] = [{"name": "init", "ports": declared(init_ports)},
                                  {"name": "proxy", "restartPolicy": "Always", "ports": declared(sidecar_ports)}]
    if node:
        spec["nodeName"] = node
    state = {"waiting": {"reason": waiting}} if waiting else {"running": {}}
    status = {"phase": phase, "conditions": [{"type": "Ready", "status": str(ready)},
                                             {"type": "PodScheduled", "status": str(bool(node)),
                                              **({} if node else {"reason": "Unschedulable"})}],
              "containerStatuses": [{"name": containers[0], "imageID": "sha256:abc", "state": state}]}
    return {"metadata": metadata, "spec": spec, "status": status}


def service(ports: Any = ((80, 8080),), selector: dict[str, str] | None = None, **spec: Any) -> Thing:
    """A service.  `ports`: rows (port, targetPort or None, name, protocol), the last two of which may be left out."""
    rows = []
    for port, target, *more in ports:
        name, protocol = (*more, None, None)[:2]
        row = {"port": port, "targetPort": target, "name": name, "protocol": protocol}
        rows.append({key: value for key, value in row.items() if value is not None})
    chosen = {"app": "web"} if selector is None else selector
    return {"kind": "Service", "metadata": {"name": "web", "resourceVersion": "5"},
            "spec": {"ports": rows, **({"selector": chosen} if chosen else {}), **spec}}


def workload(labels: dict[str, str], expressions: tuple[Thing, ...] = ()) -> Thing:
    """A deployment, a statefulset ..."""
    more = {"matchExpressions": list(expressions)} if expressions else {}
    return {"metadata": {"name": "web"}, "spec": {"selector": {"matchLabels": labels, **more}}}


def endpoints(*rows: Thing, ports: dict[str, int] | None = None, uid: str = "slice-1") -> Thing:
    """An EndpointSlice with these endpoints."""
    return {"metadata": {"name": uid, "uid": uid, "resourceVersion": "6"}, "addressType": "IPv4",
            "endpoints": list(rows), "ports": [{"name": name, "port": port, "protocol": "TCP"}
                                               for name, port in (ports or {"": 5432}).items()]}


def endpoint(address: str, name: str = "", *, namespace: str = "prod", **conditions: bool) -> Thing:
    """An endpoint; `name`: of its pod."""
    row: Thing = {"addresses": [address], "conditions": {"ready": True, **conditions}}
    if name:
        row["targetRef"] = {"kind": "Pod", "name": name, "namespace": namespace, "uid": f"uid-{name}"}
    return row


def listed(*things: Thing, version: str = "10", more: str = "") -> Thing:
    """A list of objects, or a page of it."""
    return {"kind": "List", "metadata": {"resourceVersion": version, **({"continue": more} if more else {})},
            "items": list(things)}
