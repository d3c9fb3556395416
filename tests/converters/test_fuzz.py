"""Damaged and invented files: a conversion succeeds, or refuses in one line and leaves all as it was."""

import json
import math
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converters.convert import to_hf, to_mcore
from converters.hf.reader import HfReader
from converters.mapping import hf_tensors, weight_map
from engine.errors import UserError
from engine.model.spec import load_model_spec
from tests.launch.runs import everything_in

INDEX = "model.safetensors.index.json"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 11,
    "tie_word_embeddings": True,
}  # fmt: skip
MORE_ADDRESS_SPACE = 2_000_000_000
MORE_MEMORY = 300_000_000
# Few examples, the same in every run: the file takes half a minute.
few = settings(derandomize=True, deadline=None, max_examples=50)
many = settings(derandomize=True, deadline=None, max_examples=200)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory with a model, in one file or several, and its checkpoint; tests put them back as they
    were.
    """

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def sharded(self) -> Path:
        return self.root / "sharded"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def out(self) -> Path:
        return self.root / "new" / "out"

    def attempt(self, action: Callable[[], Any]) -> bool:
        """Whether `action` succeeds. If it does not, it says so in one line and leaves nothing; if it does,
        it changes nothing but `out`.
        """
        before, refusal = everything_in(self.root), ""
        try:
            action()
        except UserError as error:
            refusal = str(error)
        succeeded = self.out.exists()
        assert len(refusal.splitlines()) == (0 if succeeded else 1), repr(refusal)
        if self.out.parent.exists():
            assert [path.name for path in self.out.parent.iterdir()] == ["out"] * succeeded
            shutil.rmtree(self.out.parent)
        assert everything_in(self.root) == before
        return succeeded


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(root=tmp_path_factory.mktemp("fuzz"))
    place.model.mkdir()
    (place.model / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape).bfloat16()
        for name, tensor in hf_tensors(weight_map(load_model_spec(place.model))).items()
    }
    save_file(tensors, place.model / "model.safetensors", {"format": "pt"})
    to_mcore(place.model, place.checkpoint)
    to_hf(place.checkpoint, place.sharded, max_shard_size=500)
    (place.root / "secret.safetensors").write_bytes((place.model / "model.safetensors").read_bytes())
    return place


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What a file claims to hold must not be allocated: neither asked for nor, less still, used."""
    before, limits = peak_memory(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + MORE_ADDRESS_SPACE
    if resource.RLIM_INFINITY in limits or wanted < min(limits):
        resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert peak_memory() - before < MORE_MEMORY


def peak_memory() -> int:
    """Bytes that this process has had in use at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Bytes

PIECES = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"-0", b"1e9", b"1.0", b"null", b"true", b"NaN", b" ",
    b"\n", b"9" * 20, b"9" * 4300, b"9" * 5000, b"\\u0000", b"\\ud800", b"\\n", b"../", b"\xff",
    b"\xef\xbb\xbf", b"F8_E4M3", b"I64", b"F64", b"__metadata__", b"[" * 5000, b'{"a":' * 5000, bytes(8),
)  # fmt: skip


@st.composite
def mutations(
    draw: st.DrawFn, content: bytes, upto: int | None = None, pieces: Sequence[bytes] = PIECES
) -> bytes:
    """`content` after a few changes, most of them within its first `upto` bytes."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(result), upto or len(result)) - 1)))
        count = draw(st.sampled_from((1, 1, 1, 2, 8, 100)))
        match draw(st.sampled_from(("set", "flip", "insert", "delete", "repeat", "swap", "cut"))):
            case "set":
                result[at : at + count] = draw(st.binary(min_size=count, max_size=count))
            case "flip" if result:
                result[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                result[at:at] = draw(st.sampled_from(pieces))
            case "delete":
                del result[at : at + count]
            case "repeat":
                result[at:at] = result[at : at + count]
            case "swap":
                there = draw(st.integers(0, max(0, len(result) - 1)))
                first, second = result[at : at + count], result[there : there + count]
                result[there : there + count], result[at : at + count] = first, second
            case "cut":
                del result[at:]
    return bytes(result)


def with_header(text: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return len(text).to_bytes(8, "little") + text + data


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def refused_or_as_the_library_reads(place: Place, content: bytes) -> bool:
    """Convert the model with `content` as its file. What is converted, the safetensors library reads alike.
    Whether it was converted.
    """
    path = place.model / "model.safetensors"
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        if converted := place.attempt(lambda: to_mcore(place.model, place.out)):
            reader = HfReader(place.model)
            with safe_open(path, "pt") as library:
                assert set(library.keys()) == set(reader.tensors)
                for name in reader.tensors:
                    ours, theirs = reader.read(name), library.get_tensor(name)
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        return converted
    except SafetensorError as error:
        raise AssertionError("the library does not read what was converted") from error
    finally:
        path.write_bytes(original)


@many
@given(st.data())
def test_bytes_of_a_header(place: Place, data: st.DataObject) -> None:
    header, weights = split((place.model / "model.safetensors").read_bytes())
    refused_or_as_the_library_reads(place, with_header(data.draw(mutations(header)), weights))


@many
@given(st.data())
def test_bytes_of_a_file(place: Place, data: st.DataObject) -> None:
    content = (place.model / "model.safetensors").read_bytes()
    refused_or_as_the_library_reads(place, data.draw(mutations(content, upto=1500)))


# Structure

texts = st.text(st.characters(), max_size=6)  # lone surrogates and control characters among them
numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from((2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**15, 10**18, 10**40, -(10**40), 10**4299)),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
shapes = st.one_of(values, st.lists(numbers, max_size=4))
dtypes = st.one_of(
    values, st.sampled_from(("BF16", "F32", "F64", "F8_E4M3", "F4", "BOOL", "U64", "bf16", ""))
)
entries = st.one_of(
    values,
    st.fixed_dictionaries({"dtype": dtypes, "shape": shapes, "data_offsets": shapes}),
    st.fixed_dictionaries({"dtype": dtypes, "shape": shapes, "data_offsets": shapes, "more": values}),
)


@st.composite
def headers(draw: st.DrawFn, text: bytes) -> bytes:
    """A header with a few entries exchanged, added, doubled or in another order."""
    pairs = list(json.loads(text).items())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(pairs) - 1))
        name, entry = pairs[at]
        match draw(
            st.sampled_from(("entry", "field", "name", "double", "add", "drop", "shuffle", "metadata"))
        ):
            case "entry":
                pairs[at] = (name, draw(entries))
            case "field" if isinstance(entry, dict):
                field = draw(st.sampled_from(("dtype", "shape", "data_offsets")))
                pairs[at] = (name, entry | {field: draw(dtypes if field == "dtype" else shapes)})
            case "name":
                pairs[at] = (draw(texts), entry)
            case "double":
                pairs.append((name, entry))
            case "add":
                pairs.append((draw(texts), draw(entries)))
            case "drop" if len(pairs) > 1:
                del pairs[at]
            case "shuffle":
                pairs = draw(st.permutations(pairs))
            case "metadata":
                pairs.append(("__metadata__", draw(values)))
    items = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in pairs)
    return ("{" + ",".join(items) + "}").encode()


@many
@given(st.data())
def test_structure_of_a_header(place: Place, data: st.DataObject) -> None:
    header, weights = split((place.model / "model.safetensors").read_bytes())
    refused_or_as_the_library_reads(place, with_header(data.draw(headers(header)), weights))


@few
@given(st.data())
def test_a_header_of_nothing_but_inventions(place: Place, data: st.DataObject) -> None:
    header = json.dumps(data.draw(st.dictionaries(texts, entries, max_size=4))).encode()
    refused_or_as_the_library_reads(place, with_header(header, data.draw(st.binary(max_size=64))))


@pytest.mark.parametrize("shape", [[10**15], [10**15, 0], [0, 10**15], [2**62, 2**62]])
def test_a_tensor_of_a_quadrillion_elements(place: Place, shape: list[int]) -> None:
    """Or of none, and yet of such a shape."""
    text, weights = split((place.model / "model.safetensors").read_bytes())
    header, name = json.loads(text), "model.norm.weight"
    begin, end = header[name]["data_offsets"]
    assert end == len(weights)
    header[name] |= {"shape": shape, "data_offsets": [begin, begin + 2 * math.prod(shape)]}
    data = weights[:begin] if 0 in shape else weights
    assert not refused_or_as_the_library_reads(place, with_header(json.dumps(header).encode(), data))


# Indexes


@st.composite
def indexes(draw: st.DrawFn, text: bytes) -> bytes:
    """An index with a few entries of its weight_map exchanged, added or dropped, or of another make."""
    index = json.loads(text)
    files = sorted(set(index["weight_map"].values()))
    names = sorted(index["weight_map"])
    odd = ("..", ".", "", "/", "../secret.safetensors", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb",
           "config.json", INDEX, "model.safetensors", "pytorch_model.bin", "\ud800", "\udcff",
           "x" * 300)  # fmt: skip
    places = st.one_of(st.sampled_from((*files, *odd)), texts, values)
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(("file", "name", "drop", "whole", "rest"))):
            case "file":
                index["weight_map"][draw(st.sampled_from(names))] = draw(places)
            case "name":
                index["weight_map"][draw(texts)] = draw(places)
            case "drop":
                index["weight_map"].pop(draw(st.sampled_from(names)), None)
            case "whole":
                return json.dumps(index | {"weight_map": draw(values)}).encode()
            case "rest":
                index["metadata"] = draw(values)
    return json.dumps(index).encode()


@many
@given(st.data())
def test_an_index(place: Place, data: st.DataObject) -> None:
    path = place.sharded / INDEX
    original = path.read_bytes()
    path.write_bytes(data.draw(st.one_of(indexes(original), mutations(original))))
    try:
        place.attempt(lambda: to_mcore(place.sharded, place.out))
    finally:
        path.write_bytes(original)


# Checkpoints

PICKLED = (
    b"r\xff\xff\xff\x7f", b"Nr\xff\xff\xff\x3f0", b"p999999999\n", b"\x8b\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 7 + b"\0", b"\x96\0\0\0\0\xff\0\0\0", b"\x8d" + b"\xff" * 8, b"c__builtin__\nexec\n",
    b"ctorch\nload\n", b"(", b"t", b"}", b"N", b"0", b"2", b"R", b"b", b".", b"I" + b"9" * 5000 + b"\n",
    b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\x7f" * 9, b"]" * 3000,
)  # fmt: skip


KINDS = (torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e5m2, torch.complex128)


def attempt_with(place: Place, name: str, content: bytes) -> bool:
    """Convert the checkpoint with another file in it."""
    path = place.checkpoint / name
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        return place.attempt(lambda: to_hf(place.checkpoint, place.out))
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (".metadata", PICKLED),
        ("__0_0.distcp", PICKLED),
        ("braid.json", PIECES),
        ("hf_layout/model.safetensors.header", PIECES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@many
@given(data=st.data())
def test_bytes_of_a_checkpoint(
    place: Place, name: str, pieces: tuple[bytes, ...], data: st.DataObject
) -> None:
    content = (place.checkpoint / name).read_bytes()
    attempt_with(place, name, data.draw(mutations(content, pieces=pieces)))


@st.composite
def metadata(draw: st.DrawFn, content: bytes) -> bytes:
    """A .metadata of torch's own classes, with odd values in a few places."""
    value: Any = pickle.loads(content)
    sizes = st.one_of(st.integers(0, 30), st.sampled_from((2**31, 2**40, 2**62, -1)))
    files = ("", ".", "..", "../secret", "/etc/passwd", "a/b", "a\nb", "x" * 300)
    words = st.one_of(texts, st.sampled_from(files))
    odd = st.one_of(st.none(), sizes, words, st.floats(), st.lists(sizes, max_size=3), st.just(2**20_000))
    tensors = [e for e in value.state_dict_metadata.values() if hasattr(e, "chunks")]
    for _ in range(draw(st.integers(1, 3))):
        tensor = draw(st.sampled_from(tensors))
        place = draw(st.sampled_from(list(value.storage_data.values())))
        chunk, numbers = draw(st.sampled_from(tensor.chunks)), draw(st.lists(sizes, min_size=1, max_size=3))
        fields = ("size", "sizes", "offsets", "file", "offset", "length", "dtype", "odd", "key")
        match draw(st.sampled_from(fields)):
            case "size":
                tensor.size = torch.Size([*numbers, *tensor.size[len(numbers) :]])
            case "sizes":
                chunk.sizes = torch.Size([*numbers, *chunk.sizes[len(numbers) :]])
            case "offsets":
                chunk.offsets = torch.Size([*numbers, *chunk.offsets[len(numbers) :]])
            case "file":
                place.relative_path = draw(words)
            case "offset" | "length" as name:
                setattr(place, name, draw(st.one_of(sizes, odd)))
            case "dtype":
                dtype = draw(st.sampled_from(KINDS))
                tensor.properties = replace(tensor.properties, dtype=dtype)
            case "odd":
                setattr(tensor, draw(st.sampled_from(("size", "chunks"))), draw(odd))
                break
            case "key":
                value.state_dict_metadata[draw(st.one_of(words, st.integers()))] = tensor
    return pickle.dumps(value)


@many
@given(st.data())
def test_structure_of_metadata(place: Place, data: st.DataObject) -> None:
    content = (place.checkpoint / ".metadata").read_bytes()
    attempt_with(place, ".metadata", data.draw(metadata(content)))
