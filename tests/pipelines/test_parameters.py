"""Presets and `--set`: what a user types becomes checked pipeline parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from haechi.components.deploy.target import Target
from haechi.components.shared.errors import InputError
from haechi.pipelines.parameters import PARAMETERS, load_preset, preset_names, run_parameters

COMPILED = Path(__file__).resolve().parents[2] / "pipelines" / "compiled" / "training.yaml"
KINDS = {"STRING": str, "LIST": list, "STRUCT": dict, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float, "BOOLEAN": bool}


def test_the_parameter_list_is_the_pipelines_own() -> None:
    root = next(yaml.safe_load_all(COMPILED.read_text()))["root"]["inputDefinitions"]["parameters"]
    assert {name: KINDS[entry["parameterType"]] for name, entry in root.items()} == PARAMETERS


def test_the_pipeline_tells_every_form_of_a_target() -> None:
    with pytest.raises(InputError) as caught:
        Target.parse("anything")
    forms = re.findall(r"'(\w+)", caught.value.remedy)
    components = next(yaml.safe_load_all(COMPILED.read_text()))["components"]
    told = components["comp-deploy"]["inputDefinitions"]["parameters"]["target"]["description"]
    assert len(forms) == 4
    assert re.findall(r"`(\w+)", told) == forms


@pytest.mark.parametrize("name", ["entrance", "safety"])
def test_every_preset_parses_and_names_its_classes(name: str) -> None:
    values = load_preset(name)
    assert name in preset_names()
    assert values["name"] == name
    for table in ("bands", "thresholds"):
        assert set(values[table]) - {"default"} <= set(values["classes"])


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["seed=3"], {"seed": 3}),
        (["classes=[a, b]"], {"classes": ["a", "b"]}),
        (["iou=1"], {"iou": 1.0}),
        (["gate.min_boxes=5"], {"gate": {"min_boxes": 5}}),
        (["gpu_count=2"], {"gpu_count": "2"}),
        (["retrain=true"], {"retrain": True}),
        (["train_cpu=1.5", "infer_cpu=500m"], {"train_cpu": "1.5", "infer_cpu": "500m"}),
        (["train_memory=16Gi", "infer_memory=500M"], {"train_memory": "16Gi", "infer_memory": "500M"}),
        (["target=dir:/models"], {"target": "dir:/models"}),
        (["teacher="], {"teacher": ""}),
        (['node_selector={pool: "true", a/b: ""}'], {"node_selector": {"pool": "true", "a/b": ""}}),
        (
            ["tolerations=[{operator: Exists}, {key: a, value: b, effect: NoExecute, tolerationSeconds: 60}]"],
            {
                "tolerations": [
                    {"operator": "Exists"},
                    {"key": "a", "value": "b", "effect": "NoExecute", "tolerationSeconds": 60},
                ]
            },
        ),
        (['imports=[{uri: "file:///x", covers: [fire]}]'], {"imports": [{"uri": "file:///x", "covers": ["fire"]}]}),
    ],
)
def test_set_words_are_yaml_with_dots(pairs: list[str], expected: dict[str, Any]) -> None:
    assert run_parameters("", pairs) == expected


def test_a_dotted_word_changes_one_item_of_a_preset_and_leaves_the_rest() -> None:
    values = run_parameters("safety", ["candidates.0.epochs=2", "gate.min_boxes=1"])
    assert values["candidates"][0]["epochs"] == 2
    assert values["candidates"][1] == load_preset("safety")["candidates"][1]
    assert values["gate"]["floors"] == load_preset("safety")["gate"]["floors"]


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        (["sead=3"], "Did you mean 'seed'"),
        (["seed"], "key=value"),
        (["seed=x"], "not a int"),
        (["seed=true"], "not a int"),
        (["retrain=1"], "not a bool"),
        (["gpu_count=one"], "gpu_count is 'one'. Give a whole number"),
        (["gpu_count=-1"], "gpu_count is '-1'"),
        (["gpu_type=gpu"], "such as nvidia.com/gpu"),
        (["train_cpu="], "train_cpu is ''. Give CPUs such as 2 or 500m"),
        (["train_cpu=0"], "train_cpu is '0'"),
        (["train_memory=4"], "memory with its unit, such as 4Gi"),
        (["infer_memory=4GB"], "infer_memory is '4GB'"),
        (["classes=fire"], "classes"),
        (["candidates=[]"], "candidates is empty"),
        (["gate=[1"], "not YAML"),
        (["gate..min_boxes=1"], "two dots"),
        (["iou=.nan"], "iou holds what JSON cannot"),
        (["gate=&a {x: *a}"], "gate holds what JSON cannot"),
        (["sources=[{start: 2024-01-01}]"], "Quote dates"),
        (["candidates.7.epochs=1"], "no item '7'"),
        (["candidates=[yolo11n]"], "candidates holds 'yolo11n'"),
        (["candidates.0.epochz=3"], "has unknown keys: epochz"),
        (["candidates=[{1: 2, model: yolo11n}]"], "has unknown keys: 1"),
        (["candidates.0.epochs=0"], "option epochs is 0"),
        (["target=kserv:haechi-serving/safety"], "target 'kserv:haechi-serving/safety' cannot be read"),
        (["target=kserve:haechi-serving"], "cannot be read. Use .*'kserve:<namespace>/<name>'"),
        (["target=/srv/models"], "target '/srv/models' cannot be read"),
        (["target=git:https://me:secret@git.example.org/m.git#main:a.yaml"], "holds credentials"),
        (["rollout.bakee=10"], "rollout has no key 'bakee'"),
        (["rollout.bake=-1"], "rollout.bake is -1"),
        (
            ["node_selector={cloud.google.com/gke-spot: true}"],
            r"node_selector\[cloud.google.com/gke-spot\] is True.*quotes",
        ),
        (["node_selector={1: a}"], "the key 1 in node_selector is 1"),
        (["node_selector={pool: a b}"], r"node_selector\[pool\] is 'a b'"),
        (["tolerations=[spot]"], r"tolerations\[0\] is 'spot'"),
        (["tolerations=[{key: spot, value: true}]"], r"tolerations\[0\].value is True.*quotes"),
        (
            ["tolerations=[{key: a, operator: Exists}, {key: b, operater: Exists}]"],
            r"tolerations\[1\] has no field 'operater'",
        ),
        (["tolerations=[{key: spot, operator: exists}]"], "Give one of Exists, Equal"),
        (["tolerations=[{key: spot, operator: Exists, effect: NoSchedul}]"], "effect is 'NoSchedul'"),
        (["tolerations=[{key: spot, operator: Exists, value: a}]"], "its operator is Exists"),
        (["tolerations=[{value: a}]"], r"tolerations\[0\].key is None"),
        (["tolerations=[{key: a, operator: Exists, tolerationSeconds: 60}]"], "the effect NoExecute"),
        (["git_secret="], "git_secret is ''"),
        (["endpoint_secret=a.b"], "letters, digits and hyphens, there or not"),
        (["settings_config_map=Haechi"], "settings_config_map is 'Haechi'"),
        (["train_image="], "train_image is ''. Give an image's name"),
    ],
)
def test_a_wrong_word_is_refused_and_named(pairs: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        run_parameters("safety", pairs)


def test_a_preset_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nclasses: [cat]\n")
    assert run_parameters(str(file), ["seed=1"]) == {"name": "mine", "classes": ["cat"], "seed": 1}


@pytest.mark.parametrize("text", [b"- a", b"name: [", b"nam: x", b"\xff\xfe\x00"])
def test_a_broken_preset_file_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_preset(str(file))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="entrance, safety"):
        load_preset("factory")
