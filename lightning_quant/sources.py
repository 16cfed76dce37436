# SPDX-License-Identifier: Apache-2.0
"""Owns where a config comes from: lists, dicts, a preset's name, YAML and JSON files, Hydra's containers; all become plain data.

What the data means is decided in `config.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lightning_quant.config import ConfigError, closest

_YAML = (".yaml", ".yml")
_SUFFIXES = (*_YAML, ".json")


class ConfigFile(os.PathLike[str]):
    """The path of a config file, made absolute where it is written.

    While jsonargparse (LightningCLI) reads a YAML file it stands in that file's folder, so a relative path is relative to the
    YAML that names it, and to the working directory on the command line. A saved `config.yaml` lies in another folder, so
    what the file holds is written there, not its path.
    """

    def __init__(self, written: str) -> None:
        if not (isinstance(written, str) and written.lower().endswith(_SUFFIXES) and "\n" not in written):
            raise ValueError(f"expected the path of a {_or(_SUFFIXES)} file, got {written!r}")
        self._written, self._absolute = written, os.path.abspath(os.path.expanduser(written))

    def __fspath__(self) -> str:
        return self._absolute

    def __str__(self) -> str:
        return self._written

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._written!r})"


def _content_or_path(value: Any) -> Any:
    """What a saved config.yaml holds in place of a `ConfigFile`."""
    if not isinstance(value, ConfigFile):
        raise ValueError(f"expected a {ConfigFile.__name__}, got {value!r}")
    try:
        return _file_content(Path(value), "")
    except ConfigError:
        return os.fspath(value)  # --print_config comes before the constructor, which says what is wrong with the file


with suppress(ImportError):  # jsonargparse is an extra, needed by LightningCLI alone
    from jsonargparse.typing import register_type

    register_type(ConfigFile, _content_or_path)


def read_config(source: Any, *, presets: Collection[str], name: str = "config_list") -> Any:
    """Read a config from wherever it is and return dicts with string keys, lists and scalars, or a preset's name.

    Args:
        source: a list or dict of any kind (Hydra's ListConfig and DictConfig too; tuples become lists), a name out of
            `presets`, or the path of a .yaml, .yml or .json file that holds one of these.
        presets: the names that are returned as they are.
        name: the argument's name, for error texts.

    Raises:
        ConfigError: if a file is missing or cannot be read, or if a container cannot give one of its values.
    """
    if isinstance(source, str | os.PathLike):
        if str(source) in presets:
            return str(source)
        _refuse_inline(source, name)
        path = Path(source).expanduser()
        _check_file(path, str(source), presets, name)
        return _checked(_file_content(path, name), path, presets, name)
    return _plain(source, name)


# -- containers -------------------------------------------------------------------------------------------------------


def _plain(value: Any, where: str, around: tuple[int, ...] = ()) -> Any:
    """Nested mappings and sequences as dicts and lists: what a checkpoint and YAML hold. `around`: ids of what holds `value`."""
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Mapping | Sequence):
        return value
    if id(value) in around:
        raise ConfigError(f"{where}: this {type(value).__name__} contains itself; write out what is meant.")
    found = [(key, _plain(item, place, (*around, id(value)))) for key, item, place in _items(value, where)]
    return {str(key): item for key, item in found} if isinstance(value, Mapping) else [item for _, item in found]


def _items(container: Any, where: str) -> list[tuple[Any, Any, str]]:
    """(key or index, value, place) of everything in `container`; an OmegaConf one resolves interpolations as it is read."""
    found: list[tuple[Any, Any, str]] = []
    place = where
    try:
        for key in container if isinstance(container, Mapping) else range(len(container)):
            place = f"{where}[{key!r}]"
            found.append((key, container[key], place))
    except Exception as error:
        what = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{place}: cannot be read from its {type(container).__name__}: {type(error).__name__}: {what}; give the value, or "
            "what the interpolation refers to."
        ) from error
    return found


# -- files ------------------------------------------------------------------------------------------------------------


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _refuse_inline(source: Any, name: str) -> None:
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith(("[", "{", "- "))):
        begin = source.strip().splitlines()[0] if source.strip() else source
        raise ConfigError(
            f"{name}: expected a list, a dict, a preset or a path, got text that begins with {begin[:40]!r}; give the list "
            "itself: in YAML without quotes and without a block sign (| or >), in Python as an object."
        )


def _check_file(path: Path, written: str, presets: Collection[str], name: str) -> None:
    folder = Path(os.path.abspath(path.parent))
    if not (written and os.path.exists(path)):
        near = closest(path.name, [*presets, *_config_files(folder)], 1)
        meant = near and (near[0] if near[0] in presets else os.path.join(os.path.dirname(written), near[0]))
        hint = f" Did you mean {meant!r}?" if meant else ""
        what = f"neither a preset ({', '.join(presets)}) nor a file" if presets else "not a file"
        gone = "" if folder.is_dir() else ", which does not exist"
        raise ConfigError(f"{name}: {written!r} is {what}; looked in {folder}{gone}.{hint}")
    if os.path.isdir(path):
        files = _config_files(path)
        inside = f"such as {files[0]!r} in it" if files else f"but it holds no {_or(_SUFFIXES)} file"
        raise ConfigError(f"{name}: {written!r} is a folder ({os.path.abspath(path)}); give the path of a file, {inside}.")
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{name}: {written!r} ends in {path.suffix!r}; a config file ends in {_or(_SUFFIXES)}.")


def _config_files(folder: Path) -> list[str]:
    with suppress(OSError):
        return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    return []


def _checked(content: Any, path: Path, presets: Collection[str], name: str) -> Any:
    if isinstance(content, dict | list) or (isinstance(content, str) and content in presets):
        return content
    known = f", or a preset's name ({', '.join(presets)})" if presets else ""
    near = closest(content, presets, 1) if isinstance(content, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    found = "is empty" if content is None else f"holds {content!r}"
    raise ConfigError(f"{name}: {path} {found}; a config file holds a list or a dict{known}.{hint}")


def _file_content(path: Path, name: str) -> Any:
    """What a YAML or JSON file holds, as plain data."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: {path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8.") from error
    try:
        if path.suffix.lower() in _YAML:
            return _plain(yaml.load(text, _StrictLoader), name)
        return _plain(json.loads(text, object_pairs_hook=_strict_object), name) if text.strip() else None
    except yaml.MarkedYAMLError as error:
        begin = f"{error.context}{_at(error.context_mark)}: " if error.context else ""
        raise ConfigError(f"{name}: {path}{_at(error.problem_mark)}: {begin}{error.problem}; correct the YAML.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: {path}, line {error.lineno}, column {error.colno}: {error.msg}; correct the JSON.") from error
    except _DuplicateKeyError as error:
        raise ConfigError(f"{name}: {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # what is no character, what looks like a date and is none
        raise ConfigError(f"{name}: {path}: {str(error).splitlines()[0]}; correct the file.") from error


def _at(mark: Any) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


# -- equal keys: both parsers would keep the last and say nothing -----------------------------------------------------


class _DuplicateKeyError(Exception):
    pass


def _strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _DuplicateKeyError(
            f"the key {twice!r} stands twice in the object with the keys {', '.join(found)}; remove one of the two."
        )
    return found


class _StrictLoader(yaml.SafeLoader):
    # While nodes are composed the merge key (<<) has not been followed yet, so overriding a merged key is no repetition.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = f"the key {key.value!r} stands twice in one mapping, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node
