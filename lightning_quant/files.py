# SPDX-License-Identifier: Apache-2.0
"""Owns files on the disk: written whole or not at all, refused when they are damaged, without running what is in them.

A file is written beside its target, flushed to the disk and renamed: whoever reads meanwhile has the old file or the new one.
What a killed writer left behind is removed by the next one. Both formats that come back, `.pt2` and `.pt`, are zip archives
with a checksum for each member.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import platform
import re
import secrets
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_quant.config import ConfigError

_MARK = "lightning_quant"  # in a .pt2 file, beside the program
_FORMAT = 1
_FOREIGN_AGE = 24 * 3600  # seconds after which any unfinished file counts as left behind


def as_path(path: Any) -> Path:
    """`path` as a Path.

    Raises:
        ConfigError: if it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path: expected a str or a pathlib.Path, got {path!r}.")
    return Path(path)


# -- writing ----------------------------------------------------------------------------------------------------------


def checked_folder(dirpath: Any) -> Any:
    """`dirpath`, if it is None or may be the path of a folder.

    Raises:
        ConfigError: if it is no path, or a file has this name.
    """
    if not isinstance(dirpath, str | os.PathLike | None):
        raise ConfigError(f"dirpath: expected None, a str or a pathlib.Path, got {dirpath!r}.")
    if dirpath and Path(dirpath).is_file():
        raise ConfigError(f"dirpath: {os.fspath(dirpath)!r} is a file; give a folder.")
    return dirpath


def check_folder(folder: Path, place: str) -> None:
    """Make a folder, if it is not there, and try to write to it; nothing is left of that.

    Raises:
        ConfigError: with `place` in front, if the folder cannot be made or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{place} cannot be written: {os.fspath(folder)!r} is no folder that can be written to ({error.strerror}). "
            "Give another place."
        ) from error


def check_target(target: Path, name: str = "path") -> None:
    """The same for the folder of a file that is to be written; `name` is the argument's.

    Raises:
        ConfigError: as above, or if a folder has the file's name.
    """
    if target.is_dir():
        raise ConfigError(f"{name} {os.fspath(target)!r} is a folder; give the name of a file in it.")
    check_folder(target.resolve().parent, f"{name} {os.fspath(target)!r}")


def _host() -> str:
    return re.sub(r"\W", "-", platform.node()) or "host"


def _is_left_behind(path: Path, host: str, process: int) -> bool:
    """Whether the writer of an unfinished file is gone: by its number, or by the age of what it left."""
    if time.time() - path.stat().st_mtime > _FOREIGN_AGE:  # its number may be another process's by now
        return True
    if host != _host() or os.name == "nt":  # where signal 0 ends a process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _clear(target: Path) -> None:
    """Remove what killed writers of `target` left beside it."""
    pattern = re.compile(rf"\.{re.escape(target.stem)}~([\w-]+)~(\d+)~[0-9a-f]+{re.escape(target.suffix)}")
    for path in target.parent.iterdir():
        if match := pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process clears, too
                if _is_left_behind(path, match[1], int(match[2])):
                    path.unlink()


@contextlib.contextmanager
def written(target: Path) -> Iterator[Path]:
    """A path to write to; when the block ends without an exception the file there takes the place of `target`, at once.

    Raises:
        OSError: what the disk says; the target is as it was, and nothing is beside it.
    """
    target = target.resolve()  # the file that a link points to, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    beside = target.with_name(f".{target.stem}~{_host()}~{os.getpid()}~{secrets.token_hex(4)}{target.suffix}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _write(path: Path, save: Any) -> None:
    """Have torch write to memory, and the bytes to the disk: a full disk is then an OSError."""
    before = torch.serialization.get_crc32_options()
    buffer = io.BytesIO()
    torch.serialization.set_crc32_options(True)
    try:
        save(buffer)
    finally:
        torch.serialization.set_crc32_options(before)
    path.write_bytes(buffer.getbuffer())


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """An exported program as a `.pt2` file, with our mark and without the example that it was recorded with.

    Examples are the user's data, which need not leave the house, and torch would read them by pickle.
    """
    program.example_inputs = None
    _write(path, lambda file: torch.export.save(program, file, extra_files={_MARK: json.dumps({"format": _FORMAT})}))


def write_weights(content: dict[str, Any], path: Path) -> None:
    """Plain data and tensors as a `.pt` file, with our mark."""
    _write(path, lambda file: torch.save({_MARK: {"format": _FORMAT}, **content}, file))


# -- reading ----------------------------------------------------------------------------------------------------------


def _bad(path: Path, why: str) -> ConfigError:
    return ConfigError(f"path {os.fspath(path)!r} is no file that export_model wrote, or is damaged: {why}.")


def _whole(path: Path) -> bytes:
    """The bytes of a zip archive all of whose members have their checksum: read once, so that nothing changes after the check."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"path {os.fspath(path)!r} cannot be read: {error.strerror}.") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()
    except Exception as error:
        raise _bad(path, str(error)) from error
    if broken is not None:
        raise _bad(path, f"{broken!r} in it has another checksum than when it was written")
    return content


def _check_mark(path: Path, mark: Any) -> None:
    if not isinstance(mark, dict) or not isinstance(mark.get("format"), int):
        raise _bad(path, "our mark is not in it; read it with what wrote it (torch.load, torch.export.load)")
    if mark["format"] > _FORMAT:
        raise ConfigError(
            f"path {os.fspath(path)!r} was written by a later lightning_quant (format {mark['format']}): upgrade it."
        )


# What a .pt2 file of ours consists of; torch reads other members by pickle, or loads them as compiled code.
_MEMBERS = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/model_\w+_config\.json|models/model\.json|"
    rf"data/sample_inputs/model\.pt|extra/{_MARK}|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_TARGET = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|torch\.sym_\w+|_operator\.\w+|math\.\w+|[a-z_]\w*")
_EXPRESSION = re.compile(
    r"([su]\d+|'[su]\d+'|[a-z]+=(?=True|False)|[A-Z]\w*|[\d.]+|[-+*/(),<>=\s])*"
)  # sizes: torch has sympy evaluate them


def _says(value: Any, path: Path) -> None:
    """Raise a ConfigError if something in a program's JSON would have torch run more than operators on tensors."""
    if isinstance(value, dict):
        for key, one in value.items():
            pattern = {"target": _TARGET, "expr_str": _EXPRESSION, "path_name": re.compile(r"(weight|tensor)_\d+")}.get(key)
            if (key == "use_pickle" and one) or (pattern is not None and isinstance(one, str) and not pattern.fullmatch(one)):
                raise _bad(path, f"it asks for {key} {one!r}, which is none of an exported program's")
            _says(one, path)
    elif isinstance(value, list):
        for one in value:
            _says(one, path)


def _check_program(path: Path, content: bytes) -> None:
    """Raise a ConfigError unless all that is in a .pt2 file is ours, and loading it runs no code of the file's."""
    mark = None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(names) != len(set(names)):
            raise _bad(path, "members of one name are in it")
        if any(name.endswith(f"extra/{_MARK}") for name in names):
            mark = json.loads(archive.read(next(name for name in names if name.endswith(f"extra/{_MARK}"))))
        _check_mark(path, mark)
        for name in names:
            inside = name.partition("/")[2]
            if not _MEMBERS.fullmatch(inside) or (inside.startswith("data/sample_inputs") and archive.getinfo(name).file_size):
                raise _bad(path, f"{name!r} in it is no part of a program of ours")
            if inside.endswith(".json"):
                _says(json.loads(archive.read(name)), path)


def read_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a `.pt2` file that `write_program` wrote.

    Raises:
        ConfigError: for any other file.
    """
    content = _whole(path)
    if b"quantized_decomposed" in content:
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers them
    try:
        _check_program(path, content)
        return torch.export.load(io.BytesIO(content))
    except ConfigError:
        raise
    except Exception as error:
        raise _bad(path, str(error)) from error


def read_weights(path: Path) -> dict[str, Any]:
    """What `write_weights` wrote; read with `weights_only=True`.

    Raises:
        ConfigError: for any other file.
    """
    content = _whole(path)
    try:
        with warnings.catch_warnings():  # torch warns of what it takes for other formats, before it refuses them
            warnings.simplefilter("ignore")
            found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, AttributeError) as error:
        raise _bad(path, str(error).partition("\n")[0]) from error
    if not isinstance(found, dict):
        raise _bad(path, f"it holds a {type(found).__name__}")
    _check_mark(path, found.pop(_MARK, None))
    return found


# -- small integers ---------------------------------------------------------------------------------------------------


def packed(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(the state with int8 tensors of at most 4 bits packed, two or four values a byte, {name: [bits, shape]}).

    By the values: a tensor of 4 or 2 bits is packed whatever was asked for, without loss.
    """
    small: dict[str, list[Any]] = {}
    result = dict(state)
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int8 and tensor.numel() > 1:
            low, high = (int(end) for end in tensor.aminmax())
            bits = next((bits for bits in (2, 4) if -(1 << bits - 1) <= low and high < 1 << bits - 1), 8)
            if bits < 8:
                small[name] = [bits, list(tensor.shape)]
                result[name] = _pack(tensor.flatten(), bits)
    return result, small


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (n,) in [-2^(bits-1), 2^(bits-1)) to uint8 (ceil(n bits / 8),), the first value in the lowest bits."""
    each = 8 // bits
    whole = torch.zeros(-(-len(values) // each) * each, dtype=torch.uint8)
    whole[: len(values)] = values.to(torch.uint8) & ((1 << bits) - 1)
    made = torch.zeros(len(whole) // each, dtype=torch.uint8)
    for index in range(each):
        made |= whole[index::each] << (bits * index)
    return made


def unpacked(state: dict[str, Any], small: dict[str, list[Any]]) -> dict[str, Any]:
    """The state that `packed` was given."""
    result = dict(state)
    for name, (bits, shape) in small.items():
        each, count = 8 // bits, int(torch.Size(shape).numel())
        columns = [state[name] >> (bits * index) for index in range(each)]
        values = (torch.stack(columns, 1).flatten()[:count] & ((1 << bits) - 1)).to(torch.int16)
        values = torch.where(values >= 1 << (bits - 1), values - (1 << bits), values)
        result[name] = values.to(torch.int8).view(shape)
    return result
