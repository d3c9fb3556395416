"""The layouts that a machine is validated in, by its number of GPUs. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.options import OptimizerOptions, ParallelOptions
from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees, and what data-parallel ranks share; what is left of `ranks` is data parallelism."""

    name: str
    """Short, and fit for a directory."""

    ranks: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_comm_type: str | None = None
    ep: int = 1
    etp: int = 1
    sharding: str | None = None
    """A data_parallel_sharding_strategy; None is the default, the distributed optimizer."""

    experts: bool = False
    """Whether it is validated on a mixture of experts, or on dense models."""

    def options(self) -> dict[str, int | str]:
        """What differs from the defaults, as options of every command that trains."""
        values: dict[str, int | str | None] = {
            "tensor_model_parallel_size": self.tp if self.tp > 1 else None,
            "pipeline_model_parallel_size": self.pp if self.pp > 1 else None,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "context_parallel_size": self.cp if self.cp > 1 else None,
            "cp_comm_type": self.cp_comm_type,
            "expert_model_parallel_size": self.ep if self.ep > 1 else None,
            "expert_tensor_parallel_size": self.etp if self.etp > 1 else None,
            "data_parallel_sharding_strategy": self.sharding,
        }
        return {name: value for name, value in values.items() if value is not None}

    def words(self) -> list[str]:
        """The same as words of a command line."""
        return [word for name, value in self.options().items() for word in (f"--{name}", str(value))]

    def parallel(self) -> ParallelOptions:
        """The degrees."""
        options, names = self.options(), vars(ParallelOptions())
        return ParallelOptions(**{name: options[name] for name in names if name in options})  # type: ignore[arg-type]

    def optimizer(self, **values: float) -> OptimizerOptions:
        """Options of the optimizer under this layout."""
        options = OptimizerOptions(**values)  # type: ignore[arg-type]
        options.data_parallel_sharding_strategy = self.sharding  # type: ignore[assignment]
        return options


ZERO2, ZERO3 = "optim_grads", "optim_grads_params"
ONE = Layout(name="one", ranks=1)
"""What every layout is compared with."""

_LAYOUTS: Mapping[int, tuple[Layout, ...]] = {
    2: (
        Layout(name="TP2", ranks=2, tp=2),
        Layout(name="PP2", ranks=2, pp=2),
        Layout(name="PP2xVPP2", ranks=2, pp=2, vpp=2),
        Layout(name="CP2-all_gather", ranks=2, cp=2, cp_comm_type="all_gather"),
        Layout(name="CP2-a2a", ranks=2, cp=2, cp_comm_type="a2a"),
        Layout(name="DP2", ranks=2),
        Layout(name="ZeRO2xDP2", ranks=2, sharding=ZERO2),
        Layout(name="FSDP2", ranks=2, sharding=ZERO3),
        Layout(name="EP2", ranks=2, ep=2, experts=True),
        Layout(name="EP2xTP2", ranks=2, ep=2, tp=2, experts=True),
        # Two ranks hold no EP 2 x ETP 2.
        Layout(name="ETP2xTP2", ranks=2, etp=2, tp=2, experts=True),
    ),
    4: (
        Layout(name="TP4", ranks=4, tp=4),
        Layout(name="TP2xDP2", ranks=4, tp=2),
        Layout(name="TP2xPP2", ranks=4, tp=2, pp=2),
        Layout(name="PP2xVPP2xDP2", ranks=4, pp=2, vpp=2),
        Layout(name="CP2xTP2", ranks=4, cp=2, tp=2),
        Layout(name="CP4-a2a", ranks=4, cp=4, cp_comm_type="a2a"),
        Layout(name="DP4", ranks=4),
        Layout(name="FSDP4", ranks=4, sharding=ZERO3),
        Layout(name="EP4", ranks=4, ep=4, experts=True),
        Layout(name="EP2xTP2xDP2", ranks=4, ep=2, tp=2, experts=True),
        Layout(name="EP2xETP2xTP2", ranks=4, ep=2, etp=2, tp=2, experts=True),
    ),
    8: (
        Layout(name="TP8", ranks=8, tp=8),
        Layout(name="TP4xDP2", ranks=8, tp=4),
        Layout(name="TP2xPP2xDP2", ranks=8, tp=2, pp=2),
        Layout(name="PP4xVPP2xDP2", ranks=8, pp=4, vpp=2),
        Layout(name="CP2xTP2xDP2", ranks=8, cp=2, tp=2),
        Layout(name="DP8", ranks=8),
        Layout(name="FSDP8", ranks=8, sharding=ZERO3),
        Layout(name="EP8", ranks=8, ep=8, experts=True),
        Layout(name="EP4xTP2", ranks=8, ep=4, tp=2, experts=True),
    ),
}


NAMES = frozenset(layout.name for layouts in _LAYOUTS.values() for layout in layouts)


def layouts_of(ranks: int, names: list[str] | None = None) -> list[Layout]:
    """The layouts of a machine with this many GPUs, or those of them that are named. Raises ConfigError."""
    if ranks not in _LAYOUTS:
        known = ", ".join(map(str, _LAYOUTS))
        raise ConfigError(f"layouts are known for {known} processes, not for {ranks}; set NPROC_PER_NODE")
    found = {layout.name: layout for layout in _LAYOUTS[ranks]}
    for name in names or []:
        if name not in found:
            raise ConfigError(f"layout {name!r} is none of {ranks} processes; those are {', '.join(found)}")
    return [layout for layout in found.values() if not names or layout.name in names]


def data_parallel(ranks: int) -> Layout:
    """Replicas only."""
    return ONE if ranks == 1 else Layout(name=f"DP{ranks}", ranks=ranks)
