"""The files for containers, clusters and dashboards name flags, paths, exit codes and metrics that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from server_process import ServerProcess

from sempre.engine.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "deploy"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: their names and arguments."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def deployment() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((FOLDER / "kubernetes" / "deployment.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def container() -> dict[str, Any]:
    [found] = deployment()["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def settings_of(flags: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The settings that `sempre serve` makes of the flags."""
    assert main(["serve", *flags, "--print-config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_the_image_copies_what_is_there_and_runs_known_flags(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} <= known
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    links = [path.resolve() for path in (ROOT / ".typing" / "sempre").iterdir()]
    tops = {".typing", *(path.relative_to(ROOT).parts[0] for path in links if path.name != "__pycache__")}
    assert {"engine", "workers", "ipc", "kernels"} <= tops
    copied = {rest.split()[0] for name, rest in instructions() if name == "COPY"}
    assert tops <= copied, "every folder with a package is part of the image"
    for name, rest in instructions():
        if name == "ENTRYPOINT":
            words = json.loads(rest)
            assert words[:2] == ["sempre", "serve"]
            found = settings_of(["tiny", *words[2:]], capsys)
            assert (found["host"], found["port"]) == ("0.0.0.0", 8000)


def test_the_image_needs_the_torch_of_the_package() -> None:
    wanted = re.search(r"^    (torch\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert wanted is not None
    asked = [rest for name, rest in instructions() if name == "RUN" and "torch" in rest]
    assert len(asked) == 2
    assert all(f'"{wanted[1]}"' in rest for rest in asked)


def test_the_services_of_compose_run_known_flags(capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    service = document["services"]["sempre"]
    found = settings_of(service["command"], capsys)
    assert int(service["stop_grace_period"].removesuffix("s")) > found["shutdown_timeout"]
    stages = {rest.partition(" AS ")[2] for name, rest in instructions() if name == "FROM"}
    assert service["build"]["target"] in stages
    scrapes = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))["scrape_configs"]
    assert scrapes[0]["static_configs"][0]["targets"] == ["sempre:8000"]


def test_pods_are_drained_and_started_with_known_flags(capsys: pytest.CaptureFixture[str]) -> None:
    pod = deployment()["Deployment"]["spec"]["template"]["spec"]
    flags = [flag for flag in container()["args"] if not flag.startswith("--api-key-file")]
    found = settings_of(flags, capsys)
    pause = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > found["shutdown_timeout"] + pause
    mounts = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_pods_that_share_a_model_run_the_same_known_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = yaml.safe_load((FOLDER / "kubernetes" / "leader-worker-set.yaml").read_text(encoding="utf-8"))
    template = document["spec"]["leaderWorkerTemplate"]
    assert "leaderTemplate" not in template
    pod = template["workerTemplate"]["spec"]
    [container] = pod["containers"]
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "sempre-0.sempre.default")
    monkeypatch.setenv("LWS_GROUP_SIZE", str(template["size"]))
    for index in range(template["size"]):
        monkeypatch.setenv("LWS_WORKER_INDEX", str(index))
        found = settings_of(container["args"], capsys)
        expected = (2, index, "sempre-0.sempre.default", index > 0)
        assert tuple(found[name] for name in ("nnodes", "node_rank", "master_addr", "headless")) == expected
    [copy] = [each["command"] for each in pod["initContainers"]]
    assert copy[:3] == ["install", "-m", "600"]
    assert copy[-1] == found["node_key_file"]
    mounts = {mount["name"] for each in (*pod["containers"], *pod["initContainers"]) for mount in each["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_labels_and_ports_of_the_cluster_fit() -> None:
    documents = deployment()
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["Service"]["spec"]["selector"] == labels
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    [port] = container()["ports"]
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_the_unit_runs_a_known_command_and_stays_down_for_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOLDER / "sempre.service").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    words = shlex.split(values["ExecStart"])
    assert words[0].endswith("/sempre")
    assert words[1:3] == ["serve", "--config"]
    assert main(["serve", "tiny", "--port", "none"]) == int(values["RestartPreventExitStatus"])
    assert int(values["TimeoutStopSec"]) > settings_of(["tiny"], capsys)["shutdown_timeout"]


def test_a_server_has_every_metric_of_the_dashboard_and_answers_the_probes(tmp_path: Path) -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    wanted = {name for query in queries for name in re.findall(r"sempre:\w+", query)}
    assert len(wanted) > 12
    with ServerProcess(tmp_path / "log", "--max-num-seqs", "4", "--num-threads", "1") as server:
        assert server.complete(prompt="The ship", max_tokens=4).status_code == 200
        exposition = server.http.get("/metrics").text
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server.http.get(container()[probe]["httpGet"]["path"]).status_code == 200
    lines = [line for line in exposition.splitlines() if not line.startswith("#")]
    assert wanted <= {re.split(r"[{ ]", line)[0] for line in lines}
    # and every label by which a query selects or groups
    labels = {label for query in queries for label in re.findall(r"by \((\w+)\)|[{,](\w+)=", query) for label in label}
    for label in labels - {"", "le"}:
        assert f'{label}="' in exposition, label


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
