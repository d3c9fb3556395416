"""Settings of another trainer on their way to options: what each became is recorded. Pure Python."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config.parse import nearest
from engine.errors import ConfigError

Kind = Literal["became", "implied", "no counterpart"]
_LARGEST = 2**20
_DEEPEST = 20
_LONGEST = 80


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, and what it is here."""

    name: str
    value: Any
    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """A value for an option, and the setting that asks for it."""

    option: str
    value: Any
    by: str
    default: bool = False
    """A default of the other trainer, which an option that was given overrides."""


@dataclass(kw_only=True)
class Adoption:
    """What one source, a file or a flag, asks for."""

    source: str
    settings: list[Setting] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    offloads_optimizer: str | None = None
    """The setting that wants optimizer states in CPU memory."""

    def became(self, name: str, value: Any, option: str, wanted: Any, *, default: bool = False) -> None:
        """An option gets a value. Raises ConfigError where another setting asked for another one."""
        earlier = self.requests.get(option)
        if earlier is not None and not same(earlier.value, wanted):
            raise ConfigError(
                f"{self.source}: {name} {show(value)} contradicts {earlier.by}: {option} cannot be both "
                f"{show(wanted)} and {show(earlier.value)}"
            )
        by = f"{name} {show(value)}"
        self.requests[option] = Request(option=option, value=wanted, by=by, default=default)
        self.settings.append(Setting(name=name, value=value, kind="became", text=f"{option} {show(wanted)}"))

    def note(self, name: str, value: Any, kind: Kind, text: str) -> None:
        """A setting that changes no option."""
        self.settings.append(Setting(name=name, value=value, kind=kind, text=text))

    def refuse(self, name: str, value: Any, why: str) -> ConfigError:
        """The error for a setting that would change what is trained."""
        return ConfigError(f"{self.source}: {name} {show(value)}: {why}")

    def table(self) -> str:
        """All settings by what they became, for people."""
        lines = [f"settings of {self.source}:"]
        width = max((len(f"{s.name} {show(s.value)}") for s in self.settings), default=0)
        for kind in ("became", "implied", "no counterpart"):
            of_kind = [setting for setting in self.settings if setting.kind == kind]
            lines += [f"  {kind}"] if of_kind else []
            lines += [f"    {f'{s.name} {show(s.value)}':{min(width, 60)}}  {s.text}" for s in of_kind]
        return "\n".join(lines)


def same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same; 1 is 1.0, but true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def show(value: Any) -> str:
    """A value as people write it in JSON, on one line that is not too long."""
    plain = isinstance(value, str) and value.isprintable() and value
    text = value if plain else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def read_json(text_or_path: str, flag: str) -> dict[str, Any]:
    """The object in a JSON file, or in the text itself. Raises ConfigError."""
    text, source = text_or_path, flag
    if not text_or_path.lstrip().startswith("{"):
        source = f"{flag} {text_or_path}"
        try:
            path = Path(text_or_path)
            if path.is_file() and path.stat().st_size > _LARGEST:
                raise ConfigError(f"{source} has {path.stat().st_size:,} bytes; that is no configuration")
            if path.exists() and not path.is_file():
                raise ConfigError(f"{source} is not a file; pass a JSON file")
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"{source} cannot be read: {reason}") from None
        except ValueError:  # a NUL in the path
            raise ConfigError(f"{source} is not the name of a file") from None
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ConfigError(f"{source} is not JSON: {' '.join(reason.split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold a JSON object of settings, not {show(content)}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for place, (name, _) in enumerate(pairs):
        if any(name == other for other, _ in pairs[:place]):
            raise ValueError(f"{name!r} stands in it twice")
    return dict(pairs)


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def flat_settings(
    content: Mapping[str, Any], whole: Collection[str], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Settings by dotted name; objects in `whole` are not taken apart."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in whole and depth < _DEEPEST:
            yield from flat_settings(value, whole, f"{name}.", depth + 1)
        else:
            yield name, value


def nearest_name(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?`, or nothing where nothing is near."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def typed(adoption: Adoption, name: str, value: Any, kind: type) -> Any:
    """`value` as bool, int, float or str, or a ConfigError. A whole number may be written 5e8."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if kind is float and number:
        return float(value)
    if kind is int and number and value == int(value):
        return int(value)
    if isinstance(value, kind) and kind in (bool, str):
        return value
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise ConfigError(f"{adoption.source}: {name} must be {words[kind]}, not {show(value)}")
