"""YAML file + flags -> option dataclasses, and back to a flat mapping.

Both sources go through one table of options and one conversion, so that a YAML key and a flag always mean the
same. Later sources win: defaults < YAML file < environment < flags.
"""

import ast
import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import ConfigError

Config = TypeVar("Config")

# Names people know from Megatron-SWIFT and Megatron-LM -> the option that carries the meaning here.
ALIASES: Mapping[str, str] = {
    "micro_batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "lr_warmup_fraction": "warmup_ratio",
    "tuner_type": "train_type",
    "clip_grad": "max_grad_norm",
    "lr_decay_style": "lr_scheduler_type",
    "adapters": "adapter",
    "dequantize": "dequantise",
}
# Options of the contract whose feature does not exist yet: refused by name instead of called unknown.
NOT_BUILT: Mapping[str, str] = {
    "use_dora": "DoRA",
    "quant_method": "a quantised base (QLoRA)",
    "quant_bits": "a quantised base (QLoRA)",
    "load_in_4bit": "a quantised base (QLoRA)",
    "load_in_8bit": "a quantised base (QLoRA)",
    "modules_to_save": "training whole modules beside LoRA",
    "init_weights": "another initialisation of LoRA",
    "init_lora_weights": "another initialisation of LoRA",
    "lora_bias": "bias in LoRA",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag: its name, the group (attribute of the config) it lives in, its type and default, and the
    dataclass that has it as a field.
    """

    name: str
    group: str | None
    annotation: Any
    default: Any
    owner: type

    @property
    def help(self) -> str:
        """The text under the field."""
        return _field_docs(self.owner).get(self.name, "")


def options_of(config_type: Any) -> Mapping[str, Option]:
    """All options of a config by flag name. Its fields are option groups (dataclasses), or options
    themselves; the names in its `left_out`, if it has that, keep their defaults and are no flags.
    `group.name` leaves out that group's, where another has an option of the same name.
    """
    return _options_of(config_type)


@cache  # a function of its own, since type checkers want what a cached one is called with to be hashable
def _options_of(config_type: Any) -> Mapping[str, Option]:
    left_out = getattr(config_type, "left_out", ())
    default, hints = config_type(), typing.get_type_hints(config_type)
    found: dict[str, Option] = {}
    for item in fields(config_type):
        value = getattr(default, item.name)
        if is_dataclass(value):
            for option in options_of(type(value)).values():
                if f"{item.name}.{option.name}" in left_out:
                    continue
                found[option.name] = replace(option, group=item.name)
        else:
            found[item.name] = Option(
                name=item.name, group=None, annotation=hints[item.name], default=value, owner=config_type
            )
    return types.MappingProxyType({name: option for name, option in found.items() if name not in left_out})


def parse(
    config_type: type[Config], argv: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[Config, set[str]]:
    """Build a config from command-line words (`--config FILE` names the YAML file).

    Returns the config and the names of the options that were set by anyone. `environment` maps option names
    to strings. Raises ConfigError for an unknown, repeated-with-alias or unconvertible option.
    """
    flags = read_flags(argv, options_of(config_type))
    values: dict[str, Any] = {}
    config_file = flags.pop("config", None)
    if config_file is not None:
        if not isinstance(config_file, str):
            raise ConfigError("--config takes one YAML file; pass --config FILE.yaml")
        values = _resolve_names(_read_yaml(config_file), options_of(config_type), where=config_file)
    values |= {name: value for name, value in (environment or {}).items() if value}
    values |= _resolve_names(flags, options_of(config_type), where="command line", prefix="--")
    return build(config_type, values), set(values)


def build(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from flat option values (strings are converted). Raises ConfigError."""
    table, config = options_of(config_type), config_type()
    for name, value in values.items():
        option = table[name]
        target = getattr(config, option.group) if option.group else config
        setattr(target, name, convert(name, value, option.annotation))
    return config


def flatten(config: Any) -> dict[str, Any]:
    """The flat option values of a config, in order of declaration."""
    flat = {}
    for option in options_of(type(config)).values():
        flat[option.name] = getattr(getattr(config, option.group) if option.group else config, option.name)
    return flat


def read_flags(argv: Sequence[str], table: Mapping[str, Option]) -> dict[str, Any]:
    """`--name value`, `--name=value`, bare `--name` for switches, several values for lists. Raises
    ConfigError.
    """
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; flags start with --")
        name, has_value, value = word[2:].partition("=")
        name = name.replace("-", "_")
        given = [value] if has_value else []
        while not has_value and words and not (words[0].startswith("--") and len(words[0]) > 2):
            given.append(words.pop(0))
        option = table.get(ALIASES.get(name, name))
        if option is not None and _takes_list(option.annotation):
            flags.setdefault(name, []).extend(given)
        elif len(given) > 1:
            raise ConfigError(f"--{name} takes one value, not {len(given)}: {' '.join(given)}")
        else:
            flags[name] = given[0] if given else True
    return flags


def _takes_list(annotation: Any) -> bool:
    """For `list[...]` and `list[...] | None`."""
    return any(typing.get_origin(a) is list for a in (annotation, *typing.get_args(annotation)))


def convert(name: str, value: Any, annotation: Any) -> Any:
    """`value` (a string, or what YAML made of it) as the annotated type. Raises ConfigError naming the
    option.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return convert(name, value, next(a for a in arguments if a is not type(None)))
    if origin is list:
        if value is None:
            raise ConfigError(f"{name} needs at least one value; give it one or leave it out")
        items = value if isinstance(value, list) else [value]
        return [convert(name, item, arguments[0]) for item in items]
    if origin is dict:
        return _to_mapping(name, value, arguments[1])
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{name} must be one of {', '.join(map(str, arguments))}, not {value!r}")
    return _convert_scalar(name, value, annotation)


def _convert_scalar(name: str, value: Any, annotation: Any) -> Any:
    if annotation is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    if value is None or isinstance(value, bool | dict | list):
        raise ConfigError(f"{name} needs a value of type {annotation.__name__}, not {value!r}")
    if annotation is str:
        return str(value)
    converters: dict[type, Callable[[Any], Any]] = {int: _to_int, float: _to_float}
    try:
        return converters[annotation](value)
    except (ValueError, OverflowError):
        kind = {"int": "a whole number", "float": "a number"}[annotation.__name__]
        raise ConfigError(f"{name} must be {kind}, not {value!r}") from None


def _to_mapping(name: str, value: Any, annotation: Any) -> dict[str, Any]:
    """A YAML mapping, or JSON on the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ConfigError(
                f'{name} must be a JSON object such as {{"q_proj": 16}}, not {value!r}'
            ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must map names to values, not {value!r}")
    return {str(key): convert(f"{name} of {key}", item, annotation) for key, item in value.items()}


def _to_int(value: Any) -> int:
    number = float(value) if not isinstance(value, int) else value
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)


def _to_float(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def nearest(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that `name` may have been meant to be."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def _resolve_names(
    values: Mapping[str, Any], table: Mapping[str, Option], *, where: str, prefix: str = ""
) -> dict[str, Any]:
    resolved: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name in NOT_BUILT and name not in table:
            if value in (False, "false"):
                continue
            raise ConfigError(f"{prefix}{given}: {NOT_BUILT[name]} is not available in this version")
        if name not in table:
            aliases = [alias for alias, meant in ALIASES.items() if meant in table]
            near = nearest(given, [*table, *aliases])
            hint = f"; did you mean {prefix}{near}?" if near else "; see --help for all options"
            raise ConfigError(f"{where}: unknown option {prefix}{given}{hint}")
        if name in resolved:
            first = spelling[name]
            raise ConfigError(
                f"{where}: {prefix}{first} and {prefix}{given} are the same option; give one of them"
            )
        resolved[name], spelling[name] = value, given
    return resolved


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold a mapping of options to values")
    return {str(name): value for name, value in content.items()}


@cache
def _field_docs(config_type: type) -> dict[str, str]:
    """The string literal under each field; Python drops these, so they are read from the source."""
    try:
        (tree,) = ast.parse(inspect.getsource(config_type)).body
    except (OSError, TypeError, ValueError):
        return {}
    docs, name = {}, None
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = " ".join(str(node.value.value).split())
    return docs


def help_text(config_type: type) -> str:
    """All options with type, default and help, grouped as the config groups them."""
    lines: list[str] = []
    group: str | None = "none yet"
    for option in options_of(config_type).values():
        if option.group != group:
            group = option.group
            lines.append(f"\n{group or 'options'}:")
        default = "" if option.default in (None, [], {}) else f" (default: {_show(option.default)})"
        lines.append(f"  --{option.name} {_type_name(option.annotation)}\n        {option.help}{default}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        if value in (True, False)
        else str(value)
    )


def _type_name(annotation: Any) -> str:
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is list:
        return f"{_type_name(arguments[0])} ..."
    if origin is dict:
        return f"{{NAME: {_type_name(arguments[1])}}}"
    return _type_name(arguments[0]) if arguments else str(annotation.__name__).upper()
