"""Pipelines that share components and were enabled with different transports: what is promised exact is exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE
from diffusers import FluxPipeline
from test_transport_codecs import UNITS, build, draw, encoded_units, fp8_rounded, resident, small_chunks, weights

from prefetch_offload import OffloadWarning

__all__ = ["small_chunks"]  # for every test here, too

NOT_APPLIED = r"transformer is shared .*'fp8' is not applied to it, since another one is enabled with 'raw'"


def ways(offload: Any) -> set[str]:
    """Components that travel encoded."""
    return {u.key.split("#")[0] for u in encoded_units(offload)}


def transformer_rounded(pipe: Any) -> None:
    fp8_rounded(SimpleNamespace(components={"transformer": pipe.transformer}))


def test_a_lossy_way_does_not_reach_what_another_pipeline_wants_exact(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    before = [p.clone() for _, p in weights(pipe)]
    first = enable(pipe, transport="raw", **UNITS)
    assert draw("flux", pipe) == resident("flux")[0]
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with pytest.warns(OffloadWarning, match=NOT_APPLIED):
        second = enable(other, transport={"transformer": "fp8"}, **UNITS)
    for seed in range(2):
        assert draw("flux", pipe, seed) == draw("flux", other, seed) == resident("flux")[seed]
    first.disable()
    assert draw("flux", other) == resident("flux", transformer_rounded)[0], "nobody else wants them exact any more"
    second.disable()
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, weights(pipe), strict=True))


def test_a_pipeline_that_stays_gets_its_own_way_back(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    first = enable(pipe, transport={"transformer": "fp8", "default": "packed"}, **UNITS)
    lossy = draw("flux", pipe)
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with pytest.warns(OffloadWarning, match=NOT_APPLIED):
        second = enable(other, transport="raw", **UNITS)
    assert draw("flux", other) == draw("flux", pipe) == resident("flux")[0] != lossy
    assert not ways(first) and not ways(second)
    second.disable()
    assert draw("flux", pipe) == lossy
    assert "transformer" in ways(first)


def test_a_component_that_is_shown_by_hand_travels_exactly_too(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    before = [p.clone() for _, p in weights(pipe)]
    enable(pipe, transport={"text_encoder_2": "fp8", "default": "raw"}, **UNITS)
    with torch.no_grad():
        pipe.text_encoder_2(torch.arange(9, device=DEVICE)[None])
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with pytest.warns(OffloadWarning, match="text_encoder_2 is shared .*'fp8' is not applied"):
        second = enable(other, transport="raw", **UNITS)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, weights(pipe), strict=True))
    assert not ways(second)
    assert [draw("flux", other, seed) for seed in range(3)] == resident("flux")


def test_a_component_that_is_given_to_another_pipeline(sim: Any, enable: Any) -> None:
    """By assignment, without enabling anything anew."""
    lossy, exact = build("flux"), build("flux")
    enable(lossy, transport={"transformer": "fp8", "default": "raw"}, **UNITS)
    enable(exact, transport="raw", **UNITS)
    with pytest.warns(OffloadWarning, match=NOT_APPLIED):
        exact.transformer = lossy.transformer
    assert draw("flux", exact) == resident("flux")[0]
