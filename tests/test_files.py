# SPDX-License-Identifier: Apache-2.0
"""Owns files on the disk: what is damaged or foreign is refused and not run; what cannot be written leaves the old file."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import CONFIGS, trained
from torch import Tensor, nn
from toys import Net

from lightning_quant import ConfigError, convert_model, export_model, load_deployed, make_plan, prepare_model
from lightning_quant import files as files_module
from lightning_quant.files import _host, read_weights, write_program

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".pt2"])
BOTH: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def _written_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not BOTH:
        folder = tmp_path_factory.mktemp("whole")
        deployed = convert_model(trained(CONFIGS["default"]))
        for suffix in (".pt", ".pt2"):
            BOTH[suffix] = export_model(deployed, folder / f"model{suffix}", example_input=X).read_bytes()


def load(path: Path) -> nn.Module:
    return load_deployed(path, model=Net() if path.suffix == ".pt" else None)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)model{path.suffix}' {message}"):
        load(path)


# -- damaged ------------------------------------------------------------------------------------------------------------


@SUFFIXES
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(BOTH[suffix][: int(len(BOTH[suffix]) * share)])
    refused(path, "is no file that export_model wrote, or is damaged")


@SUFFIXES
def test_no_flipped_bit_gives_other_numbers(suffix: str, tmp_path: Path) -> None:
    """Anywhere in the file: refused, or (in padding that nothing reads) the model as it was."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(BOTH[suffix])
    with torch.no_grad():
        wanted = load(path)(X)
    generator = torch.Generator().manual_seed(0)
    damaged = 0
    for place in torch.randint(len(BOTH[suffix]), (60,), generator=generator).tolist():
        content = bytearray(BOTH[suffix])
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            found = load(path)
        except ConfigError:
            damaged += 1
        else:
            with torch.no_grad():
                assert torch.equal(found(X), wanted)
    assert damaged >= 20


@SUFFIXES
def test_a_flipped_bit_in_a_weight_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    content = bytearray(BOTH[suffix])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [one for one in archive.infolist() if "/data/" in one.filename and one.file_size > 100]
        largest = max((one for one in members if not one.filename.endswith(".json")), key=lambda one: one.file_size)
        start = content.index(archive.read(largest))
    content[start + 3] ^= 1
    path.write_bytes(content)
    refused(path, f"is .* damaged: .*{largest.filename}.* another checksum than when it was written")


# -- foreign ------------------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def rewritten(content: bytes, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> bytes:
    """An archive whose members went through `change`, its checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, member in (extra or {}).items():
            new.writestr(name, member)
    return buffer.getvalue()


def replaced(where: str, by: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, member: by if name.endswith(where) else member


def test_archives_that_were_only_packed_anew_load(tmp_path: Path) -> None:
    for suffix, content in BOTH.items():  # else what follows would prove nothing
        path = tmp_path / f"model{suffix}"
        path.write_bytes(rewritten(content, lambda _, member: member))
        assert load(path)(X).shape == (4, 4)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    evil = pickle.dumps(Evil(tmp_path / "made"), protocol=2)
    path.write_bytes(rewritten(BOTH[".pt"], replaced("data.pkl", evil)))
    refused(path, "is no file that export_model wrote, or is damaged")
    path.write_bytes(evil)
    refused(path, "is no file that export_model wrote, or is damaged")
    torch.save({"state": Evil(tmp_path / "made")}, path)
    refused(path, "is no file that export_model wrote, or is damaged: Weights only load failed")
    assert not (tmp_path / "made").exists()


def _pickled_constant(content: bytes, evil: bytes) -> bytes:
    entry = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"evil": entry}}).encode()
    change = replaced("model_constants_config.json", config)
    return rewritten(content, change, {"archive/data/constants/custom_obj_0": evil})


def _pickled_weight(content: bytes, evil: bytes) -> bytes:
    def change(name: str, member: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            return member.replace(b'"use_pickle": false', b'"use_pickle":true', 1)
        return evil if name.endswith("weight_0") else member

    return rewritten(content, change)


def _expression(content: bytes, evil: bytes) -> bytes:
    def change(name: str, member: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return member
        text = member.decode()
        assert '"expr_str": "' in text
        return text.replace('"expr_str": "', "\"expr_str\": \"__import__('os').mkdir('made') or ").encode()

    return rewritten(content, change)


def _library(content: bytes, evil: bytes) -> bytes:
    def change(name: str, member: bytes) -> bytes:
        return member.replace(b"torch.ops.lightning_quant.dequantize.default", b"torch.ops.load_library")

    return rewritten(content, change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, e: rewritten(c, replaced("data/sample_inputs/model.pt", e)), "sample_inputs/model.pt' in it is no part"),
        (_pickled_constant, "(custom_obj_0' in it is no part|it asks for (path_name|use_pickle))"),
        (_pickled_weight, "it asks for use_pickle True"),
        (_expression, 'it asks for expr_str "__import__'),
        (_library, "it asks for target 'torch.ops.load_library'"),
        (lambda c, e: rewritten(c, lambda _, m: m, {"archive/data/aotinductor/model/x.so": e}), "x.so' in it is no part"),
    ],
)
def test_code_in_a_program_is_not_run(make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt2"
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "made"), buffer)
    path.write_bytes(make(BOTH[".pt2"], buffer.getvalue()))
    refused(path, f"is no file that export_model wrote, or is damaged: .*{message}")
    assert not (tmp_path / "made").exists()


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.warns(UserWarning, match="Duplicate name"):
        path.write_bytes(rewritten(BOTH[".pt2"], lambda _, m: m, {"archive/byteorder": b"big"}))
    refused(path, "is .* damaged: members of one name are in it")


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def _program(path: Path) -> None:
    torch.export.save(torch.export.export(Plain(), (torch.ones(2),)), path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")


def _onnx(path: Path) -> None:
    deployed = convert_model(trained(CONFIGS["default"]))
    export_model(deployed, path.with_suffix(".onnx"), example_input=X).rename(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("model.pt2", _program, r"our mark is not in it; read it with what wrote it \(torch.load, torch.export.load\)"),
        ("model.pt2", _zip, "our mark is not in it"),
        ("model.pt2", lambda path: torch.save({"a": torch.ones(1)}, path), "our mark is not in it"),
        ("model.pt", lambda path: torch.save(Net().state_dict(), path), "our mark is not in it"),
        ("model.pt", lambda path: torch.save([1], path), "it holds a list"),
        ("model.pt", lambda path: torch.save(Net().state_dict(), path, _use_new_zipfile_serialization=False), "not a zip"),
        ("model.pt", lambda path: torch.save(Net(), path), "Weights only load failed"),
        ("model.pt2", lambda path: torch.save(Net(), path), "our mark is not in it"),
        ("model.pt", lambda path: torch.save({"state_dict": Net().state_dict(), "epoch": 1}, path), "our mark is not in it"),
        ("model.pt2", _onnx, "not a zip"),
        ("model.pt", _program, ""),
        ("model.pt", _zip, ""),
    ],
)
def test_a_foreign_file_is_refused(name: str, write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    refused(tmp_path / name, f"is no file that export_model wrote, or is damaged: .*{message}")


def test_a_weights_file_under_the_name_of_a_program_is_refused_and_the_other_way_round(tmp_path: Path) -> None:
    for suffix, content in ((".pt2", BOTH[".pt"]), (".pt", BOTH[".pt2"])):
        (tmp_path / f"model{suffix}").write_bytes(content)
        refused(tmp_path / f"model{suffix}", "is no file that export_model wrote, or is damaged")


@SUFFIXES
def test_a_later_format_is_refused_by_its_number(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_FORMAT", 7)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        files_module.write_weights({}, path)
    else:
        write_program(torch.export.export(Plain(), (torch.ones(2),)), path)
    monkeypatch.undo()
    refused(path, r"was written by a later lightning_quant \(format 7\): upgrade it")


@pytest.mark.parametrize("lacking", ["manifest", "state", "packed"])
def test_a_weights_file_that_lacks_a_part_is_refused(lacking: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(BOTH[".pt"])
    content = read_weights(path)
    del content[lacking]
    files_module.write_weights(content, path)
    refused(path, f"is no file that export_model wrote, or is damaged: KeyError: '{lacking}'")


def test_a_manifest_can_call_activations_alone(tmp_path: Path) -> None:
    """Whatever stands in a weights file with the right checksums: of torch's functions only activations are looked up."""

    class Curved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(self.fc(x))

    x, net = torch.randn(8, 4), Curved()
    prepare_model(net, make_plan(net, "int8", example_input=x))
    net.train()(x)
    path = export_model(convert_model(net.eval()), tmp_path / "model.pt", example_input=x)
    content = read_weights(path)
    (layer,) = content["manifest"]["layers"]
    assert layer["function"]["function"] == ["torch.nn.functional", "gelu"]
    for op in ("load", "gelu", "mish"):
        layer["function"] |= {"op": op, "function": ["torch", "load"], "call": {"tuple": [{"tuple": ["x"]}, {"dict": {}}]}}
        files_module.write_weights(content, path)
        with pytest.raises(ConfigError, match=r"the file names an activation torch\.load, which torch does not have or nobody"):
            load_deployed(path, model=Curved())


def test_no_example_leaves_with_a_file(tmp_path: Path) -> None:
    marked = torch.full((2, 3, 8, 8), 1234.5)
    deployed = convert_model(trained(CONFIGS["default"]))
    for suffix in (".pt", ".pt2", ".onnx"):
        content = export_model(deployed, tmp_path / f"model{suffix}", example_input=marked).read_bytes()
        assert marked.numpy().tobytes()[:64] not in content


# -- disks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
def test_a_full_disk_leaves_the_old_file(suffix: str, small_disk: Path) -> None:
    path = small_disk / f"model{suffix}"
    path.write_bytes(b"old")
    (small_disk / "filling").write_bytes(b"0" * 8192)
    with pytest.raises(OSError, match="No space left on device"):
        export_model(convert_model(trained(CONFIGS["default"])), path, example_input=X)
    assert path.read_bytes() == b"old"
    assert sorted(one.name for one in small_disk.iterdir()) == ["filling", path.name]


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_write_that_fails_half_way_leaves_the_old_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    whole = Path.write_bytes

    def half(self: Path, content: Any) -> int:
        whole(self, bytes(content)[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left on device"):
        export_model(convert_model(trained(CONFIGS["default"])), path, example_input=X)
    assert path.read_bytes() == b"old" and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"model\.pt' cannot be written: '.*out' is no folder .*(exists|Not a dir).* another place"
    ):
        export_model(convert_model(trained(CONFIGS["default"])), tmp_path / "out" / "model.pt", example_input=X)


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
def test_a_target_that_is_a_folder_is_said_and_nothing_is_left_beside_it(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"model{suffix}").mkdir()
    with pytest.raises(ConfigError, match=rf"model\{suffix}' is a folder; give the name of a file in it"):
        export_model(convert_model(trained(CONFIGS["default"])), tmp_path / f"model{suffix}", example_input=X)
    assert [one.name for one in tmp_path.iterdir()] == [f"model{suffix}"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    ours, pid = f".model~{_host()}~", int(dead.stdout)
    gone = [f"{ours}{pid}~0a1b.pt", ".model~another-host~1~ff.pt", f"{ours}{os.getpid()}~0d1e.pt"]  # the last: its number again
    kept = [
        f"{ours}{os.getpid()}~0a1b.pt",  # being written
        f"{ours}{pid}~0a1b.pt2",  # of another target
        f".model2~{_host()}~{pid}~0a1b.pt",
        ".model~another-host~1~fe.pt",  # fresh, and nobody can be asked
        ".model.pt",
        "model~1.pt",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).write_bytes(b"")
    yesterday = time.time() - 2 * 24 * 3600
    for name in gone[1:]:
        os.utime(tmp_path / name, (yesterday, yesterday))
    export_model(convert_model(trained(CONFIGS["default"])), tmp_path / "model.pt")
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([*kept, "model.pt"])


READER = """
import hashlib, io, pathlib, sys, zipfile
path, seen, reads = pathlib.Path(sys.argv[1]), set(), 0
print("ready", flush=True)
while not path.with_name("stop").exists() or not reads:
    content = path.read_bytes()
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    seen.add(hashlib.sha256(content).hexdigest())
    reads += 1
print(reads, *sorted(seen))
"""


@SUFFIXES
def test_another_process_that_reads_while_we_write_sees_a_whole_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    deployed = [convert_model(trained(CONFIGS[name])) for name in ("default", "per_tensor")]
    written = {hashlib.sha256(export_model(deployed[0], path, example_input=X).read_bytes()).hexdigest()}
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    for index in range(1, 5):
        export_model(deployed[index % 2], path, example_input=X)
        written.add(hashlib.sha256(path.read_bytes()).hexdigest())
    (tmp_path / "stop").touch()
    said, problem = reader.communicate(timeout=60)
    assert reader.returncode == 0, problem
    reads, *seen = said.split()
    assert int(reads) >= 5 and set(seen) <= written and len(seen) >= 2
    assert sorted(one.name for one in tmp_path.iterdir()) == [path.name, "stop"]


def test_loading_while_another_thread_writes_gives_one_of_both_models(tmp_path: Path) -> None:
    """Two files take turns at one path; every reading of it is one of the two."""
    path = tmp_path / "model.pt"
    deployed = [convert_model(trained(CONFIGS[name])) for name in ("default", "per_tensor")]
    export_model(deployed[0], path)
    with torch.no_grad():
        wanted = [one(X) for one in deployed]
    assert not torch.equal(*wanted)
    ready = threading.Event()

    def write() -> None:
        for index in range(1, 9):
            export_model(deployed[index % 2], path)
        ready.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen: set[int] = set()
    reads = 0
    while not ready.is_set() or reads < 5:
        with torch.no_grad():
            found = load(path)(X)
        matches = [index for index, one in enumerate(wanted) if torch.equal(found, one)]
        assert len(matches) == 1
        seen |= set(matches)
        reads += 1
    writer.join()
    assert reads >= 5 and [one.name for one in tmp_path.iterdir()] == ["model.pt"]
