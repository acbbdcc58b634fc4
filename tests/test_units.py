"""How a component is cut: nothing lost, nothing twice, nothing overlapping, and of a useful size."""

from __future__ import annotations

from itertools import pairwise, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch_offload.units import ALIGNMENT, Extent, Placement, UnitLayout, align, block_of, cut, order_of_use

# Names as in real models: some outside of any block, some in blocks, some in blocks within blocks. A block's tensors
# mostly follow one another, but need not.
PREFIXES = ("", "norm.", "0.", "1.", "blocks.0.", "blocks.1.", "blocks.2.", "blocks.1.ff.net.0.", "up.0.resnets.1.")


Limits = tuple[int, int]  # unit_min, unit_max


@st.composite
def components(draw: st.DrawFn, smallest: int = 0) -> list[Extent]:
    sizes_of_run = st.lists(st.integers(smallest, 3000), min_size=1, max_size=5)
    runs = draw(st.lists(st.tuples(st.sampled_from(PREFIXES), sizes_of_run), max_size=8))
    sizes = [(prefix, nbytes) for prefix, run in runs for nbytes in run]
    return [Extent(f"{prefix}w{i}", nbytes) for i, (prefix, nbytes) in enumerate(sizes)]


@st.composite
def bounds(draw: st.DrawFn, smallest: int = 1) -> Limits:
    def size(least: int, most: int) -> int:
        """Any size, or one that is just reached by aligned extents."""
        whole = st.integers(-(-least // ALIGNMENT), most // ALIGNMENT).map(lambda n: n * ALIGNMENT)
        return draw(st.integers(least, most) | whole)

    unit_min = size(smallest, 6144)
    return unit_min, size(unit_min, 9216)


def room(extents: list[Extent], numbers: list[int]) -> int:
    """Bytes that these extents take one after the other."""
    return sum(align(extents[i].nbytes) for i in numbers)


def contents(unit: UnitLayout) -> list[int]:
    """The numbers of the extents in a unit."""
    return [placement.extent for placement in unit.placements]


def of_first_block(extents: list[Extent], numbers: list[int]) -> list[int]:
    """The first of these extents, and those that follow it in the same block."""
    return list(takewhile(lambda i: block_of(extents[i].name) == block_of(extents[numbers[0]].name), numbers))


def runs_of(extents: list[Extent]) -> list[list[int]]:
    """The numbers of neighbours in one block: an independent statement of what may not be split needlessly."""
    runs: list[list[int]] = []
    for i, extent in enumerate(extents):
        if runs and block_of(extents[i - 1].name) == block_of(extent.name):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


# ------------------------------------------------------------------------------------------------ layout of a unit
@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_every_extent_lies_in_exactly_one_unit_in_the_order_given(extents: list[Extent], limits: Limits) -> None:
    units = cut(extents, *limits)
    assert [i for unit in units for i in contents(unit)] == list(range(len(extents)))
    assert all(unit.placements for unit in units)


@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_extents_are_aligned_disjoint_and_inside_their_unit(extents: list[Extent], limits: Limits) -> None:
    for unit in cut(extents, *limits):
        end = 0
        for placement in unit.placements:
            assert placement.offset % ALIGNMENT == 0
            assert placement.offset >= end
            end = placement.offset + extents[placement.extent].nbytes
        assert end <= unit.nbytes
        assert unit.nbytes % ALIGNMENT == 0
        assert unit.nbytes > 0


@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_a_unit_takes_its_aligned_extents_and_no_more(extents: list[Extent], limits: Limits) -> None:
    for unit in cut(extents, *limits):
        assert unit.nbytes == (room(extents, contents(unit)) or ALIGNMENT)


@settings(deadline=None)
@given(extents=components(smallest=1), limits=bounds())
def test_a_component_without_empty_tensors_takes_its_aligned_extents(extents: list[Extent], limits: Limits) -> None:
    assert sum(unit.nbytes for unit in cut(extents, *limits)) == sum(align(e.nbytes) for e in extents)


@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_cutting_is_deterministic(extents: list[Extent], limits: Limits) -> None:
    assert cut(extents, *limits) == cut(tuple(extents), *limits)


# -------------------------------------------------------------------------------------------------- sizes of units
@settings(deadline=None)
@given(extents=components(), limits=bounds(smallest=ALIGNMENT))
def test_only_a_single_extent_makes_a_unit_larger_than_unit_max(extents: list[Extent], limits: Limits) -> None:
    unit_max = limits[1]
    for unit in cut(extents, *limits):
        assert unit.nbytes <= unit_max or len(unit.placements) == 1


@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_a_unit_is_smaller_than_unit_min_only_where_it_must_be(extents: list[Extent], limits: Limits) -> None:
    """It is the last one, or what cannot be split off the next one would make it larger than unit_max.

    What cannot be split: the next unit's leading run of extents of one block.
    """
    unit_min, unit_max = limits
    for unit, after in pairwise(cut(extents, *limits)):
        if unit.nbytes < unit_min:
            leading = of_first_block(extents, contents(after))
            assert room(extents, contents(unit)) + room(extents, leading) > unit_max


@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_blocks_are_joined_only_to_reach_unit_min(extents: list[Extent], limits: Limits) -> None:
    unit_min, _ = limits
    for unit in cut(extents, *limits):
        numbers = contents(unit)
        joined = [i for i in numbers[1:] if block_of(extents[i].name) != block_of(extents[i - 1].name)]
        for i in joined:
            assert room(extents, [j for j in numbers if j < i]) < unit_min


@settings(deadline=None)
@given(extents=components(), limits=bounds())
def test_a_block_is_split_only_if_it_is_larger_than_unit_max(extents: list[Extent], limits: Limits) -> None:
    unit_of = {i: number for number, unit in enumerate(cut(extents, *limits)) for i in contents(unit)}
    for run in runs_of(extents):
        if room(extents, run) <= limits[1]:
            assert len({unit_of[i] for i in run}) == 1


@settings(deadline=None)
@given(extents=components(smallest=1), limits=bounds())
def test_a_block_that_is_split_fills_its_pieces(extents: list[Extent], limits: Limits) -> None:
    """A piece ends only where the next extent of the block would not have fitted."""
    for unit, after in pairwise(cut(extents, *limits)):
        last, first = contents(unit)[-1], contents(after)[0]
        if block_of(extents[first].name) == block_of(extents[last].name):
            piece = of_first_block(extents, contents(unit)[::-1])
            assert room(extents, piece) + align(extents[first].nbytes) > limits[1]


# ------------------------------------------------------------------------------------------------------------- examples
def test_no_extents_make_no_units() -> None:
    assert cut([], 1, 1) == ()


def test_an_empty_tensor_alone_makes_the_smallest_unit() -> None:
    assert cut([Extent("empty", 0)], 1, ALIGNMENT) == (UnitLayout("rest", ALIGNMENT, (Placement(0, 0),)),)


def test_an_empty_tensor_among_others_takes_no_room() -> None:
    (unit,) = cut([Extent("a", 300), Extent("empty", 0), Extent("b", 1)], 4096, 4096)
    assert unit == UnitLayout("rest", 768, (Placement(0, 0), Placement(1, 512), Placement(2, 512)))


def test_a_unit_is_named_after_its_first_block() -> None:
    extents = [Extent("conv_in.weight", 256), Extent("blocks.0.w", 512), Extent("blocks.1.w", 512)]
    assert [(u.name, u.nbytes) for u in cut(extents, 512, 512)] == [("rest", 256), ("blocks.0", 512), ("blocks.1", 512)]
    assert [(u.name, u.nbytes) for u in cut(extents, 512, 1024)] == [("rest", 768), ("blocks.1", 512)]


def test_bounds_may_be_met_exactly() -> None:
    extents = [Extent(f"blocks.{i}.w", 256) for i in range(5)]
    assert [contents(unit) for unit in cut(extents, 512, 512)] == [[0, 1], [2, 3], [4]]
    assert [contents(unit) for unit in cut(extents, 513, 768)] == [[0, 1, 2], [3, 4]]
    assert [contents(unit) for unit in cut(extents, 513, 767)] == [[0, 1], [2, 3], [4]]


def test_a_large_block_is_split_at_tensors_and_a_large_tensor_is_not() -> None:
    extents = [Extent(f"blocks.0.w{i}", nbytes) for i, nbytes in enumerate([256, 512, 256, 2048, 256])]
    assert [contents(unit) for unit in cut(extents, 256, 768)] == [[0, 1], [2], [3], [4]]


@settings(deadline=None)
@given(nbytes=st.integers(0, 2**50), alignment=st.sampled_from([1, 8, 256, 512]))
def test_align_rounds_up_to_the_next_multiple(nbytes: int, alignment: int) -> None:
    aligned = align(nbytes, alignment)
    assert aligned % alignment == 0
    assert 0 <= aligned - nbytes < alignment


@pytest.mark.parametrize(
    ("name", "block"),
    [
        # SDXL and SD 1.5 (UNet2DConditionModel, AutoencoderKL, CLIPTextModel)
        ("conv_in.weight", ""),
        ("time_embedding.linear_1.bias", ""),
        ("down_blocks.0.resnets.1.conv1.weight", "down_blocks.0.resnets.1"),
        ("down_blocks.0.downsamplers.0.conv.weight", "down_blocks.0.downsamplers.0"),
        ("mid_block.attentions.0.proj_in.weight", "mid_block.attentions.0"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight",
         "up_blocks.1.attentions.2.transformer_blocks.0"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.weight",
         "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0"),
        ("decoder.up_blocks.3.resnets.0.norm1.weight", "decoder.up_blocks.3.resnets.0"),
        ("text_model.encoder.layers.11.mlp.fc1.weight", "text_model.encoder.layers.11"),
        # Flux, SD3, Wan, T5
        ("transformer_blocks.18.ff_context.net.2.bias", "transformer_blocks.18.ff_context.net.2"),
        ("single_transformer_blocks.37.proj_mlp.weight", "single_transformer_blocks.37"),
        ("blocks.39.scale_shift_table", "blocks.39"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.block.0.layer.0"),
        ("pos_embed.proj.weight", ""),
        # a component that is itself a Sequential or a ModuleList
        ("0.weight", "0"),
        ("10.conv.weight", "10"),
        ("3.blocks.2.weight", "3.blocks.2"),
        # digits that are no child's number, and a ParameterList's own entries
        ("linear_1.weight", ""),
        ("block2.conv1.weight", ""),
        ("scales.0", ""),
        ("blocks.4.scales.0", "blocks.4"),
        ("0", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_block_of_real_names(name: str, block: str) -> None:
    assert block_of(name) == block


# ------------------------------------------------------------------ order of use
def used(*names: str) -> list[str]:
    return [names[i] for i in order_of_use(names)]


def test_what_a_block_calls_in_turns_comes_in_turns() -> None:
    block = "up_blocks.0."
    defined = ["attentions.0.a", "attentions.0.b", "attentions.1.a", "resnets.0.a", "resnets.1.a", "resnets.2.a", "up.0.a"]
    called = ["resnets.0.a", "attentions.0.a", "attentions.0.b", "resnets.1.a", "attentions.1.a", "resnets.2.a", "up.0.a"]
    assert used("conv_in", *(block + n for n in defined), "conv_out") == ["conv_in", *(block + n for n in called), "conv_out"]


def test_motion_comes_behind_what_it_moves() -> None:
    assert used("b.attentions.0.w", "b.attentions.1.w", "b.resnets.0.w", "b.resnets.1.w", "b.motion_modules.0.w") == [
        "b.resnets.0.w", "b.attentions.0.w", "b.motion_modules.0.w", "b.resnets.1.w", "b.attentions.1.w",
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "decoder."])
def test_a_u_nets_middle_comes_before_what_is_behind_it(prefix: str) -> None:
    defined = ("in", "down_blocks.0.w", "up_blocks.0.w", "up_blocks.1.w", "mid_block.w", "out")
    called = ("in", "down_blocks.0.w", "mid_block.w", "up_blocks.0.w", "up_blocks.1.w", "out")
    assert used(*(prefix + n for n in defined)) == [prefix + n for n in called]


@pytest.mark.parametrize(
    "names",
    [
        ("embed", "transformer_blocks.0.w", "transformer_blocks.1.w", "single_transformer_blocks.0.w", "out"),
        ("down_blocks.0.w", "mid_block.w", "up_blocks.0.w"),
        ("resnets", "resnets.w", "attentions.first.w"),  # no lists: named so by chance
    ],
)
def test_anything_else_stays_as_it_is_defined(names: tuple[str, ...]) -> None:
    assert used(*names) == list(names)


@given(components())
def test_every_tensor_is_used_once(extents: list[Extent]) -> None:
    assert sorted(order_of_use([e.name for e in extents])) == list(range(len(extents)))
