"""What a LoRA adapter is, as PEFT describes it: which projections, of which rank and scale. Pure data, no
torch.

The words and their meaning are those of PEFT's LoraConfig, so that an `adapter_config.json` from elsewhere
says here what it says there. What Braid has not proven equal to PEFT is refused by name.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.options import LoraOptions
from engine.errors import ConfigError, ModelError
from engine.model.projections import Projection, projections
from engine.model.spec import ModelSpec

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
CHECKPOINT_PREFIX = "adapter."
"""Keys of adapters in a checkpoint start with this, those of a whole model do not."""

# Modules of the model that a careless regular expression takes in, and PEFT then adapts or stumbles over.
_OTHER_MODULES = (
    "lm_head",
    "model",
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.0.self_attn",
    "model.layers.0.mlp",
    "model.layers.0.input_layernorm",
)
_ROUTERS = ("mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert", "mlp.experts")
"""The same in a layer with experts, a router first."""
_REGEX_SIGNS = frozenset("\\^$*+?{}[]()|")
_ANY_NUMBERED = r".*?\.[^.]*\.(?P<idx>\d+)\."
# The modules that tied embeddings make one, by the end of their name.
_EMBEDDINGS = ("embed_tokens", "lm_head")

# Entries of adapter_config.json that Braid reads, or that change nothing about what an adapter computes.
_READ = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying",
    "target_parameters",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version",
    "task_type", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
})  # fmt: skip
# Initialisations that leave the base as it is; PiSSA, OLoRA and others train against a changed base.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The adapter of one projection: W + scaling * B A, with A [rank, in] and B [out, rank]."""

    rank: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """A LoRA configuration. Fields have PEFT's names and meaning."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """A tuple of names (or ends of names), a regular expression for whole names, or `all-linear`: every
    linear but routers and the LM head, and without `target_parameters` the experts' too.
    """

    target_parameters: tuple[str, ...] = ()
    """Ends of names of parameters that hold the matrices of all experts of a layer."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, 2023)."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    """Ends of names of modules that are stored whole, and have no low-rank adapter. Not for training."""

    ensure_weight_tying: bool = False
    """Where embeddings are tied and one of them is stored whole, both are, as one."""

    def at(self, place: Projection) -> LowRank | None:
        """The adapter of a projection; None where it has none."""
        module = place.module
        if place.parameter:
            # PEFT's exclusions and layer numbers are for modules.
            if not self._targets_parameter(module):
                return None
        elif (
            _named(self.exclude_modules, module) or self._kept_for_saving(module) or not self._targets(module)
        ):
            return None
        rank = int(_by_pattern(self.rank_pattern, module, self.r))
        alpha = float(_by_pattern(self.alpha_pattern, module, self.lora_alpha))
        # A rank below one has no scale; check() refuses it.
        scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank) if rank > 0 else 0.0
        return LowRank(rank=rank, scaling=scaling)

    def _kept_for_saving(self, module: str) -> bool:
        """Whether PEFT leaves the module to modules_to_save. Here a name is whole parts of a module's name,
        unlike in `saved_modules`, and an expression.
        """
        return any(re.match(_anywhere(name), module) for name in self.modules_to_save)

    def saved_modules(self, spec: ModelSpec, modules: Collection[str]) -> list[str]:
        """Those of `modules`, which are all of the model that have weights, that are stored whole. As in PEFT
        a name is any end of a module's name, be it within a word. Raises ConfigError for a name that means no
        module, and where one module would be stored twice, or with a low-rank adapter in it.
        """
        for name in self.modules_to_save:
            if not any(module.endswith(name) for module in modules):
                raise ConfigError(
                    f"modules_to_save: {name!r} is none of the model's modules with weights, such as "
                    f"{', '.join(_EMBEDDINGS)}, norm or down_proj"
                )
        names = self.modules_to_save
        embeddings = any(name.rpartition(".")[2] in _EMBEDDINGS for name in names)
        if self.ensure_weight_tying and spec.tied_embeddings and embeddings:
            names += _EMBEDDINGS
        saved = [module for module in modules if module.endswith(names)]
        outer = set(saved)
        for module in saved:
            if within := outer.intersection(enclosing_modules(module)):
                raise ConfigError(
                    f"modules_to_save: {module} would be stored once more in {min(within)}; name one of them"
                )
        for place, _ in self.targets(spec):
            module = place.module
            if within := outer.intersection((module, *enclosing_modules(module))):
                raise ConfigError(
                    f"modules_to_save: {min(within)} has the low-rank adapter of {module} in it; name it in "
                    f"whole parts of its name, or take {place.name} out of target_modules"
                )
        return saved

    def _targets(self, module: str) -> bool:
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or _named(self.target_modules, module)
        if module in self.target_modules:
            return True
        # As in PEFT, layer numbers limit only the names that are given by their end.
        return _named(self.target_modules, module) and self._in_layers(module)

    def _targets_parameter(self, parameter: str) -> bool:
        if not self.target_parameters:
            return self.target_modules == ALL_LINEAR
        return _named(self.target_parameters, parameter)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [_numbered(pattern) for pattern in self.layers_pattern] or [_ANY_NUMBERED]
        found = next((m for pattern in patterns if (m := re.match(pattern, module))), None)
        return found is not None and int(found["idx"]) in self.layers_to_transform

    def targets(self, spec: ModelSpec) -> Iterator[tuple[Projection, LowRank]]:
        """Every adapter, in the model's order."""
        for layer in range(spec.num_layers):
            for place in projections(spec, layer):
                shape = self.at(place)
                if shape is not None:
                    yield place, shape

    def adapts_parameters(self, spec: ModelSpec) -> bool:
        """Whether any of the adapters is of a parameter, and so knows no dropout."""
        return any(place.parameter for place, _ in self.targets(spec))

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError unless every part of the description fits the model."""
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        if not 0 < self.lora_alpha < math.inf:
            raise ConfigError(f"lora_alpha must be positive, not {self.lora_alpha}")
        self._check_names(spec)
        for place, shape in self.targets(spec):
            if shape.rank < 1 or not 0 < shape.scaling < math.inf:
                raise ConfigError(
                    f"lora_rank and lora_alpha must be at least 1, not rank {shape.rank} and scale "
                    f"{shape.scaling:g} at {place.module}"
                )
            if place.parameter and self.lora_dropout:
                whose = "experts" if place.experts else "dense layers beside experts"
                raise ConfigError(
                    f"lora_dropout {self.lora_dropout}: adapters of {whose} know no dropout, in PEFT either; "
                    f"set it to 0, or leave them out by target_modules without {ALL_LINEAR}"
                )
        if not any(True for _ in self.targets(spec)):
            raise ConfigError("target_modules: no linear of the model is left; name at least one")

    def _check_names(self, spec: ModelSpec) -> None:
        """Raise ConfigError for a name that means none of the projections, or more than those."""
        places = [place for layer in range(spec.num_layers) for place in projections(spec, layer)]
        modules = [place.module for place in places if not place.parameter]
        names = ", ".join(dict.fromkeys(place.name for place in places if not place.parameter))
        parameters = list(dict.fromkeys(place.parameter_name for place in places if place.parameter))
        wanted: list[str | tuple[str, ...]] = [(name,) for name in self.target_modules]
        if isinstance(self.target_modules, str):
            wanted = [] if self.target_modules == ALL_LINEAR else [self.target_modules]
        routers = [f"model.layers.{i}.{name}" for i in range(spec.num_layers) for name in _ROUTERS]
        others = [*_OTHER_MODULES, *(routers if spec.moe is not None else [])]
        for pattern in wanted:
            name = pattern if isinstance(pattern, str) else pattern[0]
            if not any(_named(pattern, module) for module in modules):
                experts = " (experts are target_parameters)" if parameters else ""
                raise ConfigError(
                    f"target_modules: {name!r} is none of the linears that LoRA can be in{experts}; choose "
                    f"from {names}, a regular expression for whole names such as {modules[0]}, or "
                    f"{ALL_LINEAR}"
                )
            outside = [m for m in others if _named(pattern, m) and not _named(self.exclude_modules, m)]
            if outside:
                raise ConfigError(
                    f"target_modules: {name!r} takes in {outside[0]} too, which LoRA cannot be in here; "
                    f"name only {names}"
                )
        for name in self.target_parameters:
            named = any(place.parameter and _named((name,), place.module) for place in places)
            if name == "weight" or not named:  # all weights end so, those of norms too
                what = "the model has no experts: leave it out"
                if parameters:
                    what = f"choose from {', '.join(parameters[:-1])} and {parameters[-1]}"
                raise ConfigError(f"target_parameters: {name!r} is no parameter of experts; {what}")
        for what, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(_fits(pattern, place.module) for place in places):
                    raise ConfigError(f"{what}: {pattern!r} is none of the linears that LoRA can be in")

    def num_parameters(self, spec: ModelSpec, *, active: bool = False) -> int:
        """Elements of all A and B; with `active` those that work on one token."""
        experts = spec.moe.top_k if active and spec.moe is not None else None
        return sum(place.num_parameters(shape.rank, experts) for place, shape in self.targets(spec))

    def to_config(self, base_model: str, spec: ModelSpec) -> dict[str, Any]:
        """The content of an `adapter_config.json` that PEFT reads. `all-linear` becomes the names it stands
        for, because readers such as vLLM do not know the word.
        """
        names = self.target_modules
        target: Any = names if isinstance(names, str) else sorted(names)
        parameters = sorted(self.target_parameters)
        if names == ALL_LINEAR:
            places = [place for layer in range(spec.num_layers) for place in projections(spec, layer)]
            target = sorted({place.name for place in places if not place.parameter})
            if not parameters:
                parameters = sorted({place.parameter_name for place in places if place.parameter})
        return {
            "alpha_pattern": {name: _whole(value) for name, value in self.alpha_pattern.items()},
            "base_model_name_or_path": base_model,
            "bias": "none",
            "exclude_modules": _as_json(self.exclude_modules),
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": _as_json(self.layers_pattern),
            "layers_to_transform": _as_json(self.layers_to_transform),
            "lora_alpha": _whole(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": _as_json(self.modules_to_save),
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": target,
            # Not every reader of the file knows this one, nor the last.
            **({"target_parameters": parameters} if parameters else {}),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.use_rslora,
            **({"ensure_weight_tying": True} if self.ensure_weight_tying else {}),
        }

    def summary(self, spec: ModelSpec) -> str:
        """One line for the terminal."""
        names = self.target_modules if isinstance(self.target_modules, str) else ",".join(self.target_modules)
        names = ",".join((names, *self.target_parameters))
        count, total = self.num_parameters(spec), spec.num_parameters()
        return (
            f"LoRA: rank {self.r}, alpha {self.lora_alpha:g}, dropout {self.lora_dropout:g}, {names}: "
            f"{count / 1e6:,.3f} M trainable parameters ({100 * count / total:.2f} % of the base)"
        )


def enclosing_modules(name: str) -> list[str]:
    """The modules that the module or tensor `name` lies in, from the outermost on."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def adapter_name(layer: int, parameter: str) -> str:
    """Name in checkpoints of e.g. `mlp.linear_fc2.down_proj_lora_A` in a decoder layer (global index)."""
    return f"{CHECKPOINT_PREFIX}layers.{layer}.{parameter}"


def saved_name(tensor: str) -> str:
    """Name in checkpoints of a tensor of a module that is stored whole, such as `model.norm.weight`."""
    return f"{CHECKPOINT_PREFIX}modules_to_save.{tensor}"


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """A string is a regular expression for the whole name; a tuple holds names or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if _fits(pattern, module):
            return value
    return default


def _fits(pattern: str, module: str) -> bool:
    """As PEFT reads the keys of a pattern: the whole name, or an end of it behind a dot."""
    return re.match(_at_end(pattern), module) is not None


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _numbered(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."  # a pattern may have groups of its own


def _anywhere(name: str) -> str:
    return rf"(^|.*\.){name}($|\..*)"


def _whole(value: float) -> int | float:
    """16 rather than 16.0: some readers of the file insist on a whole number."""
    return int(value) if value == int(value) else value


def _as_json(value: Any) -> Any:
    return (value if isinstance(value, str) else list(value)) if value else None


def lora_from_options(options: LoraOptions) -> LoraSpec:
    """The adapter that the flags describe. Raises ConfigError."""
    words = [word for value in options.target_modules for word in _split(value)]
    one = words[0] if len(words) == 1 else None
    target: str | tuple[str, ...] = tuple(sorted(set(words)))  # as read_lora_config has them
    if one is not None and (one.lower() == ALL_LINEAR or _REGEX_SIGNS & set(one)):
        target = ALL_LINEAR if one.lower() == ALL_LINEAR else one
    elif ALL_LINEAR in map(str.lower, words):
        raise ConfigError(f"target_modules: {ALL_LINEAR} stands alone, not beside other names")
    if options.lora_rank < 1:
        raise ConfigError(f"lora_rank must be at least 1, not {options.lora_rank}")
    return _compiled(
        LoraSpec(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=target,
            target_parameters=tuple(sorted({name for v in options.target_parameters for name in _split(v)})),
            use_rslora=options.use_rslora,
            rank_pattern=options.rank_pattern,
            alpha_pattern=options.alpha_pattern,
        ),
        "",
    )


def _split(word: str) -> list[str]:
    """Commas separate names; a regular expression may have its own."""
    return [word] if _REGEX_SIGNS & set(word) else [part for part in word.replace(",", " ").split() if part]


def _compiled(lora: LoraSpec, where: str) -> LoraSpec:
    """`lora`, if all of its regular expressions are. Raises ConfigError.

    Tried as PEFT uses them, within its own: `(?i)q_proj` alone would compile.
    """
    parts = [(part, _at_end(part)) for part in (*lora.rank_pattern, *lora.alpha_pattern)]
    parts += [(part, _numbered(part)) for part in lora.layers_pattern]
    parts += [(name, _anywhere(name)) for name in lora.modules_to_save]
    parts += [
        (value, value) for value in (lora.target_modules, lora.exclude_modules) if isinstance(value, str)
    ]
    for part, expression in parts:
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(f"{where}{part!r} is not a regular expression ({error})") from None
    return lora


def read_lora_config(directory: Path) -> LoraSpec:
    """The adapter that a PEFT directory describes. Raises ModelError if `adapter_config.json` is missing,
    malformed, or asks for something that is not supported.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"adapter {directory} has no {CONFIG_FILE}; pass a directory that PEFT saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    _refuse_unsupported(config, path)
    try:
        return _compiled(_lora_from_config(config), f"{path}: ")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is malformed: {type(error).__name__} {error}") from None
    except ConfigError as error:
        raise ModelError(str(error)) from None


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA is")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(f"{path}: task_type {config['task_type']!r} is not supported, only CAUSAL_LM is")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias {config['bias']!r} is not supported, only 'none' is")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise ModelError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} trains against a changed base and "
            f"is not supported; convert the adapter to plain LoRA with PEFT first"
        )
    known = _READ | _WITHOUT_EFFECT | {"bias", "init_lora_weights"}
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}):
            what = {"use_dora": "DoRA"}.get(name, f"{name} {value!r}")
            raise ModelError(f"{path}: {what} is not supported; train a plain LoRA adapter")


def _lora_from_config(config: Mapping[str, Any]) -> LoraSpec:
    def names(value: Any) -> str | tuple[str, ...]:
        return value if isinstance(value, str) else tuple(str(item) for item in value or ())

    target = names(config["target_modules"])
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        target = ALL_LINEAR
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    saved = config.get("modules_to_save") or ()
    if not isinstance(saved, (list, tuple)) or not all(isinstance(name, str) for name in saved):
        raise TypeError("modules_to_save must be a list of names")
    return LoraSpec(
        r=int(config["r"]),
        lora_alpha=float(config["lora_alpha"]),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=target if isinstance(target, str) else tuple(sorted(target)),
        target_parameters=tuple(sorted(str(name) for name in config.get("target_parameters") or ())),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
        alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        exclude_modules=names(config.get("exclude_modules")),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(int(i) for i in layers or ()),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
        modules_to_save=tuple(saved),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
    )
