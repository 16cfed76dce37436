# SPDX-License-Identifier: Apache-2.0
"""Owns the truth of what is written: README's code, commands and tree, the direction of imports, the public names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_quant

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "lightning_quant"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def tree() -> list[str]:
    """The files in README's picture of the package, in order."""
    (picture,) = blocks("text")
    return re.findall(r"^[├└]── (\S+)", picture, flags=re.MULTILINE)


def run(arguments: list[str | Path], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text("\n".join(blocks("python")))
    output = run(["readme.py"], tmp_path)
    assert "conv    bn, relu" in output
    assert {"model.onnx", "model.pt2"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_first_command_runs_the_example(tmp_path: Path) -> None:
    command = blocks("sh")[0].strip()
    assert command.endswith(".venv/bin/python examples/mnist.py"), command
    output = run([ROOT / "examples" / "mnist.py", "--out", tmp_path], tmp_path)
    rows = re.findall(r"^(float|quantized|deployed|onnxruntime).*?(\d+\.\d+)%", output, flags=re.MULTILINE)
    accuracy = {name: float(percent) for name, percent in rows}
    assert set(accuracy) == {"float", "quantized", "deployed", "onnxruntime"}
    assert accuracy["quantized"] == accuracy["deployed"] == accuracy["onnxruntime"] >= 96
    assert {"model.onnx", "model.pt2"} <= {path.name for path in tmp_path.iterdir()}


def test_ci_runs_the_second_command() -> None:
    assert blocks("sh")[1].strip() in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_tree_is_the_disk() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert set(tree()) == files


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_public_names_are_the_readmes() -> None:
    (sentence,) = re.findall(r"Public names: (.*?)\.\n", README, flags=re.DOTALL)
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(lightning_quant.__all__)
    assert all(hasattr(lightning_quant, name) for name in lightning_quant.__all__)


# -- direction of imports --------------------------------------------------------------------------------------------------

ORDER = [name.removesuffix(".py") for name in tree() if name.endswith(".py") and name != "__init__.py"]
ONLY_IN = {
    "lightning.pytorch": {
        "__main__",
        "calibration",
        "callback",
        "capture",
        "checkpoints",
        "company",
        "compression",
        "delivery",
        "evaluation",
        "logs",
        "processes",
    },
    "lightning.fabric": {"config"},
    "matplotlib": {"summary"},
    "onnx": set(),
    "onnxruntime": set(),
    "onnxscript": set(),
}


def imports(module: str) -> list[tuple[str, bool]]:
    """(imported module, whether inside a function) of every import in a file of the package."""
    parsed = ast.parse((PACKAGE / f"{module}.py").read_text())
    inside = {id(n) for f in ast.walk(parsed) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            found.append((str(node.module), id(node) in inside))
        elif isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
    return found


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_files_above_it(module: str) -> None:
    for name, hidden in imports(module):
        if name.startswith("lightning_quant."):
            above = name.removeprefix("lightning_quant.")
            assert ORDER.index(above) < ORDER.index(module), f"{module} imports {above}"
            assert not hidden, f"{module} hides its import of {above} in a function"
        for package, allowed in ONLY_IN.items():
            if name == package or name.startswith(f"{package}."):
                assert module in allowed, f"{module} imports {name}"
                assert hidden or package != "matplotlib", "an extra: only where it draws"


@pytest.mark.parametrize("module", ORDER)
def test_a_file_says_in_its_first_line_what_it_owns(module: str) -> None:
    first, second = (PACKAGE / f"{module}.py").read_text().splitlines()[:2]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
    assert second.startswith('"""Owns ')


def test_no_file_passes_500_lines() -> None:
    for folder in ("lightning_quant", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path


def test_importing_the_package_needs_no_extra() -> None:
    extras = ["onnx", "onnxruntime", "onnxscript", "jsonargparse", "sklearn"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); import lightning_quant"
    run(["-c", code], ROOT)
