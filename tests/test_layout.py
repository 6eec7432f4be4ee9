"""The repository's shape: what is packaged, what may import what, and what every step folder holds."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("resolve", "ingest", "label", "build", "train", "export", "evaluate", "deploy")
MAPPED = {"haechi.components": "components", "haechi.pipelines": "pipelines", "haechi.serving": "images/serving"}


def _packages_on_disk() -> set[str]:
    found = set()
    for package, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    return found


def test_every_package_on_disk_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert listed["package-dir"] == MAPPED
    assert set(listed["packages"]) == _packages_on_disk()


def test_there_is_no_root_package() -> None:
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("step", STEPS)
def test_a_step_folder_holds_contract_work_metadata_and_readme(step: str) -> None:
    folder = ROOT / "components" / step
    assert {"component.py", "step.py", "metadata.yaml", "README.md"} <= {path.name for path in folder.iterdir()}
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert {"name", "stage", "dependencies", "lastVerified"} <= set(metadata)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "components").rglob("*.py")) if p.name != "component.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_contracts_import_kfp(path: Path) -> None:
    assert not {name for name in _imports(path) if name == "kfp" or name.startswith("kfp.")}


@pytest.mark.parametrize("path", sorted((ROOT / "components").rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_package_files_hold_only_a_docstring(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("step", STEPS)
def test_a_contract_is_thin_and_imports_only_kfp_and_the_standard_library(step: str) -> None:
    tree = ast.parse((ROOT / "components" / step / "component.py").read_text())
    top = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert top <= {"typing", "kfp", "collections"}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert step in {function.name for function in functions}
    for function in functions:
        work = [node for node in function.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(work) - 1 <= 10, f"{function.name} does work that belongs in step.py"
        documented = ast.get_docstring(function) or ""
        for argument in function.args.args:
            assert re.search(rf"^\s*{argument.arg}:", documented, re.M), (
                f"{function.name}: {argument.arg} is undocumented"
            )


def test_the_environment_is_read_in_settings_only() -> None:
    reads = re.compile(r"os\.environ\b(?!\.setdefault|\.update|\[[^\]]+\]\s*=)|os\.getenv")
    allowed = {"components/shared/settings.py", "images/serving/settings.py"}
    found = {
        str(path.relative_to(ROOT)) for path in (ROOT / "components").rglob("*.py") if reads.search(path.read_text())
    }
    assert found <= allowed


def test_constraints_are_plain_pins_without_hosts() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_first_command_stands_before_line_30(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert any(line.startswith("make demo") for line in lines[:30])
    assert any(line.startswith("make test") for line in lines[:30])


def test_both_readmes_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text(), re.S)
        return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]

    assert commands("README.md") == commands("README.ko.md")
