"""The mapping table: the ranks' parts merge to the full tensor, and the inverse gives HF tensors back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.convert import to_mcore
from converters.hf.reader import HfReader
from converters.mapping import Vocabulary, Weight, hf_tensors, weight_map
from converters.model import open_model
from converters.source import Source
from engine.model.spec import ModelSpec, load_model_spec

from .conftest import KINDS, MakeModel, tensors_of


def trimmed(weight: Weight, full: torch.Tensor) -> torch.Tensor:
    return full[: weight.shape[0]] if isinstance(weight, Vocabulary) else full


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_merge_and_invert(models: MakeModel, kind: str, tp_size: int) -> None:
    reader, spec = HfReader(models(kind)), load_model_spec(models(kind))
    weights, source = weight_map(spec), tensors_of(models(kind))
    assert hf_tensors(weights).keys() == source.keys()
    for weight in weights.values():
        full = trimmed(weight, weight.to_megatron(reader.read_slice))
        assert tuple(full.shape) == tuple(weight.shape)
        shards = [weight.to_megatron(reader.read_slice, rank, tp_size) for rank in range(tp_size)]
        assert len({shard.shape for shard in shards}) == 1
        assert torch.equal(weight.merge(shards), full), weight.name
        for name, tensor in weight.to_hf(full).items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_make_up_the_full_tensor(models: MakeModel, kind: str) -> None:
    """Padding included; `places` says where each Hugging Face tensor's rows have gone."""
    reader, spec = HfReader(models(kind)), load_model_spec(models(kind))
    source = tensors_of(models(kind))
    for weight in weight_map(spec).values():
        parts = []
        for rows in weight.rows():
            if rows.hf is None:
                parts.append(torch.zeros(rows.count, *weight.shape[1:], dtype=torch.bfloat16))
            else:
                parts.append(source[rows.hf.name][rows.start : rows.stop])
            assert parts[-1].shape[0] == rows.count > 0
        full = torch.cat(parts)
        assert torch.equal(full, weight.to_megatron(reader.read_slice)), weight.name
        assert weight.places().keys() == {tensor.name for tensor in weight.hf}
        for name, places in weight.places().items():
            assert torch.equal(torch.cat([full[at : at + rows.count] for at, rows in places]), source[name])
            assert [rows.start for _, rows in places] == sorted(rows.start for _, rows in places)


@pytest.fixture(scope="module")
def sources(models: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[HfReader, Source]:
    """The same model in either format."""
    directory = tmp_path_factory.mktemp("mapping") / "mcore"
    to_mcore(models("qwen3"), directory)
    return HfReader(models("qwen3")), open_model(directory).source


@settings(deadline=None)
@given(data=st.data())
def test_either_format_gives_the_same_rows_and_slices(
    sources: tuple[HfReader, Source], data: st.DataObject
) -> None:
    hf, mcore = sources
    name = data.draw(st.sampled_from(sorted(hf.tensors)))
    shape = hf.shape(name)
    assert (mcore.shape(name), mcore.dtype(name)) == (shape, hf.dtype(name))
    axis = data.draw(st.integers(0, len(shape) - 1))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, shape[axis])] * 2)))
    found = mcore.read_slice(name, axis, start, stop)
    assert found.is_contiguous()
    assert torch.equal(found, hf.read(name).narrow(axis, start, stop - start))
    memory = torch.empty(min(2, shape[0]), *shape[1:], dtype=torch.bfloat16)
    first = data.draw(st.integers(0, shape[0] - memory.shape[0]))
    rows = mcore.read_rows(name, first, first + memory.shape[0], memory)
    assert rows.data_ptr() == memory.data_ptr()
    assert torch.equal(memory, hf.read_rows(name, first, first + memory.shape[0]))


def layer(spec: ModelSpec, name: str) -> Weight:
    return weight_map(spec)[f"decoder.layers.1.{name}"]


def test_qkv_is_interleaved_per_group(models: MakeModel) -> None:
    spec, source = load_model_spec(models("qwen3")), tensors_of(models("qwen3"))
    reader = HfReader(models("qwen3"))
    full = layer(spec, "self_attention.linear_qkv.weight").to_megatron(reader.read_slice)
    q, k, v = (source[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    # 8 heads of 6 in 4 groups: two query heads, then the group's key, then its value
    assert torch.equal(full[24:36], q[12:24])
    assert torch.equal(full[36:42], k[6:12])
    assert torch.equal(full[42:48], v[6:12])


def test_fc1_is_gate_over_up_on_every_rank(models: MakeModel) -> None:
    spec, source = load_model_spec(models("qwen3")), tensors_of(models("qwen3"))
    part = layer(spec, "mlp.linear_fc1.weight").to_megatron(HfReader(models("qwen3")).read_slice, 1, 2)
    gate, up = (source[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(part, torch.cat([gate[24:], up[24:]]))


def test_vocabulary_is_padded_with_zeros_for_any_rank_count(models: MakeModel) -> None:
    weight = weight_map(load_model_spec(models("qwen2")))["output_layer.weight"]
    assert isinstance(weight, Vocabulary)
    assert [weight.padded_rows(n) for n in (1, 2, 3, 64)] == [1024, 1024, 1152, 1024]
    reader = HfReader(models("qwen2"))
    last = weight.to_megatron(reader.read_slice, 63, 64)  # beyond the vocabulary altogether
    assert last.shape == (16, 32)
    assert not last.any()
