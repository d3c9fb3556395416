"""The rank grid: which degrees are refused, where ranks sit, which layers they hold."""

from itertools import chain, product
from typing import Any

import pytest

from engine.config.parallel import ParallelLayout, RankPlace
from engine.errors import ConfigError
from tests.support.layouts import degrees


def resolve(*, layers: int = 8, world: int = 8, **short: Any) -> ParallelLayout:
    return ParallelLayout.resolve(degrees(**short), num_layers=layers, world_size=world)


@pytest.mark.parametrize(
    ("degrees", "named"),
    [
        ({"tp": 0}, "tensor_model_parallel_size must be at least 1, not 0"),
        ({"pp": -1}, "pipeline_model_parallel_size must be at least 1, not -1"),
        ({"vpp": -2, "pp": 2}, "virtual_pipeline_model_parallel_size must be at least 1, not -2"),
        ({"vpp": 0, "pp": 2}, "virtual_pipeline_model_parallel_size must be at least 1, not 0"),
        ({"ep": 0}, "expert_model_parallel_size must be at least 1, not 0"),
        ({"etp": 0}, "expert_tensor_parallel_size must be at least 1, not 0"),
        ({"cp": 0}, "context_parallel_size must be at least 1, not 0"),
        ({"cp": 3}, "8 processes do not hold TP 1 x PP 1 x CP 3"),
        ({"ep": 3}, "the 8 ranks of a pipeline stage cannot be dealt to expert_model_parallel_size 3"),
        ({"etp": 16}, "expert_tensor_parallel_size 16; choose divisors"),
        ({"ep": 4, "pp": 4}, "the 2 ranks of a pipeline stage cannot be dealt to"),
        ({"vpp": 2}, "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of at least 2"),
        ({"tp": 3}, "8 processes do not hold TP 3 x PP 1 x CP 1 = 3 ranks; start a multiple of 3 processes"),
        ({"tp": 4, "pp": 4}, "8 processes do not hold TP 4 x PP 4 x CP 1 = 16 ranks"),
        ({"sp": True}, "sequence_parallel needs tensor_model_parallel_size of at least 2"),
        ({"tp": 2, "sp": False}, "sequence_parallel cannot be switched off"),
        ({"pp": 8, "layers": 7}, "7 layers cannot fill 8 pipeline chunks"),
        ({"pp": 2, "vpp": 5}, "8 layers cannot fill 10 pipeline chunks"),
        (
            {"pp": 2, "split": [8]},
            "decoder_layers_per_stage [8] must be 2 positive numbers that add up to 8 layers",
        ),
        ({"pp": 2, "split": [4, 5]}, "decoder_layers_per_stage [4, 5] must be 2 positive numbers"),
        ({"pp": 2, "split": [8, 0]}, "decoder_layers_per_stage [8, 0] must be 2 positive numbers"),
        ({"pp": 2, "split": [9, -1]}, "decoder_layers_per_stage [9, -1] must be 2 positive numbers"),
        ({"pp": 2, "vpp": 2, "split": [4, 4]}, "decoder_layers_per_stage [4, 4] must be 4 positive numbers"),
        ({"split": []}, "decoder_layers_per_stage [] must be 1 positive numbers"),
    ],
)
def test_refusals_name_option_and_number(degrees: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**degrees)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_is_data_parallelism() -> None:
    assert resolve().dp == 8
    layout = resolve(tp=2, pp=2)
    assert (layout.dp, layout.sequence_parallel) == (2, True)
    assert resolve(tp=8, sp=True).dp == 1
    assert not resolve(pp=8).sequence_parallel


@pytest.mark.parametrize(
    ("layers", "degrees", "counts"),
    [
        (8, {}, (8,)),
        (8, {"pp": 2}, (4, 4)),
        (8, {"pp": 2, "vpp": 2}, (2, 2, 2, 2)),
        (8, {"pp": 2, "vpp": 1}, (4, 4)),
        # The first chunk has the embedding and the last one the loss: spare layers go to the middle, then to
        # the first.
        (9, {"pp": 2}, (5, 4)),
        (9, {"pp": 4}, (2, 3, 2, 2)),
        (10, {"pp": 4}, (2, 3, 3, 2)),
        (11, {"pp": 4}, (3, 3, 3, 2)),
        (10, {"pp": 2, "vpp": 2}, (2, 3, 3, 2)),
        (4, {"pp": 4}, (1, 1, 1, 1)),
        (8, {"pp": 2, "split": [3, 5]}, (3, 5)),
        (8, {"pp": 2, "vpp": 2, "split": [1, 2, 3, 2]}, (1, 2, 3, 2)),
    ],
)
def test_layers_are_split(layers: int, degrees: dict[str, Any], counts: tuple[int, ...]) -> None:
    assert resolve(layers=layers, **degrees).layers_per_chunk == counts


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
def test_every_layer_is_held_once_and_in_order(pp: int, vpp: int) -> None:
    for layers in range(pp * vpp, 40):
        layout = resolve(layers=layers, pp=pp, vpp=vpp)
        assert max(layout.layers_per_chunk) - min(layout.layers_per_chunk) <= 1
        chunks = [layout.chunks_of(rank) for rank in range(pp)]
        assert all(len(held) == vpp for held in chunks)
        in_pipeline_order = [chunks[c % pp][c // pp] for c in range(pp * vpp)]
        assert list(chain(*in_pipeline_order)) == list(range(layers))


def test_virtual_chunks_alternate_between_the_ranks() -> None:
    layout = resolve(layers=8, pp=2, vpp=2, split=[1, 2, 3, 2])
    assert layout.chunks_of(0) == [range(1), range(3, 6)]
    assert layout.chunks_of(1) == [range(1, 3), range(6, 8)]


@pytest.mark.parametrize(("tp", "cp", "dp", "pp"), list(product([1, 2, 3], [1, 2], [1, 3], [1, 2, 4])))
def test_places_follow_megatrons_order(tp: int, cp: int, dp: int, pp: int) -> None:
    """tp-cp-dp-pp: counted up with tensor ranks fastest and pipeline ranks slowest."""
    layout = resolve(tp=tp, cp=cp, pp=pp, world=tp * cp * dp * pp)
    expected, rank = {}, 0
    for p in range(pp):
        for d in range(dp):
            for c in range(cp):
                for t in range(tp):
                    expected[rank] = RankPlace(tp=t, cp=c, dp=d, pp=p)
                    rank += 1
    assert {r: layout.place(r) for r in range(layout.world_size)} == expected


def test_megatron_layout_names_every_layer() -> None:
    assert resolve().megatron_layout() is None
    assert resolve(layers=3, pp=2, world=2).megatron_layout() == [
        ["embedding", "decoder", "decoder"],
        ["decoder", "loss"],
    ]
    assert resolve(layers=4, pp=2, vpp=2, world=2).megatron_layout() == [
        ["embedding", "decoder"],
        ["decoder"],
        ["decoder"],
        ["decoder", "loss"],
    ]


def test_interleaving_needs_groups_of_micro_batches() -> None:
    layout = resolve(pp=4, vpp=2)
    layout.check_micro_batches(8)
    with pytest.raises(ConfigError, match="multiples of pipeline_model_parallel_size 4, not 6"):
        layout.check_micro_batches(6)
    resolve(pp=4).check_micro_batches(6)


def test_summary() -> None:
    assert resolve(tp=2, pp=2).summary() == "8 ranks = TP 2 x PP 2 x CP 1 x DP 2, sequence parallel on"
    assert (
        resolve(pp=2, vpp=2).summary() == "8 ranks = TP 1 x PP 2 x VPP 2 x CP 1 x DP 4, sequence parallel off"
    )


def test_grid_shows_every_rank_with_its_layers() -> None:
    lines = resolve(layers=8, tp=2, pp=2).grid().splitlines()
    assert [line.split() for line in lines] == [
        ["pp0", "dp0", "layers", "0-3", "ranks", "0", "1"],
        ["pp0", "dp1", "layers", "0-3", "ranks", "2", "3"],
        ["pp1", "dp0", "layers", "4-7", "ranks", "4", "5"],
        ["pp1", "dp1", "layers", "4-7", "ranks", "6", "7"],
    ]
    assert "layers 0-1 + 4-5" in resolve(pp=2, vpp=2).grid()


def test_a_large_grid_is_cut() -> None:
    lines = resolve(world=64).grid(max_rows=4).splitlines()
    assert len(lines) == 5
    assert lines[-1] == "  ... 60 more rows"
    assert len(resolve(world=4).grid(max_rows=4).splitlines()) == 4


def test_multiples_let_every_rank_have_equal_parts() -> None:
    plain, cut = resolve(tp=2), resolve(tp=2, cp=4)
    assert (plain.document_multiple, plain.micro_batch_multiple) == (1, 2)
    assert (cut.document_multiple, cut.micro_batch_multiple) == (8, 16)
