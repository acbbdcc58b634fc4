"""Windows: what stays, what passes through, and that neither is ever more than its share."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch_offload.window import Share, Window, share_of

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def named(sizes: list[int]) -> dict[str, int]:
    return {f"u{i:02}": nbytes for i, nbytes in enumerate(sizes)}


@st.composite
def shares(draw: st.DrawFn) -> tuple[dict[str, int], Share]:
    """Units, and a share in which the largest of those that are streamed has room."""
    nbytes = named(draw(SIZES))
    units = list(nbytes)
    keep = draw(st.frozensets(st.sampled_from(units), max_size=len(units) - 1))
    streamed = [u for u in units if u not in keep]
    kept = sum(nbytes[u] for u in keep)
    limit = kept + max(nbytes[u] for u in streamed) + draw(st.integers(0, 20))
    late = draw(st.frozensets(st.sampled_from(streamed)))
    head = draw(st.none() | st.frozensets(st.sampled_from(streamed)))
    if head is not None and sum(nbytes[u] for u in head) > limit - kept:
        head = None
    return nbytes, Share(limit, keep, head=head, late=late)


@settings(deadline=None, max_examples=150)
@given(shares(), st.integers(1, 5))
def test_the_window_is_never_more_than_its_limit_and_every_unit_is_there_when_it_is_read(
    case: tuple[dict[str, int], Share], passes: int
) -> None:
    nbytes, share = case
    window = Window(list(nbytes), nbytes, share)
    device: set[str] = set()

    def carry_out(drops: list[str], loads: list[str]) -> None:
        for unit in drops:
            device.remove(unit)
        for unit in loads:
            assert unit not in device
            device.add(unit)
        assert device == window.held
        assert window.held_nbytes == sum(nbytes[u] for u in device) <= window.limit_nbytes

    for unit in window.first():
        window.arrived(unit)
        device.add(unit)
    for number in range(passes):
        last = number == passes - 1
        for unit in window.order:
            carry_out(*window.need(unit))
            assert unit in device
            drops, loads = window.done(unit, last)
            carry_out(drops, loads)
            if last:
                assert not {u for u in loads if u <= unit}, "not read again"
    assert window.finished()


@settings(deadline=None, max_examples=100)
@given(shares())
def test_nothing_is_dropped_unless_a_load_takes_its_place(case: tuple[dict[str, int], Share]) -> None:
    nbytes, share = case
    window = Window(list(nbytes), nbytes, share)
    for number in range(3):
        for unit in window.order:
            window.need(unit)
            drops, loads = window.done(unit, number == 2)
            assert not drops or loads


@settings(deadline=None, max_examples=150)
@given(SIZES, st.integers(0, 100), st.integers(1, 30), st.booleans())
def test_a_share_keeps_what_fits_beside_its_window(sizes: list[int], limit: int, window: int, measured: bool) -> None:
    nbytes = named(sizes)
    compute = {u: float(b) if measured else 0.0 for u, b in nbytes.items()}
    must = frozenset(list(nbytes)[:1])
    share = share_of(list(nbytes), nbytes, compute, limit, window, must)
    kept = sum(nbytes[u] for u in share.keep)
    assert must <= share.keep
    if sum(sizes) <= limit:
        assert share.keep == frozenset(nbytes)
    else:
        assert kept <= max(limit - window, nbytes["u00"])


def test_streamed_units_are_spread_over_a_pass() -> None:
    nbytes = named([1] * 12)
    share = share_of(list(nbytes), nbytes, dict.fromkeys(nbytes, 1.0), 9, 1)
    assert sorted(set(nbytes) - share.keep) == ["u01", "u04", "u07", "u10"]


def test_two_slots_load_behind_what_is_read() -> None:
    nbytes = named([1] * 4)
    window = Window(list(nbytes), nbytes, Share(2, frozenset()))
    assert window.head() == window.first() == ("u00", "u01")
    for unit in window.first():
        window.arrived(unit)
    assert window.need("u00") == ([], [])
    assert window.done("u00", False) == (["u00"], ["u02"])
    assert window.done("u01", False) == (["u01"], ["u03"])
    assert window.done("u02", False) == (["u02"], ["u00"]), "the next pass begins with it"
    assert window.done("u03", True) == ([], []), "no pass follows"
    assert window.finished()


def test_a_last_pass_is_not_finished_before_its_last_unit_is_on_its_way() -> None:
    """Also while units that stay are read at its beginning, the window having been at its end a moment ago."""
    nbytes = named([1, 3, 3])
    window = Window(list(nbytes), nbytes, Share(4, frozenset(["u00"])))
    window.arrived("u01")
    window.done("u01", False)
    assert window.need("u02") == ([], [])
    window.done("u02", False)  # u01 comes for the last pass
    assert window.held == {"u01"}
    assert not window.finished(), "u02 is missing"
    window.done("u01", True)
    assert window.finished()


def test_several_used_units_make_room_for_a_large_one_the_latest_first() -> None:
    nbytes = {"a": 1, "b": 1, "c": 1, "large": 3}
    window = Window(list(nbytes), nbytes, Share(3, frozenset()))
    for unit in window.first():
        window.arrived(unit)
    assert window.done("a", False) == ([], []), "two more have to go"
    assert window.done("b", False) == ([], [])
    assert window.done("c", False) == (["c", "b", "a"], ["large"])


def test_a_late_unit_waits_for_the_one_before_it() -> None:
    nbytes = named([2, 1, 2, 1])
    window = Window(list(nbytes), nbytes, Share(5, frozenset(), head=frozenset(["u00", "u02"]), late=frozenset(["u03"])))
    assert window.head() == ("u00", "u02")
    assert window.first() == ("u00", "u01", "u02")
    for unit in window.first():
        window.arrived(unit)
    assert window.done("u00", False) == ([], [])
    assert window.done("u01", False) == ([], [])
    assert window.done("u02", False)[1] == ["u03"]


def test_what_is_read_together_stays_together() -> None:
    nbytes = named([1, 1, 1])
    window = Window(list(nbytes), nbytes, Share(2, frozenset()))
    window.arrived("u00")
    window.arrived("u01")
    assert window.need("u02", frozenset(["u01"])) == (["u00"], ["u02"])


def test_a_unit_that_is_done_with_out_of_order_does_not_turn_the_clock_back() -> None:
    """One that several modules read, of which another unit's is called last."""
    nbytes = named([1] * 6)
    window = Window(list(nbytes), nbytes, Share(3, frozenset()))
    for unit in window.first():
        window.arrived(unit)
    window.begin()
    assert window.done("u01", False) == (["u01"], ["u03"])
    assert window.done("u00", False) == (["u00"], ["u04"]), "not u01 again, which this pass has read"


def test_one_that_is_done_with_late_does_not_keep_the_others_from_making_room() -> None:
    """u02 is read again behind u04, as one that holds the end of one block and the beginning of another is: it is the last
    used, and is used again before the one that is missing; u04 is used again after that."""
    nbytes = named([1] * 5)
    window = Window(list(nbytes), nbytes, Share(4, frozenset()))
    for unit in ("u00", "u01", "u02", "u04"):
        window.arrived(unit)
    window.begin()
    window.done("u04", last=True)
    assert window.done("u02", last=False) == (["u04"], ["u03"])
