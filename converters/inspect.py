"""What a checkpoint is and whether all of it is there, from its descriptions alone.

Of a Megatron checkpoint `.metadata` is read, of a Hugging Face or PEFT directory the headers of its files; of
either the JSON files beside them and the sizes on disk. No tensor is read, nothing is unpickled but by the
restricted reader of `.metadata`, and `common.pt` is not opened. So a file of the right length passes whatever
is in it, and nobody misses a file that holds no tensor and that neither a manifest nor a run speaks of.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from converters.adapter import ADAPTER_FILE, check_adapter_checkpoint, holds_adapter
from converters.descriptions import (
    LARGEST,
    Findings,
    check_listed,
    num_layers,
    read_adapter,
    read_json,
    read_model,
    read_state,
)
from converters.hf.reader import (
    DTYPES,
    INDEX_FILE,
    LM_HEAD,
    SINGLE_FILE,
    HfReader,
    TensorInfo,
    header_bytes,
    parse_header,
    read_header,
    refuse_fused_experts,
)
from converters.inspection import (
    BoxShape,
    Content,
    FileOnDisk,
    Inspection,
    Kind,
    LayoutSummary,
    StoredTensor,
    summed,
)
from converters.mapping import hf_tensors, weight_map
from converters.mcore.companions import COMPANIONS_DIR, INFO_FILE, read_source_info
from converters.mcore.places import stacked_axes
from converters.mcore.reader import MODEL_PREFIXES, DistReader, check_checkpoint
from converters.transfer import RECORDS_DIR
from engine.errors import CheckpointError, ModelError, UserError
from engine.model.lora_spec import CHECKPOINT_PREFIX
from engine.model.lora_spec import CONFIG_FILE as ADAPTER_CONFIG
from engine.model.spec import ModelSpec
from engine.storage.files import and_more, dtype_name, inside, shown
from engine.storage.manifest import MANIFEST_FILE, STATE_FILE, files_below
from engine.storage.metadata import METADATA_FILE, DistTensor
from engine.storage.reader import is_dist_checkpoint

_STEP = re.compile(r"(?:checkpoint-|iter_)(\d{1,18})")
_WRITER = re.compile(r"__(\d{1,18})_\d+\.distcp")
# Experts' matrices are cut among other ranks than those of tensor parallelism.
_CUT_BY_COLUMNS = re.compile(r"(?!.*\bexperts\.experts\.).*(linear_(fc2|proj)\.weight|(o|down)_proj_lora_A)")
_CUT_BY_ROWS = re.compile(r".*(linear_qkv\.weight|(gate|up)_proj_lora_B)")
_END_OF_ARCHIVE, _END_BYTES = b"PK\5\6", 22
"""The last record of a zip archive without a comment, as torch.save writes them, and its size."""


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Look at a Megatron checkpoint of any origin, a Hugging Face directory or a PEFT directory.

    What is damaged, missing or cut off is a problem of the result. Raises CheckpointError or ModelError if
    there is nothing to describe: no checkpoint, or one whose description itself is damaged.
    """
    directory = Path(path)
    try:
        if directory.is_file():
            raise CheckpointError(f"{path} is a file; pass the directory that it is in")
        if not directory.is_dir():
            raise CheckpointError(f"checkpoint {path} does not exist")
        if is_dist_checkpoint(directory):
            return _inspect_mcore(directory)
        if _has_safetensors(directory):
            return _inspect_hf(directory)
        raise _nothing_in(directory)
    except OSError as error:
        place = shown(error.filename or path)
        raise CheckpointError(f"{place} cannot be read ({error.strerror or error})") from error


def _has_safetensors(directory: Path) -> bool:
    return (directory / INDEX_FILE).exists() or any(directory.glob("*.safetensors"))


def _nothing_in(directory: Path) -> UserError:
    """The error for a directory that is no checkpoint; it may be one of a run, with checkpoints in it."""
    if (directory / RECORDS_DIR).is_dir():
        return CheckpointError(
            f"{directory} is a conversion that has not finished; give its command again, it goes on from here"
        )
    below = [p for p in directory.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if held := [p for p in below if is_dist_checkpoint(p) or _has_safetensors(p)]:
        best = max(held, key=lambda p: (_step_in_name(p) is not None, _step_in_name(p) or 0, p.name))
        others = and_more([p.name for p in held])
        return CheckpointError(f"{directory} is no checkpoint itself; pass one in it, such as {best}{others}")
    for name, single in (("config.json", SINGLE_FILE), (ADAPTER_CONFIG, ADAPTER_FILE)):
        if (directory / name).exists():
            try:
                HfReader(directory, single_file=single)
            except ModelError as error:
                return error
    return CheckpointError(
        f"{directory} is no checkpoint that braid reads: it has no {METADATA_FILE} (Megatron's torch_dist), "
        f"{SINGLE_FILE}, {INDEX_FILE} or {ADAPTER_FILE}"
    )


def _step_in_name(directory: Path) -> int | None:
    match = _STEP.fullmatch(directory.resolve().name)
    return None if match is None else int(match[1])


def _inspection(
    directory: Path, kind: Kind, tensors: Sequence[StoredTensor], found: Findings, **others: Any
) -> Inspection:
    """What every format has, and `others`."""
    files, step = _files(directory, found), _step_in_name(directory)
    of_name = {"step": step, "step_source": None if step is None else "directory name", "total_steps": None}
    manifest = check_listed(directory, files, found)
    return Inspection(
        path=str(directory),
        kind=kind,
        contents=summed(tensors),
        tensors=tuple(tensors),
        manifest=manifest,
        files=files,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
        **(of_name | others),
    )


def _files(directory: Path, found: Findings) -> tuple[FileOnDisk, ...]:
    """All but those below hidden directories."""
    files, names = [], files_below(directory)
    if (directory / MANIFEST_FILE).exists():
        names.append(MANIFEST_FILE)
    for name in names:
        if any(part.startswith(".") for part in Path(name).parts[:-1]):
            continue
        try:
            files.append(FileOnDisk(name=name, bytes=(directory / name).stat().st_size))
        except OSError as error:  # a link to nowhere
            if all(problem.file != name for problem in found.problems):
                found.problem(name, f"{directory / name} cannot be read ({error.strerror})")
    return tuple(files)


def _check_sizes(where: Path, name: str, shape: Sequence[int], nbytes: int) -> None:
    if max(shape, default=0) >= LARGEST or math.prod(shape) >= LARGEST or nbytes >= LARGEST:
        raise CheckpointError(f"{where}: {shown(name)} is larger than any disk; do not use this checkpoint")


# Megatron


def _inspect_mcore(directory: Path) -> Inspection:
    reader, found = DistReader(directory), Findings()
    tensors = [_mcore_tensor(directory, tensor) for tensor in reader.tensors.values()]
    held = {tensor.content for tensor in tensors}
    from_braid = any((directory / name).exists() for name in (INFO_FILE, STATE_FILE, MANIFEST_FILE))
    kind: Kind = "converted" if from_braid else "megatron"
    if holds_adapter(directory) or ("adapter" in held and "weights" not in held):
        kind = "adapter"
    elif (directory / STATE_FILE).exists():
        kind = "training"
    if from_braid:
        found.try_to(INFO_FILE, lambda: read_source_info(directory))
    state = read_state(directory, found)
    model, spec = read_model(directory / COMPANIONS_DIR, tensors, found)
    adapter = read_adapter(directory / COMPANIONS_DIR, found)
    _check_boxes(reader, found)
    _check_data_files(reader, 0 if state is None else state.ranks, found)
    if spec is not None:
        _check_fit(reader, spec, found)
    # The converter numbers its files as if one rank had written them.
    writers = None if from_braid and state is None else len(_writers(reader))
    layout = LayoutSummary(source="deduced", tp=_deduced_tp(reader), writers=writers)
    others: dict[str, Any] = {"model": model, "adapter": adapter, "layout": layout}
    if state is not None:
        others |= {"step": state.step, "step_source": STATE_FILE, "total_steps": state.total_steps}
        others["layout"] = LayoutSummary(source="trainer_state.json", **state.layout, writers=writers)
    return _inspection(directory, kind, tensors, found, **others)


def _mcore_tensor(directory: Path, tensor: DistTensor) -> StoredTensor:
    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    _check_sizes(directory / METADATA_FILE, tensor.key, tensor.shape, nbytes)
    for chunk in tensor.chunks:
        _check_sizes(directory / METADATA_FILE, tensor.key, (), chunk.start + chunk.length)
    boxes = Counter(chunk.sizes for chunk in tensor.chunks).most_common()
    sizes = list(tensor.shape)
    layers, experts = (sizes.pop(0) if stacked and sizes else None for stacked in stacked_axes(tensor.key))
    return StoredTensor(
        name=tensor.key,
        content=_mcore_content(tensor.key),
        shape=tensor.shape,
        dtype=dtype_name(tensor.dtype),
        layers=layers,
        experts=experts,
        boxes=tuple(BoxShape(sizes=sizes, count=count) for sizes, count in boxes),
        bytes=nbytes,
        files=tuple(dict.fromkeys(chunk.file for chunk in tensor.chunks)),
    )


def _mcore_content(key: str) -> Content:
    if "optimizer." in key:
        return "optimizer"
    if key.startswith(CHECKPOINT_PREFIX) or ".adapter." in key:  # Braid's, Megatron-Bridge's
        return "adapter"
    return "weights" if key.startswith(MODEL_PREFIXES) and "._extra_state" not in key else "other"


def _check_boxes(reader: DistReader, found: Findings) -> None:
    """The boxes of a tensor must fill it."""
    wrong = []
    for tensor in reader.tensors.values():
        filled, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
        places = len({chunk.offsets for chunk in tensor.chunks})
        if filled != whole or places != len(tensor.chunks):
            wrong.append(f"{shown(tensor.key)}: its parts hold {filled} of {whole} elements")
    if wrong:
        found.problem(METADATA_FILE, f"incomplete: {wrong[0]}{and_more(wrong)}; use another checkpoint")


def _check_data_files(reader: DistReader, ranks: int, found: Findings) -> None:
    """Every file must be there and reach to the end of its last box; `ranks` is how many wrote, if known."""
    ends: dict[str, int] = {}
    boxes: Counter[str] = Counter()
    for chunk in (chunk for tensor in reader.tensors.values() for chunk in tensor.chunks):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        boxes[chunk.file] += 1
    for name, end in ends.items():
        try:
            size = inside(reader.directory, name, error=CheckpointError).stat().st_size
        except CheckpointError as error:
            found.problem(name, f"{error} ({boxes[name]} boxes are in it)")
            continue
        if size < end:
            found.problem(
                name, f"{reader.directory / name} is cut off: it has {size} bytes, its boxes reach to {end}"
            )
    for path in sorted(reader.directory.glob("*.distcp")):
        # Behind the last tensor there may be objects, which are archives, too.
        if path.is_file() and (path.name not in ends or path.stat().st_size > ends[path.name]):
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - _END_BYTES))
                if not file.read().startswith(_END_OF_ARCHIVE):
                    found.problem(path.name, f"{path} is cut off within an object behind its tensors")
    # Every rank of a run saves its random generators, be there no tensor in its files.
    there = _writers(reader) | {int(match[1]) for match in map(_WRITER.fullmatch, ends) if match is not None}
    if missing := [f"rank {rank}" for rank in range(ranks) if rank not in there]:
        found.problem(
            STATE_FILE,
            f"{reader.directory} has no file of {missing[0]}{and_more(missing)}, and {ranks} ranks saved it; "
            f"copy it again",
        )


def _writers(reader: DistReader) -> set[int]:
    """Ranks that files are named after."""
    matches = (_WRITER.fullmatch(path.name) for path in reader.directory.glob("*.distcp"))
    return {int(match[1]) for match in matches if match is not None}


def _check_fit(reader: DistReader, spec: ModelSpec, found: Findings) -> None:
    """The tensors must be those of the model, or of its adapter."""
    if holds_adapter(reader.directory):
        found.try_to(METADATA_FILE, lambda: check_adapter_checkpoint(reader, spec))
    else:
        found.try_to(METADATA_FILE, lambda: check_checkpoint(reader, weight_map(spec)))


def _deduced_tp(reader: DistReader) -> int | None:
    """Into how many parts the linears are cut that every tensor-parallel rank has an equal part of; None
    where there are no such, or they disagree.
    """
    for pattern, axis in ((_CUT_BY_COLUMNS, -1), (_CUT_BY_ROWS, -2)):
        cuts = {
            len({chunk.offsets[axis] for chunk in tensor.chunks})
            for key, tensor in reader.tensors.items()
            if _mcore_content(key) in ("weights", "adapter")
            and pattern.fullmatch(key)
            and len(tensor.shape) >= 2
        }
        if cuts:
            return cuts.pop() if len(cuts) == 1 else None
    return None


# Hugging Face and PEFT


def _inspect_hf(directory: Path) -> Inspection:
    found, names = Findings(), (SINGLE_FILE, INDEX_FILE)
    is_model = any((directory / name).exists() for name in names)
    kind: Kind = "peft" if (directory / ADAPTER_FILE).exists() and not is_model else "huggingface"
    single, described_in = (ADAPTER_FILE, ADAPTER_CONFIG) if kind == "peft" else (SINGLE_FILE, "config.json")
    infos = _headers(directory, single, found)
    tensors = [_hf_tensor(info, kind) for info in infos]
    if not (directory / described_in).exists():
        found.problem(described_in, f"{directory} has no {described_in}; copy it beside the weights")
    model, spec = read_model(directory, tensors, found) if kind == "huggingface" else (None, None)
    adapter = read_adapter(directory, found) if kind == "peft" else None
    if spec is not None and not found.problems:
        _check_hf_fit(directory, tensors, spec, found)
    return _inspection(directory, kind, tensors, found, model=model, adapter=adapter, layout=None)


def _headers(directory: Path, single: str, found: Findings) -> list[TensorInfo]:
    """The tensors of all files; of a directory that is damaged, those of the headers that are there."""
    try:
        return list(HfReader(directory, single_file=single).tensors.values())
    except ModelError as error:
        first = error
    infos: list[TensorInfo] = []
    for name, listed in _weight_files(directory, single, found).items():
        try:
            path = inside(directory, name, error=ModelError)
        except ModelError as error:
            found.problem(name, f"{error}" + (f" ({listed} tensors are listed in it)" if listed else ""))
            continue
        try:
            infos += read_header(path).values()
        except ModelError as error:
            found.problem(name, error)
            with suppress(ModelError):
                infos += parse_header(path, header_bytes(path), size=None).values()
    if not infos:
        raise first
    if not found.problems:
        found.problem(INDEX_FILE, first)
    return infos


def _weight_files(directory: Path, single: str, found: Findings) -> Mapping[str, int]:
    """Names of the weight files, and of how many tensors the index says that they are in each."""
    if (directory / single).exists():
        return {single: 0}
    index = read_json(directory / INDEX_FILE, found) if (directory / INDEX_FILE).exists() else None
    places = None if index is None else index.get("weight_map")
    if isinstance(places, dict) and all(isinstance(name, str) for name in places.values()):
        return Counter(places.values())
    if not found.problems:
        found.problem(INDEX_FILE, f"{directory} has no {INDEX_FILE} that lists its files; download it again")
    return {path.name: 0 for path in sorted(directory.glob("*.safetensors"))}


def _hf_tensor(info: TensorInfo, kind: Kind) -> StoredTensor:
    nbytes = info.stop - info.start
    _check_sizes(info.file, info.name, info.shape, nbytes)
    known = DTYPES.get(info.stored_dtype)
    content: Content = "adapter" if kind == "peft" or ".lora_" in info.name else "weights"
    return StoredTensor(
        name=info.name,
        content="other" if info.name.endswith("rotary_emb.inv_freq") else content,
        shape=info.shape,
        dtype=info.stored_dtype if known is None else dtype_name(known),
        layers=None,
        experts=None,
        boxes=(BoxShape(sizes=info.shape, count=1),),
        bytes=nbytes,
        files=(info.file.name,),
    )


def _check_hf_fit(directory: Path, tensors: Sequence[StoredTensor], spec: ModelSpec, found: Findings) -> None:
    """The weights must be the model's, in names and shapes; a tied LM head may be stored, too."""
    stored = {tensor.name: tensor.shape for tensor in tensors if tensor.content == "weights"}
    known = len(found.problems)
    found.try_to("config.json", lambda: refuse_fused_experts(directory, stored))
    if len(found.problems) > known:
        return
    if num_layers(tensors) != spec.num_layers:
        found.problem(
            "config.json",
            f"{directory} has weights of {num_layers(tensors)} layers, config.json says {spec.num_layers}",
        )
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in hf_tensors(weight_map(spec)).items()}
    for what, names in (
        ("is missing", [name for name in wanted if name not in stored]),
        ("has no place in the model", [n for n in stored if n not in wanted and n != LM_HEAD]),
        ("has another shape", [n for n in wanted if stored.get(n, wanted[n]) != wanted[n]]),
    ):
        if names:
            found.problem(
                "config.json",
                f"{directory}: weight {shown(names[0])} {what}{and_more(names)}; the files do not fit "
                f"config.json",
            )
