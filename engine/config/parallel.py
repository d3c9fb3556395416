"""All degrees of parallelism, checked once, in one object that prints its rank grid. Pure Python."""

from dataclasses import dataclass

from engine.config.options import ParallelOptions
from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where a rank sits in the grid; every index counts from 0."""

    dp: int
    pp: int
    cp: int
    tp: int

    def __str__(self) -> str:
        return f"dp{self.dp} pp{self.pp} cp{self.cp} tp{self.tp}"


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Checked degrees. tp * cp * dp * pp == world_size; Megatron's default rank order, tp fastest, pp
    slowest.
    """

    world_size: int
    tp: int
    pp: int
    vpp: int
    """Model chunks per pipeline rank; 1 means the plain 1F1B schedule."""

    cp: int
    cp_comm_type: str | None
    """How context-parallel ranks exchange keys and values; None leaves it to the implementation of the
    layers.
    """

    dp: int
    sequence_parallel: bool
    layers_per_chunk: tuple[int, ...]
    """Decoder layers of the pp * vpp chunks in pipeline order; chunk c lives on pipeline rank c % pp."""

    ep: int = 1
    """Ranks that share the experts of a layer, among those with the same layers."""

    etp: int = 1
    """Ranks that share an expert's matrices."""

    @classmethod
    def resolve(cls, options: ParallelOptions, *, num_layers: int, world_size: int) -> "ParallelLayout":
        """Check the degrees against each other, the model's depth and the number of ranks. Raises
        ConfigError.
        """
        tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
        vpp, etp = (
            1 if degree is None else degree
            for degree in (options.virtual_pipeline_model_parallel_size, options.expert_tensor_parallel_size)
        )
        cp = options.context_parallel_size
        degrees = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vpp,
            "context_parallel_size": cp,
            "expert_model_parallel_size": options.expert_model_parallel_size,
            "expert_tensor_parallel_size": etp,
        }
        ep = options.expert_model_parallel_size
        for name, degree in degrees.items():
            if degree < 1:
                raise ConfigError(f"{name} must be at least 1, not {degree}")
        if vpp > 1 and pp == 1:
            raise ConfigError(
                "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of at least 2"
            )
        if world_size % (tp * pp * cp):
            raise ConfigError(
                f"{world_size} processes do not hold TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp} ranks; "
                f"start a multiple of {tp * pp * cp} processes (NPROC_PER_NODE, NNODES)"
            )
        if (world_size // pp) % (ep * etp):
            raise ConfigError(
                f"the {world_size // pp} ranks of a pipeline stage cannot be dealt to "
                f"expert_model_parallel_size {ep} x expert_tensor_parallel_size {etp}; choose divisors"
            )
        sequence_parallel = tp > 1 if options.sequence_parallel is None else options.sequence_parallel
        if sequence_parallel and tp == 1:
            raise ConfigError("sequence_parallel needs tensor_model_parallel_size of at least 2")
        if not sequence_parallel and tp > 1:
            raise ConfigError("sequence_parallel cannot be switched off when tensor_model_parallel_size > 1")
        return cls(
            world_size=world_size,
            tp=tp,
            pp=pp,
            vpp=vpp,
            cp=cp,
            cp_comm_type=options.cp_comm_type,
            dp=world_size // (tp * pp * cp),
            sequence_parallel=sequence_parallel,
            ep=ep,
            etp=etp,
            layers_per_chunk=_split_layers(num_layers, pp * vpp, options.decoder_layers_per_stage),
        )

    def place(self, rank: int) -> RankPlace:
        """The grid coordinates of a global rank."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return RankPlace(dp=dp, pp=pp, cp=cp, tp=tp)

    def chunks_of(self, pp_rank: int) -> list[range]:
        """Indices of the decoder layers in each model chunk of a pipeline rank."""
        starts = [sum(self.layers_per_chunk[:chunk]) for chunk in range(self.pp * self.vpp)]
        return [
            range(starts[chunk], starts[chunk] + self.layers_per_chunk[chunk])
            for chunk in range(pp_rank, self.pp * self.vpp, self.pp)
        ]

    def megatron_layout(self) -> list[list[str]] | None:
        """Megatron's `pipeline_model_parallel_layout`: what each chunk holds. None without pipeline
        parallelism.
        """
        if self.pp == 1:
            return None
        chunks = [["decoder"] * count for count in self.layers_per_chunk]
        return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]

    def check_cp_comm_type(self, *, has_te: bool) -> None:
        """Raise ConfigError for an exchange that only Transformer Engine has, where that is not used."""
        if self.cp > 1 and self.cp_comm_type == "p2p" and not has_te:
            raise ConfigError("cp_comm_type p2p needs Transformer Engine; use all_gather or a2a")

    @property
    def document_multiple(self) -> int:
        """Tokens of a document are padded to a multiple of this: context parallelism cuts it into 2 x CP
        equal chunks.
        """
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def micro_batch_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this: sequence parallelism cuts each rank's
        part.
        """
        return self.document_multiple * self.tp

    def check_micro_batches(self, accumulation: int) -> None:
        """The interleaved schedule works on groups of pp micro-batches. Raises ConfigError."""
        if self.vpp > 1 and accumulation % self.pp:
            raise ConfigError(
                f"virtual pipeline parallelism needs gradient_accumulation_steps in multiples of "
                f"pipeline_model_parallel_size {self.pp}, not {accumulation}"
            )

    def summary(self) -> str:
        """Degrees on one line."""
        vpp = f" x VPP {self.vpp}" if self.vpp > 1 else ""
        experts = f"experts EP {self.ep} x ETP {self.etp}, " if self.ep * self.etp > 1 else ""
        return (
            f"{self.world_size} ranks = TP {self.tp} x PP {self.pp}{vpp} x CP {self.cp} x DP {self.dp}, "
            f"{experts}sequence parallel {'on' if self.sequence_parallel else 'off'}"
        )

    def grid(self, *, max_rows: int = 32) -> str:
        """A table of ranks: one row per pipeline rank and data-parallel replica, with the layers they
        hold.
        """
        rows = []
        for pp in range(self.pp):
            layers = " + ".join(f"{c.start}-{c.stop - 1}" if len(c) else "none" for c in self.chunks_of(pp))
            for dp in range(self.dp):
                ranks = [r for r in range(self.world_size) if (p := self.place(r)).pp == pp and p.dp == dp]
                rows.append(f"  pp{pp} dp{dp}  layers {layers:<14} ranks {' '.join(map(str, ranks))}")
        hidden = len(rows) - max_rows
        return "\n".join(rows[:max_rows] + ([f"  ... {hidden} more rows"] if hidden > 0 else []))


def _split_layers(num_layers: int, chunks: int, wanted: list[int] | None) -> tuple[int, ...]:
    if wanted is not None:
        if len(wanted) != chunks or sum(wanted) != num_layers or min(wanted) < 1:
            raise ConfigError(
                f"decoder_layers_per_stage {wanted} must be {chunks} positive numbers that add up to "
                f"{num_layers} layers"
            )
        return tuple(wanted)
    if chunks > num_layers:
        raise ConfigError(
            f"{num_layers} layers cannot fill {chunks} pipeline chunks; lower pipeline_model_parallel_size "
            f"or "
            f"virtual_pipeline_model_parallel_size"
        )
    base, extra = divmod(num_layers, chunks)
    # The first chunk also holds the embedding and the last one the LM head and the loss: they get the spare
    # layers last.
    order = [*range(1, chunks - 1), 0, chunks - 1] if chunks > 1 else [0]
    counts = [base] * chunks
    for chunk in order[:extra]:
        counts[chunk] += 1
    return tuple(counts)
