"""Rules that hold between the objects of an overlay and that no schema can state. Each returns sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields

from klein_services.denoiser.settings import DenoiserSettings
from klein_services.gateway.settings import GatewaySettings
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.settings import ServerSettings
from klein_services.text_encoder.settings import TextEncoderSettings
from klein_services.vae_decoder.settings import VaeDecoderSettings
from tests.deploy.manifests import Object, Pod, environment, matches, named, of_kind, path_of, pods

SETTINGS: dict[str, type[ServerSettings]] = {
    "text-encoder": TextEncoderSettings,
    "denoiser": DenoiserSettings,
    "vae-decoder": VaeDecoderSettings,
    "orchestrator": OrchestratorSettings,
}
CLOSE_SECONDS = 10
"""Time to close workers and to send the last spans, after the last job."""
IMAGES = ("klein-stage", "klein-orchestrator")
"""`klein-` and a target of the Dockerfile."""
STAGES = ("text-encoder", "denoiser", "vae-decoder")
Rule = Callable[[list[Object]], Iterator[str]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Adds a rule to those that every overlay is checked by."""
    RULES.append(function)
    return function


def problems(all_objects: list[Object]) -> list[str]:
    """Returns every sentence of every rule."""
    return [sentence for each in RULES for sentence in each(all_objects)]


def process_of(pod: Pod) -> str:
    """Returns the kind of process that a Deployment runs: the word after `serve`."""
    command, process = pod.main["args"][:2]
    assert command == "serve"
    return str(process)


def setting(pod: Pod, all_objects: list[Object], name: str) -> float:
    """Returns a number among the settings of a Deployment's process: from its variables, else the default."""
    given = environment(pod.main, all_objects).get(f"KLEIN_{name.upper()}")
    (field,) = [field for field in fields(SETTINGS[process_of(pod)]) if field.name == name]
    return float(field.default if given is None else given)


def servers(all_objects: list[Object]) -> list[Pod]:
    """Returns the Deployments of gRPC servers."""
    return [pod for pod in pods(all_objects, "Deployment") if process_of(pod) != "gateway"]


@rule
def http_gateway(all_objects: list[Object]) -> Iterator[str]:
    """The process that speaks HTTP, where an overlay has it."""
    defaults = GatewaySettings()
    wanted = {"http": defaults.port, "metrics": defaults.metrics_port}
    for pod in (pod for pod in pods(all_objects, "Deployment") if process_of(pod) == "gateway"):
        if pod.ports != wanted:
            yield f"{pod.path} has the ports {pod.ports}; its settings say {wanted}"
        paths = {kind: pod.main[kind]["httpGet"]["path"] for kind in ("livenessProbe", "readinessProbe")}
        if paths != {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}:
            yield f"{pod.path} is probed at {paths}"
        variables = environment(pod.main, all_objects)
        known = {f"KLEIN_{field.name.upper()}" for field in fields(GatewaySettings)} | {"XDG_STATE_HOME"}
        if unknown := variables.keys() - known:
            yield f"{pod.path} sets {sorted(unknown)}, which are no settings"
        if variables["KLEIN_TARGET"] != f"dns:///orchestrator:{OrchestratorSettings().port}":
            yield f"{pod.path} calls {variables['KLEIN_TARGET']}"
        drain = float(variables["KLEIN_DRAIN_DELAY_SECONDS"]) + float(variables["KLEIN_GRACE_SECONDS"])
        pre_stop = pod.main["lifecycle"]["preStop"]["sleep"]["seconds"]
        if pod.spec["terminationGracePeriodSeconds"] < pre_stop + drain + CLOSE_SECONDS:
            yield f"{pod.path} is killed before its drain has ended"
        for kind in ("Service", "PodDisruptionBudget", "ServiceAccount"):
            if not _of_name(all_objects, kind, "gateway"):
                yield f"{pod.path} has no {kind}"


def _of_name(all_objects: list[Object], kind: str, name: str) -> list[Object]:
    return [each for each in of_kind(all_objects, kind) if each["metadata"]["name"] == name]


@rule
def companions(all_objects: list[Object]) -> Iterator[str]:
    for pod in servers(all_objects):
        budgets = [
            each
            for each in of_kind(all_objects, "PodDisruptionBudget")
            if matches(each["spec"]["selector"], pod.labels)
        ]
        if len(budgets) != 1:
            yield f"{pod.path} has {len(budgets)} PodDisruptionBudgets, not 1"
        services = [
            each
            for each in of_kind(all_objects, "Service")
            if each["spec"]["selector"].items() <= pod.labels.items()
        ]
        if [each["spec"].get("clusterIP") for each in services] != ["None"]:
            yield f"{pod.path} has {len(services)} Services, not 1 headless one"
        if not _of_name(all_objects, "ServiceAccount", pod.spec["serviceAccountName"]):
            yield f"{pod.path} has a ServiceAccount that is not there"
        for constraint in pod.spec["topologySpreadConstraints"]:
            if not matches(constraint["labelSelector"], pod.labels):
                yield f"{pod.path} spreads other Pods than its own"


@rule
def drain(all_objects: list[Object]) -> Iterator[str]:
    (orchestrator,) = [pod for pod in servers(all_objects) if process_of(pod) == "orchestrator"]
    longest_job = setting(orchestrator, all_objects, "maximum_request_seconds")
    for pod in servers(all_objects):
        grace = setting(pod, all_objects, "grace_seconds")
        if grace < longest_job:
            yield f"{pod.path} has {grace} s for running jobs; a request may take {longest_job}"
        pre_stop = pod.main["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed = pre_stop + setting(pod, all_objects, "drain_delay_seconds") + grace + CLOSE_SECONDS
        given = pod.spec["terminationGracePeriodSeconds"]
        if given < needed:
            yield f"{pod.path} is killed after {given} s; its drain may take {needed}"
        probe = pod.main["startupProbe"]
        loading = probe["periodSeconds"] * probe["failureThreshold"]
        if pod.owner["spec"]["progressDeadlineSeconds"] <= loading:
            yield f"{pod.path} counts as failed before its model may have loaded"


@rule
def ports(all_objects: list[Object]) -> Iterator[str]:
    for pod in servers(all_objects):
        wanted = {
            "grpc": int(setting(pod, all_objects, "port")),
            "metrics": int(setting(pod, all_objects, "metrics_port")),
        }
        if health := int(setting(pod, all_objects, "health_port")):
            wanted["health"] = health
        if pod.ports != wanted:
            yield f"{pod.path} has the ports {pod.ports}; its settings say {wanted}"
        probed = "health" if health else "grpc"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if pod.main[kind]["grpc"]["port"] != wanted[probed]:
                yield f"{pod.path}: {kind} asks port {pod.main[kind]['grpc']['port']}, not {wanted[probed]}"
        for each in of_kind(all_objects, "Service"):
            if each["spec"]["selector"].items() <= pod.labels.items():
                for port in each["spec"]["ports"]:
                    target = pod.ports.get(port["targetPort"], port["targetPort"])
                    # Headless: clients connect to the Pod's own port, whatever the Service's is.
                    if (port["port"], target) != (wanted["grpc"], wanted["grpc"]):
                        yield f"{path_of(each)} has port {port['port']} for {target} of {pod.path}"


@rule
def targets(all_objects: list[Object]) -> Iterator[str]:
    addresses = {
        f"dns:///{each['metadata']['name']}:{port['port']}"
        for each in of_kind(all_objects, "Service")
        for port in each["spec"]["ports"]
    }
    for pod in servers(all_objects):
        for name, value in environment(pod.main, all_objects).items():
            if name.endswith("_TARGET") and value not in addresses:
                yield f"{pod.path}: {name} is {value}; there is no such Service"
    for each in of_kind(all_objects, "ConfigMap"):
        for key, text in each["data"].items():
            for target in sorted(set(re.findall(r"dns:///[^\"]*", text)) - addresses):
                yield f"{path_of(each)}: {key} has {target}; there is no such Service"


@rule
def references(all_objects: list[Object]) -> Iterator[str]:
    """Volumes, keys of ConfigMaps, and variables that are set twice."""
    issued = {each["spec"]["secretName"] for each in of_kind(all_objects, "Certificate")}
    for pod in pods(all_objects):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and not _of_name(all_objects, "PersistentVolumeClaim", claim):
                yield f"{pod.path} has a volume of the claim {claim}, which is not there"
            if (secret := volume.get("secret", {}).get("secretName")) and secret not in issued:
                yield f"{pod.path} has a volume of the Secret {secret}, which no Certificate issues"
            if (wanted := volume.get("configMap", {}).get("name")) and not _of_name(
                all_objects, "ConfigMap", wanted
            ):
                yield f"{pod.path} has a volume of the ConfigMap {wanted}, which is not there"
        for container in pod.containers():
            mounted = [mount["name"] for mount in container.get("volumeMounts", [])]
            for name in set(mounted) - volumes.keys():
                yield f"{pod.path} mounts {name}, which is no volume"
            counts = Counter(entry["name"] for entry in container.get("env", []))
            for name in (name for name, count in counts.items() if count > 1):
                yield f"{pod.path} sets {name} twice"
            for entry in container.get("env", []):
                reference = entry.get("valueFrom", {}).get("configMapKeyRef")
                if reference and not any(
                    reference["key"] in each["data"]
                    for each in _of_name(all_objects, "ConfigMap", reference["name"])
                ):
                    yield f"{pod.path}: {entry['name']} is of a ConfigMap without {reference['key']}"


@rule
def autoscalers(all_objects: list[Object]) -> Iterator[str]:
    scalers = of_kind(all_objects, "ScaledObject", "HorizontalPodAutoscaler")
    counts = Counter(each["spec"]["scaleTargetRef"]["name"] for each in scalers)
    for name, count in counts.items():
        if count > 1:
            yield f"Deployment/{name} has {count} autoscalers"
        for deployment in _of_name(all_objects, "Deployment", name):
            if "replicas" in deployment["spec"]:
                yield f"Deployment/{name} sets replicas, which its autoscaler sets, too"
    for each in scalers:
        name = each["spec"]["scaleTargetRef"]["name"]
        if not _of_name(all_objects, "Deployment", name):
            yield f"{path_of(each)} scales {name}, which is not there"
    for each in of_kind(all_objects, "ScaledObject"):
        yield from _triggers(each, all_objects)


def _triggers(scaled: Object, all_objects: list[Object]) -> Iterator[str]:
    name, path = scaled["spec"]["scaleTargetRef"]["name"], path_of(scaled)
    for trigger in scaled["spec"]["triggers"]:
        metadata = trigger["metadata"]
        if trigger["type"] == "cpu":
            continue
        if "fallback" not in scaled["spec"]:
            yield f"{path} has no fallback for a scaler that does not answer"
        if trigger.get("metricType") != "AverageValue":
            yield f"{path}: a fallback needs the metric type AverageValue"
        if trigger["type"] == "prometheus":
            if metadata.get("ignoreNullValues") != "false":
                yield f"{path} takes no data for 0"
            for wanted in (
                f'namespace="{scaled["metadata"]["namespace"]}"',
                f'job="{name}"',
            ):
                if wanted not in metadata["query"]:
                    yield f"{path}: the query does not select {wanted}"
            if not of_kind(all_objects, "PodMonitor"):
                yield f"{path} queries Prometheus, which scrapes nothing without a PodMonitor"
        elif trigger["type"] == "external":
            services = {
                f"{each['metadata']['name']}.{each['metadata']['namespace']}.svc:{each['spec']['ports'][0]['port']}"
                for each in of_kind(all_objects, "Service")
                if each["metadata"]["name"] == "orchestrator"
            }
            if metadata["scalerAddress"] not in services:
                yield f"{path}: scalerAddress is {metadata['scalerAddress']}; the orchestrator is {services}"
            if metadata["stage"] != name:
                yield f"{path} scales by the backlog of {metadata['stage']}"
        else:
            yield f"{path} has a trigger of the type {trigger['type']}, which no test knows"


@rule
def monitors(all_objects: list[Object]) -> Iterator[str]:
    for each in of_kind(all_objects, "PodMonitor"):
        if each["spec"]["jobLabel"] != "app.kubernetes.io/name":
            yield f"{path_of(each)}: queries expect the job to be a process's name"
        for pod in servers(all_objects):
            if not matches(each["spec"]["selector"], pod.labels):
                yield f"{path_of(each)} does not scrape {pod.path}"
            for endpoint in each["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in pod.ports:
                    yield f"{path_of(each)} scrapes the port {endpoint['port']}, which {pod.path} does not have"


@rule
def network_policies(all_objects: list[Object]) -> Iterator[str]:
    policies = of_kind(all_objects, "NetworkPolicy")
    if not policies:
        return
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if not any(each["spec"] == closed for each in policies):
        yield "no NetworkPolicy denies what the others do not allow"
    everything = pods(all_objects)
    open_ports: dict[str, set[int]] = {pod.name: set() for pod in everything}
    for each in policies:
        selected = [pod for pod in everything if matches(each["spec"]["podSelector"], pod.labels)]
        for ingress in each["spec"].get("ingress", []):
            for pod in selected:
                numbers = {pod.ports.get(port["port"], port["port"]) for port in ingress["ports"]}
                open_ports[pod.name] |= numbers & set(pod.ports.values())
                if pod.ports and not numbers <= set(pod.ports.values()):
                    yield f"{path_of(each)} opens {numbers} of {pod.path}, which has {pod.ports}"
        for egress in each["spec"].get("egress", []):
            peers = [
                pod
                for peer in egress["to"]
                if "podSelector" in peer
                for pod in everything
                if matches(peer["podSelector"], pod.labels)
            ]
            known = {number for pod in peers for number in pod.ports.values()}
            numbers = {port["port"] for port in egress["ports"]}
            if peers and not numbers <= known:
                yield f"{path_of(each)} opens the way to {numbers - known}, where nothing listens"
    for pod in servers(all_objects):
        reachable = {pod.ports["grpc"], pod.ports["metrics"]}
        if missing := reachable - open_ports[pod.name]:
            yield f"no NetworkPolicy opens {missing} of {pod.path}"


@rule
def images(all_objects: list[Object]) -> Iterator[str]:
    """Names that deploy/docker builds, with a version."""
    for pod in pods(all_objects):
        for container in pod.containers():
            name, _, tag = container["image"].rpartition("/")[2].partition(":")
            if name not in IMAGES:
                yield f"{pod.path} runs {name}; there are {', '.join(IMAGES)}"
            if not tag or tag == "latest":
                yield f"{pod.path} runs {container['image']}, which has no version"
        if pod.owner["kind"] == "Deployment":
            wanted = "klein-stage" if process_of(pod) in STAGES else "klein-orchestrator"
            if wanted not in pod.main["image"]:
                yield f"{pod.path} runs {pod.main['image']}, not {wanted}"


@rule
def restricted(all_objects: list[Object]) -> Iterator[str]:
    """Pod Security Standards, level restricted, and a root file system that cannot be written."""
    for each in all_objects:
        if each["kind"] != "Namespace" and "namespace" not in each["metadata"]:
            yield f"{path_of(each)} has no namespace"
    for pod in pods(all_objects):
        security = pod.spec["securityContext"]
        if not security.get("runAsNonRoot") or security.get("runAsUser", 0) < 10000:
            yield f"{pod.path} may run as root or as a user of the node"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.path} has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.path} gets a token of the API server"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.path} gets variables of Services, which may look like settings"
        for volume in pod.spec["volumes"]:
            if not volume.keys() & {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "image"}:
                yield f"{pod.path} has a volume of another kind: {volume}"
        for container in pod.containers():
            own = container["securityContext"]
            wanted = {
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if own != wanted:
                yield f"{pod.path}: {container['name']} has the security context {own}"
            resources = container["resources"]
            if (
                resources["limits"]["memory"] != resources["requests"]["memory"]
                or "cpu" in resources["limits"]
            ):
                yield f"{pod.path}: {container['name']} needs memory request = limit and no CPU limit"


def deployment(all_objects: list[Object], name: str) -> Pod:
    """Returns the Pod template of a Deployment."""
    return Pod(named(all_objects, "Deployment", name))
