# SPDX-License-Identifier: Apache-2.0
"""Owns the truth of `examples/quantization.ipynb`: it runs, its numbers agree, and it is kept with its outputs.

`python tests/test_notebook.py` runs it and writes its outputs anew.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quantization.ipynb"
KEPT = nbformat.read(NOTEBOOK, as_version=4)


def executed(folder: Path) -> Any:
    """The notebook after all its cells, run in `folder`; a CellExecutionError if one fails."""
    found = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(found, timeout=300, kernel_name="python3", record_timing=False, resources=resources).execute()
    return found


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[list[tuple[str, ...]]]:
    """What each cell shows: streams and mime types."""
    return [
        [(output.output_type, *sorted(output.get("data", {})), output.get("name", "")) for output in cell.outputs]
        for cell in code(notebook)
    ]


def accuracies(notebook: Any) -> dict[str, float]:
    """Everything that is printed as `where: 99.1%`."""
    text = "".join(output.text for cell in code(notebook) for output in cell.outputs if output.output_type == "stream")
    return {where: float(percent) for where, percent in re.findall(r"^(.+): (\d+\.\d+)%$", text, flags=re.MULTILINE)}


def agree(notebook: Any) -> None:
    found = accuracies(notebook)
    assert set(found) == {"float", "validated", "deployed", "out/model.pt2", "onnxruntime", "4-bit weights in the middle"}
    assert found["validated"] == found["deployed"] == found["out/model.pt2"] == found["onnxruntime"]
    assert all(95 < percent <= 100 for percent in found.values()), found
    pages = [
        output.data["text/html"] for cell in code(notebook) for output in cell.outputs if "text/html" in output.get("data", {})
    ]
    assert ["decided by" in page for page in pages] == [True, False, False], "the plan and two reports"
    assert ["weight dB" in page for page in pages] == [False, True, True]


@pytest.mark.slow
def test_every_cell_runs_and_accuracies_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    fresh = executed(tmp_path)
    agree(fresh)
    assert {"model.onnx", "model.pt2"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert kinds(fresh) == kinds(KEPT), "write the outputs anew: python tests/test_notebook.py"


def test_it_is_kept_with_its_outputs() -> None:
    nbformat.validate(KEPT)
    agree(KEPT)
    assert [cell.execution_count for cell in code(KEPT)] == list(range(1, len(code(KEPT)) + 1))
    assert not [output for cell in code(KEPT) for output in cell.outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for cell in code(KEPT) for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 100_000
    assert "shared" not in "".join(cell.source for cell in KEPT.cells)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        nbformat.write(executed(Path(scratch)), NOTEBOOK)
