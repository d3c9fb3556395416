"""Where a Megatron checkpoint has the tensors of a model: canonical names <-> keys and indices.

Megatron stacks what is alike. Layers are stacked if all are of one kind:
`decoder.layers.3.mlp.linear_fc1.weight` is row 3 of the key `decoder.layers.mlp.linear_fc1.weight`, of global
shape [layers, ...]. Where some layers have experts and others have none, each layer has keys of its own.
The experts of a layer are stacked in either case: `decoder.layers.3.mlp.experts.linear_fc1.weight5` is number
[3, 5] of `decoder.layers.mlp.experts.experts.linear_fc1.weight`, [layers, experts, ...], or number 5 of
`decoder.layers.3.mlp.experts.experts.linear_fc1.weight`, [experts, ...].
"""

import re
from dataclasses import dataclass

from engine.model.spec import ModelSpec

_LAYER = re.compile(r"(.*\bdecoder\.layers)\.([0-9]{1,18})\.(.+)")
_EXPERT = re.compile(r"(.*\bmlp\.experts)\.(linear_fc[12]\.weight)([0-9]{1,18})")
_OF_LAYERS = re.compile(r"(.*\bdecoder\.layers)\.(\D.*)")
_OF_EXPERTS = re.compile(r"(.*\bmlp\.experts)\.experts\.(linear_fc[12]\.weight)")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A key of the checkpoint and, where it stacks tensors, the index of the one that is meant."""

    key: str
    layer: int | None = None
    """None: the key does not stack layers."""
    expert: int | None = None
    """None: it does not stack experts."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Index into the leading dimensions of the key."""
        return tuple(index for index in (self.layer, self.expert) if index is not None)

    @property
    def words(self) -> tuple[str, ...]:
        """What each index of `lead` is, as "layer 3"."""
        named = (("layer", self.layer), ("expert", self.expert))
        return tuple(f"{kind} {index}" for kind, index in named if index is not None)


def place_of(name: str, *, stacked: bool = True) -> Place:
    """The place of a canonical name; `stacked` is whether the layers are. Most other names are their own
    key.
    """
    key, layer, expert = name, None, None
    if match := _EXPERT.fullmatch(key):
        key, expert = f"{match[1]}.experts.{match[2]}", int(match[3])
    if stacked and (match := _LAYER.fullmatch(key)):
        key, layer = f"{match[1]}.{match[3]}", int(match[2])
    return Place(key=key, layer=layer, expert=expert)


def stacked_axes(key: str) -> tuple[bool, bool]:
    """Whether a key stacks layers, and whether experts; the dimensions of either come first, in that
    order.
    """
    return _OF_LAYERS.fullmatch(key) is not None, _OF_EXPERTS.fullmatch(key) is not None


def name_at(key: str, lead: tuple[int, ...]) -> str:
    """The canonical name of what is at `lead` in a key: the inverse of `place_of`."""
    name, rest = key, list(lead)
    if match := _OF_LAYERS.fullmatch(name):
        name = f"{match[1]}.{rest.pop(0)}.{match[2]}"
    if match := _OF_EXPERTS.fullmatch(name):
        name = f"{match[1]}.{match[2]}{rest.pop(0)}"
    assert not rest, f"{lead} in {key}"
    return name


def stacks_layers(spec: ModelSpec) -> bool:
    """Whether Megatron stacks the layers of a model: not where some of them, or all, lack its experts."""
    return spec.moe is None or all(spec.moe.layers)
