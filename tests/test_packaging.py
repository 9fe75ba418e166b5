"""The wheel holds what an editable install sees, and the package runs from it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import decal

ROOT = Path(__file__).parent.parent
FOLDERS = ("samplers", "kernels", "serving", "eval")


def run(*command: str, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built by way of the source distribution, as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.whl"))


def sources() -> set[str]:
    kept = {".py", ".yaml", ".txt", ".jinja", ".safetensors"}
    return {
        f"decal/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kept and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_source_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == sources() | {"decal/__init__.py", "decal/__main__.py", "decal/py.typed"}


def test_wheel_runs_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import decal, decal.eval.task as t, decal.kernels.reference;"
        "assert decal.__file__.startswith(sys.argv[1]) and t.__file__.startswith(sys.argv[1]);"
        "print(decal.min_p(0.1), t.load('us_states').valid.size)"
    )
    assert run(sys.executable, "-I", "-c", code, str(site), cwd=tmp_path).split() == ["min_p(0.1)", "50"]


def test_this_environment_runs_the_checkout():
    assert Path(decal.__file__).resolve() == ROOT / "src/decal/__init__.py"
    assert all((ROOT / "src/decal" / folder).resolve() == ROOT / folder for folder in FOLDERS)


def test_importing_decal_imports_nothing_heavy():
    code = "import decal, sys; print(*[m for m in ('transformers', 'triton', 'numba', 'scipy', 'pandas') if m in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == ""


def test_version_is_the_distribution_s():
    assert f'version = "{decal.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_package_runs_as_the_command():
    assert run(sys.executable, "-m", "decal", "--version") == f"decal, version {decal.__version__}\n"


def test_task_in_the_readme_is_a_task(tmp_path):
    from decal.eval.task import Task, load

    example = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "example.yaml"
    file.write_text(example[1])
    assert load(str(file)).valid.size == 3
    shown = set(yaml.safe_load(example[1]))
    assert shown == set(Task.model_fields), "the README shows every key"


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert [c.rsplit("/", 1)[1] for c in commands] == ["decal frontier", "pytest"]
    assert all("-c constraints.txt" in c for c in commands)


def test_layers_know_nothing_of_those_above():
    above = {"kernels": ("samplers", "serving", "eval"), "samplers": ("serving", "eval"), "serving": ("eval",)}
    for folder, forbidden in above.items():
        for path in (ROOT / folder).rglob("*.py"):
            for name in forbidden:
                assert f"decal.{name}" not in path.read_text(), f"{path} mentions decal.{name}"
