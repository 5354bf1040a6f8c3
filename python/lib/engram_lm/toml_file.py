"""TOML files of configurations: a file may be based on another, of which it states the differences alone.

    base = "moe-27b.toml"           # beside this file
    remove = ["train.schedule"]     # keys of the base that do not hold here

    [model.experts]
    routed = 55

Tables are merged key by key; anything else, and a table of another `kind`, replaces what the base has.
"""

import tomllib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

Table = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be used: the key, and why."""


class Source:
    """What a configuration was read from: a file, then its base, then the base of that."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """Reads the file at `path` and all that it is based on.

        Raises `OSError` if one cannot be read, `ConfigError` if one is no TOML, or is based on itself.
        """
        self.files: list[tuple[Path, Table]] = []
        removed: list[list[str]] = []
        here: Path | None = Path(path)
        while here is not None:
            if any(here.exists() and seen.exists() and seen.samefile(here) for seen, _ in self.files):
                raise ConfigError(f"{self.files[-1][0]}: `base`: {here} is based on itself")
            table = _parse(here)
            base, remove = _take_base(here, table)
            self.files.append((here, table))
            removed.append(remove)
            here = None if base is None else here.parent / base
        self.document: Table = {}
        for (file, table), remove in zip(reversed(self.files), reversed(removed), strict=True):
            for key in remove:
                if not _take(self.document, key):
                    raise ConfigError(f"{file}: `remove`: the base has no key `{key}`")
            _merge(self.document, table)

    def error(self, key: str, problem: str) -> ConfigError:
        """An error at the dotted `key`: in the first file that has it, or most of the way to it."""
        deepest = max(range(len(self.files)), key=lambda index: (_depth(self.files[index][1], key), -index))
        return ConfigError(f"{self.files[deepest][0]}: {problem}")


def to_toml(document: Table) -> str:
    """The tables as TOML."""
    return "\n".join(_lines(document, ())).lstrip("\n") + "\n"


def value_to_toml(value: Any) -> str:
    """A value as it stands behind a key."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        control = {character: f"\\u{ord(character):04x}" for character in map(chr, range(32)) if character in value}
        for character, escape in control.items():
            escaped = escaped.replace(character, escape)
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(map(value_to_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {value_to_toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, float):
        text = repr(value)
        return text if any(c in text for c in ".en") else f"{text}.0"
    return str(value)


def _parse(path: Path) -> Table:
    with path.open("rb") as file:
        try:
            return tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}") from None


def _take_base(path: Path, table: Table) -> tuple[str | None, list[str]]:
    """Takes out of `table` the file that it is based on, and the keys of that which do not hold."""
    base = table.pop("base", None)
    if base is None:
        return None, []
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base`: must be the path of a file")
    remove = table.pop("remove", [])
    if not (isinstance(remove, list) and all(isinstance(key, str) for key in remove)):
        raise ConfigError(f'{path}: `remove`: must be a list of dotted keys, such as ["model.memory"]')
    return base, remove


def _take(table: Table, key: str) -> bool:
    """Removes the dotted `key`; whether it was there."""
    first, dot, rest = key.partition(".")
    if not dot:
        return table.pop(first, None) is not None
    inner = table.get(first)
    return isinstance(inner, dict) and _take(inner, rest)


def _merge(table: Table, over: Table) -> None:
    """Lays `over` on `table`."""
    for key, value in over.items():
        below = table.get(key)
        if (
            isinstance(below, dict)
            and isinstance(value, dict)
            and value.get("kind", below.get("kind")) == below.get("kind")
        ):
            _merge(below, value)
        else:
            table[key] = _copy(value)


def _copy(value: Any) -> Any:
    """Tables of their own, so that what is merged into them changes no file's."""
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _depth(table: Any, key: str) -> int:
    """How many parts of the dotted `key` the table has."""
    depth = 0
    for part in key.split("."):
        if not (isinstance(table, dict) and part in table):
            break
        depth, table = depth + 1, table[part]
    return depth


def _lines(table: Table, path: tuple[str, ...]) -> Iterator[str]:
    simple = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if path and (simple or not table):
        yield f"\n[{'.'.join(path)}]"
    for key, value in simple.items():
        yield f"{key} = {value_to_toml(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _lines(value, (*path, key))
