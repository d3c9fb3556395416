"""Checkpoints of model, optimizer, random generators and data position in Megatron's torch_dist format.

A checkpoint is a directory `checkpoint-<step>` that is whole or absent: everything is written under another
name, hashed into a manifest that comes last, and the last action is the rename. It is layout-free: another
TP/PP/VPP/CP/DP loads it.

Saving stops a step only while its tensors are copied into memory that a process of its own writes from. Ranks
tell rank 0 through files what they have written; a thread there completes the checkpoint.
"""

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel

from engine.errors import OutputError
from engine.runtime import mcore
from engine.runtime.fsdp import gather_weights
from engine.storage.durable import fsync
from engine.storage.files import dtype_name, write_json
from engine.storage.layout import merge_boxes, write_frame
from engine.storage.manifest import (
    STATE_FILE,
    FileEntry,
    Manifest,
    files_below,
    hash_files,
    versions_of,
    write_manifest,
)
from engine.storage.metadata import DistBytes, DistChunk, DistTensor, prepare_to_write
from engine.storage.reader import TorchDistReader
from engine.storage.writer import BackgroundWriter, read_answer
from engine.training.optimizer_state import (
    StateBox,
    descriptions,
    model_state,
    row_boxes,
    set_settings,
    set_states,
    settings_of,
    state_boxes,
    states_of,
)
from engine.training.resume import TrainerState, list_checkpoints
from engine.training.shards import Part, Shards, load_state, split_state, stage_shards

_RECORDS_DIR = ".records"
_POLL_SECONDS = 0.05


class CheckpointSaver:
    """Saves checkpoints of a run; every rank holds one and calls it at the same steps."""

    def __init__(
        self,
        output_dir: Path,
        groups: mcore.Groups,
        *,
        add_companions: Callable[[Path], Any],
        keep: int | None,
        background: bool,
        export: Callable[[Path], None] | None = None,
        export_steps: int | None = None,
    ) -> None:
        """`add_companions(directory)` adds what exports need, on rank 0; `keep` is how many checkpoints stay;
        without `background` a save ends when the checkpoint is complete. Every `export_steps` steps rank 0
        calls `export(checkpoint)` on a thread.
        """
        self._output_dir, self._groups, self._add_companions = output_dir, groups, add_companions
        self._keep, self._background = keep, background
        self._writer = BackgroundWriter()
        self._finisher: threading.Thread | None = None
        self._export, self._export_steps = export, export_steps
        self._exports: dict[Path, threading.Thread] = {}
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self.blocked_s = 0.0
        """Seconds for which the last save kept the step waiting."""
        if groups.rank == 0:
            prepare_to_write()

    @torch.no_grad()
    def save(self, state: TrainerState, models: Sequence[DistributedDataParallel], optimizer: Any) -> Path:
        """Begin to write `checkpoint-<step>`, after the one before is complete; returns its path.

        Raises OutputError if that one failed, or, without `background`, if this one does.
        """
        self.wait()
        began = time.monotonic()
        final = self._output_dir / f"checkpoint-{state.step}"
        partial = self._output_dir / f".checkpoint-{state.step}.partial"
        if self._groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / _RECORDS_DIR).mkdir(parents=True)
        shards = collect(models, optimizer, self._groups, started=state.step > 0)
        dist.barrier()
        self._write(shards, partial)
        if self._groups.rank == 0:
            self._finisher = threading.Thread(
                target=self._finish, args=(partial, final, state, shards.common), daemon=True
            )
            self._finisher.start()
        if not self._background:
            self.wait()
            dist.barrier()
        self.blocked_s = time.monotonic() - began
        return final

    def poll(self) -> None:
        """Raise what went wrong with a save in the background, if something did."""
        self._writer.poll()
        if self._error is not None:
            raise self._error

    def idle(self) -> bool:
        """Whether no save is under way on this rank. Raises like `poll`."""
        self.poll()
        return self._writer.poll() and not (self._finisher is not None and self._finisher.is_alive())

    def wait(self) -> None:
        """Until this rank's part of the last save, and on rank 0 the whole checkpoint, is complete."""
        self._writer.wait()
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        self.poll()

    def wait_for_exports(self) -> None:
        """Until exports are written, at the end of a run."""
        for thread in self._exports.values():
            thread.join()
        self.poll()

    def close(self) -> None:
        """End the writing process. A save that is not complete is lost, and leaves nothing."""
        self._closing.set()
        self._writer.close()
        if self._finisher is not None:
            self._finisher.join()

    def _write(self, shards: Shards, partial: Path) -> None:
        """Hand this rank's part to the writer: at once if it fits into memory beside training, otherwise in
        files of which only the last is written in the background.
        """
        layout = self._groups.layout
        free = psutil.virtual_memory().available // 2
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))
        groups = shards.split(max(free // max(1, local_ranks), 1))
        table: dict[str, Any] = {"tensors": [], "objects": [], "files": {}}
        records = partial / _RECORDS_DIR
        for number, group in enumerate(groups):
            table["files"] |= {n: dataclasses.asdict(e) for n, e in self._writer.wait().items()}
            memory = self._writer.memory(group.nbytes)
            name = f"__{self._groups.rank}_{number}.distcp"
            staged = stage_shards(group, partial / name, memory)
            table["tensors"] += [_as_json(tensor) for tensor in staged.tensors]
            table["objects"] += [dataclasses.asdict(item) for item in staged.objects]
            last = number == len(groups) - 1
            if last:
                path = records / f"{self._groups.rank}.table"
                path.write_text(json.dumps(table), encoding="utf-8")
            self._writer.start([staged.file], record=records / str(self._groups.rank) if last else None)

    def _finish(self, partial: Path, final: Path, state: TrainerState, common: dict[str, Any]) -> None:
        """Complete the checkpoint when all ranks have written; on a thread of rank 0."""
        try:
            tensors, objects, files = self._gather(partial / _RECORDS_DIR)
            write_frame(partial, merge_boxes(tensors), objects, common)
            self._add_companions(partial)
            write_json(partial / STATE_FILE, dataclasses.asdict(state))
            shutil.rmtree(partial / _RECORDS_DIR)
            files |= hash_files(partial, [name for name in files_below(partial) if name not in files])
            write_manifest(partial, _manifest(files))
            fsync(partial)
            _replace(partial, final)
            if self._export is not None and self._export_steps and state.step % self._export_steps == 0:
                self._exports[final] = threading.Thread(target=self._run_export, args=(final,), daemon=True)
                self._exports[final].start()
            self._remove_old()
        except BaseException as error:  # torch's errors are no OSError; the next poll hands it on
            shutil.rmtree(partial, ignore_errors=True)
            self._error = error

    def _run_export(self, checkpoint: Path) -> None:
        assert self._export is not None
        try:
            self._export(checkpoint)
        except BaseException as error:
            self._error = error

    def _remove_old(self) -> None:
        """Keep the newest whole checkpoints, and those that are being exported."""
        exporting = {path for path, thread in self._exports.items() if thread.is_alive()}
        for old in list_checkpoints(self._output_dir)[: -self._keep if self._keep else 0]:
            if old not in exporting:
                shutil.rmtree(old)

    def _gather(self, records: Path) -> tuple[list[DistTensor], list[DistBytes], dict[str, FileEntry]]:
        """What the ranks have written, once all of them have."""
        tensors, objects, files = list[DistTensor](), list[DistBytes](), dict[str, FileEntry]()
        for rank in range(self._groups.layout.world_size):
            path = records / str(rank)
            while not path.exists():
                if self._closing.wait(_POLL_SECONDS):
                    raise OutputError(f"the run ended before rank {rank} had written its part")
            files |= read_answer(path.read_bytes())
            table = json.loads((records / f"{rank}.table").read_text(encoding="utf-8"))
            tensors += [_from_json(entry) for entry in table["tensors"]]
            objects += [DistBytes(**entry) for entry in table["objects"]]
            files |= {name: FileEntry(**entry) for name, entry in table["files"].items()}
        return tensors, objects, files


def _as_json(tensor: DistTensor) -> dict[str, Any]:
    return dataclasses.asdict(tensor) | {"dtype": dtype_name(tensor.dtype)}


def _from_json(entry: dict[str, Any]) -> DistTensor:
    chunks = tuple(
        DistChunk(**chunk | {"offsets": tuple(chunk["offsets"]), "sizes": tuple(chunk["sizes"])})
        for chunk in entry["chunks"]
    )
    dtype = getattr(torch, entry["dtype"])
    return DistTensor(key=entry["key"], shape=tuple(entry["shape"]), dtype=dtype, chunks=chunks)


def _manifest(files: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        kind="training",
        versions=versions_of(("braid", "torch", "megatron-core")),
        files=dict(sorted(files.items())),
    )


def _replace(partial: Path, final: Path) -> None:
    """Give the checkpoint its name. One of the same step, of a run that went on from before it, makes room
    only now.
    """
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def collect(
    models: Sequence[DistributedDataParallel], optimizer: Any, groups: mcore.Groups, *, started: bool
) -> Shards:
    """This rank's part of a checkpoint. `started` is whether there has been a step."""
    if not started:
        # Before the first step the optimizer has no moments; to ask for what would be loaded makes them.
        sharded_state(models, optimizer, groups, loading=True)
    state = sharded_state(models, optimizer, groups, loading=False)
    known = descriptions(state)
    weights = _sharded_weights(models, state, known)
    shards = split_state(state)
    boxes = [
        Part(
            key=box.state_key(name),
            data=flat[box.start : box.stop],
            shape=box.shape,
            offsets=box.offsets,
            sizes=box.sizes,
        )
        for part in optimizer.chained_optimizers
        if part.optimizer is not None  # a rank without parameters to train
        for box in state_boxes(part, known)
        if box.main
        for name, flat in states_of(part, box.parameter).items()
    ]
    return dataclasses.replace(shards, tensors=(*shards.tensors, *weights, *boxes))


def _sharded_weights(
    models: Sequence[DistributedDataParallel], state: dict[str, Any], known: dict[torch.Tensor, Any]
) -> list[Part]:
    """This rank's rows of weights under Megatron-FSDP; their descriptions leave `state`, because nobody has
    all rows.
    """
    found = []
    for index, model in enumerate(models):
        if not model.ddp_config.use_megatron_fsdp:
            continue
        state[f"model{index}"] = {
            name: item for name, item in state[f"model{index}"].items() if isinstance(item, ShardedObject)
        }
        found += [
            Part(
                key=box.key,
                data=model.rows[box.parameter].weight[box.start : box.stop],
                shape=box.shape,
                offsets=box.offsets,
                sizes=box.sizes,
            )
            for box in row_boxes(model.rows.values(), known)
            if box.main
        ]
    return found


@torch.no_grad()
def load_checkpoint(
    checkpoint: Path,
    state: TrainerState,
    models: Sequence[DistributedDataParallel],
    optimizer: Any,
    groups: mcore.Groups,
) -> None:
    """Restore model, optimizer and, under the same layout, random generators. `state` is the checkpoint's.
    Call on every rank.
    """
    reader = TorchDistReader(checkpoint)
    degrees = layout_degrees(models, groups)
    # A checkpoint of an earlier version says nothing of experts.
    same_layout = degrees == {name: state.layout.get(name, 1) for name in degrees}
    wanted = sharded_state(models, optimizer, groups, loading=True, with_rng=same_layout)
    known = descriptions(wanted)
    # Its weights are what comes of its master weights.
    fully_sharded = [model for model in models if model.ddp_config.use_megatron_fsdp]
    for index, model in enumerate(models):
        if model in fully_sharded:
            del wanted[f"model{index}"]
    loaded = load_state(reader, wanted)
    for index, model in enumerate(models):
        if model in fully_sharded:
            continue
        # A checkpoint of LoRA training has adapters only, the base keeps its weights.
        found = model.module.load_state_dict(loaded[f"model{index}"], strict=model.module.lora is None)
        assert not found.unexpected_keys, found.unexpected_keys
    set_settings(optimizer, loaded["optimizer"])
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            _load_states(reader, part, known)
    for model in fully_sharded:
        gather_weights(model)
    if same_layout:
        mcore.set_rng_state(loaded["rng"])


def _load_states(reader: TorchDistReader, part: Any, known: dict[torch.Tensor, Any]) -> None:
    """Fill an optimizer's master weights and moments."""
    boxes: dict[torch.Tensor, list[StateBox]] = {}
    for box in state_boxes(part, known):
        boxes.setdefault(box.parameter, []).append(box)
    for parameter, mine in boxes.items():
        states = {
            name: torch.empty(flat.shape, dtype=flat.dtype)
            for name, flat in states_of(part, parameter).items()
        }
        for name, flat in states.items():
            for box in mine:
                stored = torch.empty(box.sizes, dtype=reader.tensor(box.state_key(name)).dtype)
                reader.read_region(box.state_key(name), box.offsets, stored)
                flat[box.start : box.stop] = stored.flatten()
        set_states(part, parameter, {name: flat.to(parameter.device) for name, flat in states.items()})


def layout_degrees(models: Sequence[DistributedDataParallel], groups: mcore.Groups) -> dict[str, int]:
    """The degrees that decide whether per-rank states fit; `ep` and `etp` of a model with experts."""
    layout = groups.layout
    degrees = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": layout.dp}
    return degrees if models[0].module.spec.moe is None else degrees | {"ep": layout.ep, "etp": layout.etp}


def sharded_state(
    models: Sequence[DistributedDataParallel],
    optimizer: Any,
    groups: mcore.Groups,
    *,
    loading: bool,
    with_rng: bool = True,
) -> dict[str, Any]:
    chunks = {
        f"model{i}": dict(model.described)
        if model.ddp_config.use_megatron_fsdp
        else model_state(model.module, layers, groups)
        for i, (model, layers) in enumerate(zip(models, groups.layout.chunks_of(groups.pp_rank), strict=True))
    }
    sharded = dict(chunks)
    for part in optimizer.chained_optimizers if loading else []:
        if part.optimizer is not None:
            part.optimizer.make_states()
    sharded["optimizer"] = settings_of(optimizer)
    if with_rng:
        layout = groups.layout
        sharded["rng"] = ShardedObject(
            "rng",
            mcore.rng_state(),
            (layout.pp, layout.dp, layout.cp, layout.tp),
            (groups.pp_rank, groups.dp_rank, groups.cp_rank, groups.tp_rank),
            replica_id=0,
        )
    return sharded
