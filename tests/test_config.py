"""Settings: what is accepted and means what it says; what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch_offload.config import GIB, KIB, MIB, Settings, Way, parse_budget, parse_nbytes
from prefetch_offload.errors import OffloadError, SettingError

BYTES_OF = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def refusal(budget: Any = None, **values: Any) -> str:
    """The message with which these settings are refused."""
    with pytest.raises(SettingError) as caught:
        Settings.make(budget, **values)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- accepted
@settings(deadline=None)
@given(
    count=st.integers(1, 10**18),
    unit=st.sampled_from(sorted(BYTES_OF)),
    spaces=st.tuples(*[st.sampled_from(["", " ", "  ", "\t"])] * 3),
    spelling=st.sampled_from([str, str.lower, str.upper, str.swapcase]),
)
def test_a_whole_number_of_any_unit_is_read_exactly(
    count: int, unit: str, spaces: tuple[str, str, str], spelling: Any
) -> None:
    text = f"{spaces[0]}{count}{spaces[1]}{spelling(unit)}{spaces[2]}"
    assert parse_nbytes(text, "budget") == count * BYTES_OF[unit]


@settings(deadline=None)
@given(whole=st.integers(0, 10**6), tenths=st.integers(0, 999_999), unit=st.sampled_from(["KB", "MB", "GB", "TB"]))
def test_a_decimal_fraction_is_rounded_down_to_bytes(whole: int, tenths: int, unit: str) -> None:
    millionths = whole * 10**6 + tenths
    expected = millionths * BYTES_OF[unit] // 10**6
    if expected:
        assert parse_nbytes(f"{whole}.{tenths:06d} {unit}", "budget") == expected


@settings(deadline=None)
@given(nbytes=st.integers(1, 2**80))
def test_an_integer_is_bytes(nbytes: int) -> None:
    assert parse_nbytes(nbytes, "budget") == nbytes
    assert parse_nbytes(str(nbytes), "budget") == nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GiB", 12 * GIB),
        ("500 MB", 500_000_000),
        ("4096", 4096),
        ("1.5gib", 3 * GIB // 2),
        ("0.29GB", 290_000_000),
        ("2KIB", 2 * KIB),
        ("7b", 7),
    ],
)
def test_examples_of_sizes(text: str, nbytes: int) -> None:
    assert parse_nbytes(text, "budget") == nbytes


def test_the_budget_may_be_left_out_or_follow_stock() -> None:
    assert parse_budget(None) is None
    assert parse_budget("stock") == "stock"
    assert parse_budget("1KiB") == 1024
    assert Settings.make().budget is None
    assert Settings.make("stock").budget == "stock"


def test_every_setting_is_taken_over() -> None:
    values: dict[str, Any] = {
        "prefetch": False, "pin": False, "pinned_limit": "3GiB", "reserve": 5, "unit_min": "1MiB", "unit_max": "2MiB",
        "staging": "8MiB", "fingerprints": False, "strategy": max, "transport": "packed", "originals": "memory",
        "transport_overflow": True,
        "strict_compile": True, "stable_addresses": True, "expandable_segments": True, "verify": True,
    }  # fmt: skip
    assert values.keys() | {"budget"} == {f.name for f in dataclasses.fields(Settings)}
    made = Settings.make("1GB", **values)
    sizes = (10**9, False, False, 3 * GIB, 5, MIB, 2 * MIB, 8 * MIB)
    assert made == Settings(*sizes, False, max, "packed", "memory", True, True, True, True, True)


def test_nothing_set_means_the_defaults() -> None:
    assert Settings() == Settings(
        budget=None, prefetch=True, pin=True, pinned_limit=None, reserve=None, unit_min=16 * MIB, unit_max=256 * MIB,
        staging=64 * MIB, fingerprints=True, strategy=None, transport="raw", originals="file", transport_overflow=False,
        strict_compile=False, stable_addresses=None, expandable_segments=None, verify=False,
    )  # fmt: skip
    assert Settings.make() == Settings()
    assert Settings.make(pinned_limit=None, reserve=None, stable_addresses=None, expandable_segments=None) == Settings()


def test_equal_unit_sizes_are_fine() -> None:
    assert Settings.make(unit_min=MIB, unit_max=MIB).unit_max == MIB


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.make().budget = 1  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(("value", "kind"), [(1.5e9, "float"), (True, "bool"), ([1], "list"), (b"1GB", "bytes")])
def test_refused_wrong_type_of_size(value: Any, kind: str) -> None:
    message = refusal(value)
    assert message == f"budget={value!r} is of type {kind}: give bytes as an int, or a text such as '12GiB'."


@pytest.mark.parametrize("name", ["unit_min", "unit_max", "staging"])
def test_refused_none_where_a_size_is_needed(name: str) -> None:
    assert refusal(**{name: None}).startswith(f"{name}=None is of type NoneType: give bytes")


@pytest.mark.parametrize("value", [0, -1, "0", "0GiB", "0.0", "0.4", "0.0004KB"])
def test_refused_less_than_a_byte(value: Any) -> None:
    assert refusal(value) == f"budget={value!r} is less than one byte: give a positive size, or leave it out."


@pytest.mark.parametrize("value", ["12XB", "12 G", "12gibb", "GiB", "", "STOCK", "-1GB", "1e9", "1,5GB", "1.GB"])
def test_refused_not_a_size(value: str) -> None:
    assert refusal(value) == f"budget={value!r} is not a size: write it like '12GiB', '500MB' or 4096 (bytes)."


def test_refused_a_text_of_digits_beyond_all_reason() -> None:
    for digits in (400, 5000):
        assert "is not a size" in refusal("9" * digits)


def test_refused_stock_where_it_means_nothing() -> None:
    for name in ("reserve", "pinned_limit", "staging", "unit_min"):
        assert refusal(**{name: "stock"}).startswith(f"{name}='stock' is not a size")


def test_refused_unknown_setting_names_the_near_miss() -> None:
    assert refusal(prefech=True) == "enable() has no setting `prefech`. Did you mean `prefetch`?"
    assert refusal(budgett="1GB") == "enable() has no setting `budgett`. Did you mean `budget`?"


def test_refused_unknown_setting_without_a_near_miss_names_all() -> None:
    message = refusal(zzz=1)
    assert message.startswith("enable() has no setting `zzz`. Known settings: ")
    named = re.findall(r"\w+", message.partition("Known settings: ")[2])
    assert named == sorted(f.name for f in dataclasses.fields(Settings))


@pytest.mark.parametrize("name", ["prefetch", "pin", "fingerprints", "strict_compile", "verify"])
@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_refused_not_a_bool(name: str, value: Any) -> None:
    assert refusal(**{name: value}) == f"{name}={value!r}: give True or False."


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_refused_neither_a_bool_nor_nothing(value: Any) -> None:
    message = f"stable_addresses={value!r}: give True or False, or None to have it found out."
    assert refusal(stable_addresses=value) == message


def test_refused_unit_min_above_unit_max() -> None:
    message = refusal(unit_min="2MiB", unit_max="1MiB")
    assert message == f"unit_min={2 * MIB} is above unit_max={MIB}: make it smaller."


def test_refused_unit_max_below_the_default_unit_min() -> None:
    assert refusal(unit_max="1MiB").startswith(f"unit_min={16 * MIB} is above unit_max={MIB}")


@settings(deadline=None)
@given(value=st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary()))
def test_whatever_is_given_is_a_budget_or_a_refusal(value: Any) -> None:
    refused = ""
    try:
        budget = parse_budget(value)
    except SettingError as error:
        refused = str(error)
    else:
        assert budget is None or budget == "stock" or (type(budget) is int and budget > 0)
    assert not refused or refused.startswith(f"budget={value!r}")


def test_a_refusal_is_a_value_error_and_one_of_ours() -> None:
    assert issubclass(SettingError, ValueError)
    assert issubclass(SettingError, OffloadError)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("BF16", "bfloat16"), ("float8", "fp8"),
        ("e4m3", "float8_e4m3fn"), ("float8_e5m3", "float8_e5m2"), ("pack", "packed"), ("PACKED", "packed"), ("int4", "int8"),
        ("torch.float16 ", "float16"),
    ],
)  # fmt: skip
def test_refused_unknown_transport_names_the_near_miss(given: str, meant: str) -> None:
    message = refusal(transport=given)
    assert message.startswith(f"transport={given!r} is no way to move weights: give 'raw', ")
    assert "or its name as a text" in message and message.endswith(f" Did you mean {meant!r}?")
    assert refusal(transport={"vae": given}).startswith(f"transport['vae']={given!r} is no way")


def test_refused_unknown_transport_without_a_near_miss() -> None:
    assert refusal(transport="zip").endswith("or a mapping per component.")


def test_refused_a_mapping_of_nothing() -> None:
    assert refusal(transport={}).startswith("transport={} names no component: leave it out")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_dtype_may_be_a_text(name: str) -> None:
    assert Settings.make(transport=name).transport == Settings.make(transport=f"torch.{name}").transport == name


@pytest.mark.parametrize("name", ["torch.raw", "torch.fp8"])
def test_refused_a_dtype_that_torch_does_not_have(name: str) -> None:
    assert f"transport={name!r} is no way" in refusal(transport=name)


def test_a_way_of_ones_own_is_taken_as_it_is() -> None:
    own = Way()
    made = Settings.make(transport={"vae": own, "default": "raw"})
    assert made.transport_of("vae") is own and made.transport_of("unet") == "raw"
    assert Settings.make(transport=own).transport_of("unet") is own
    assert made == Settings.make(transport={"default": "raw", "vae": own}) != Settings.make(transport={"vae": Way()})
