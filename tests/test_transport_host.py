"""What weights that travel encoded leave in host memory: what travels, and not the weights themselves beside it."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, weight_nbytes
from test_transport_codecs import UNITS, build, draw, encoded_units, resident, small_chunks
from torch import nn

import prefetch_offload
from prefetch_offload import OffloadWarning, SettingError, originals
from prefetch_offload.adoption import build_units
from prefetch_offload.config import MIB, Settings
from prefetch_offload.host import Pins, Slab
from prefetch_offload.loading import SlabUnit
from prefetch_offload.masters import Master
from prefetch_offload.originals import FileSlab, file_slab, folder_for, why_not

__all__ = ["small_chunks"]  # for every test here, too

on_files = pytest.mark.skipif(folder_for("file") is None, reason="no directory on a disk here")


# ------------------------------------------------------------------------------- how much
_MEASURE = """
    import gc, sys, ctypes, torch
    import prefetch_offload
    from prefetch_offload.testing import load
    from prefetch_offload.testing.pipelines import scaled
    def memory(what):
        lines = dict(l.split(":", 1) for l in open("/proc/self/status") if l.startswith("Vm"))
        return int(lines[what].split()[0]) << 10

    def settled():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return memory("VmRSS")

    load()
    case = scaled("sdxl", width=256, vae_width=8, text_width=64, text_layers=1)
    case.build(dtype=torch.bfloat16)  # imports
    before = settled()
    pipe = case.build(dtype=torch.bfloat16)
    held = settled()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    offload = prefetch_offload.enable(pipe, device="simgpu", transport=sys.argv[1], unit_max=24 << 20)
    peak, enabled = memory("VmHWM"), settled()
    stats = offload.stats
    figures = [before, held, peak, enabled, sum(c.host_nbytes for c in stats.components)]
    figures += [sum(c.filed_nbytes for c in stats.components), stats.pinned_nbytes]
    offload.disable()
    print(*figures, settled())
"""


@on_files
@pytest.mark.parametrize(("way", "share"), [("fp8", 0.52), ("packed", 0.77)])
def test_host_memory_is_that_of_what_travels(way: str, share: float) -> None:
    """The process's memory: with the weights, while they are encoded one unit at a time, enabled, and after disabling."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), way], capture_output=True, text=True, check=True, timeout=300
    )
    before, held, peak, enabled, host, filed, pinned, after = map(int, run.stdout.split()[-8:])
    weights = held - before
    assert weights > 100 * MIB, "or the rest of the process hides it"
    slack = 12 * MIB  # libraries that are used for the first time, and what the allocators keep
    assert enabled - before <= share * weights + slack
    # one unit in memory, in its file, encoded, and that in pinned memory; no second copy of the model
    assert peak - held <= 4 * 24 * MIB + slack < weights / 2
    assert host == pinned <= share * weights and filed >= 0.9 * weights
    assert after - before <= weights + slack


# ------------------------------------------------------------------- what programs see of it
@on_files
@pytest.mark.parametrize("way", ["packed", "fp8"])
def test_weights_in_files_are_tensors_like_any_others(way: str, sim: Any, enable: Any, tmp_path: Path) -> None:
    pipe = build("flux")
    objects = dict(weights_of(pipe))
    before = {key: p.detach().clone() for key, p in objects.items()}
    opened = len(os.listdir("/proc/self/fd"))
    offload = enable(pipe, transport=way, **UNITS)
    assert all(isinstance(u.slab, FileSlab) for u in encoded_units(offload)) and encoded_units(offload)
    draw("flux", pipe)

    def same(shown: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(before[f"transformer.{key}"], p) for key, p in shown.items())

    transformer = pipe.transformer
    shown = dict(transformer.named_parameters())
    assert all(shown[key] is objects[f"transformer.{key}"] for key in shown) and same(shown)
    assert same(transformer.state_dict()) and same(dict(copy.deepcopy(transformer).named_parameters()))
    assert same(pickle.loads(pickle.dumps(dict(shown))))
    transformer.save_pretrained(tmp_path)
    assert same(dict(type(transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).named_parameters()))
    assert {u.encodings for u in encoded_units(offload)} == {1}
    draw("flux", pipe)
    assert {u.encodings for u in encoded_units(offload)} == {1}, "being read is no change"
    offload.disable()
    assert all(p is objects[key] and torch.equal(p, before[key]) for key, p in weights_of(pipe))
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[1][3] == "s"]  # shared
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    lying = [key for key, p in weights_of(pipe) if any(lo <= p.data_ptr() < hi for lo, hi in spans)]
    assert lying == [], "in ordinary memory"
    assert len(os.listdir("/proc/self/fd")) <= opened


def weights_of(pipe: Any) -> list[tuple[str, torch.Tensor]]:
    """The Parameter objects themselves."""
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    return [(f"{n}.{key}", p) for n, m in modules.items() for key, p in m.named_parameters()]


@on_files
def test_any_write_to_a_file_is_seen(sim: Any, enable: Any) -> None:
    """One element in between the words that fingerprints sample, without a mark, even with fingerprints off."""
    pipe = build("flux")
    offload = enable(pipe, transport="packed", fingerprints=False, **UNITS)
    before = draw("flux", pipe)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    weight.data[1:9] = 4.0
    offload.release()
    after = draw("flux", pipe)
    assert sum(u.encodings - 1 for u in encoded_units(offload)) == 1
    offload.disable()
    assert after != before and after == draw("flux", pipe.to(DEVICE))


@on_files
def test_a_slab_in_a_file_tells_writes_from_reads(tmp_path: Path) -> None:
    where = str(tmp_path) if why_not(str(tmp_path)) is None else str(folder_for("file"))
    slab = file_slab(3 << 20, where)
    assert slab is not None and not slab.pinned
    slab.bytes.fill_(7)
    part = slab.view(1 << 20, 64)
    for round in range(3):
        slab.mark()
        assert int(slab.bytes.sum()) == 7 * (3 << 20) + 2 * round and slab.touched is False
        part[5] += 2
        assert slab.touched is True
        slab.let_go()
        assert part[5] == 9 + 2 * round, "it was not lost with the page"
    fd = slab._fd
    os.fstat(fd)
    del slab
    assert part[5] == 13, "views keep the memory"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    begin = f"{part.data_ptr() - (1 << 20):x}-"
    assert begin in Path("/proc/self/maps").read_text()
    del part
    assert begin not in Path("/proc/self/maps").read_text()


def test_where_a_file_tells_nothing_fingerprints_do(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "_tells_writes", lambda folder: False)
    pipe = build("flux")
    offload = enable(pipe, transport="packed", **UNITS)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    images = []
    for count in range(2):  # the first time before anything has travelled
        weight.data *= 2.0
        images.append(draw("flux", pipe))
        assert draw("flux", pipe) == images[-1]
        assert sum(u.encodings - 1 for u in encoded_units(offload)) == count + 1
    offload.disable()
    pipe.to(DEVICE)
    assert images[0] != images[1] == draw("flux", pipe)
    pipe.transformer.transformer_blocks[0].attn.to_q.weight.data /= 2.0
    assert images[0] == draw("flux", pipe)


_DESCRIPTORS = """
    import os, resource, sys, warnings, numpy, torch
    import prefetch_offload
    from prefetch_offload.encoded import EncodedUnit
    from prefetch_offload.originals import FileSlab
    from prefetch_offload.testing import load
    from prefetch_offload.testing.pipelines import CASES

    def draw(pipe):
        return numpy.asarray(CASES["flux"].call(pipe, seed=0)).tobytes()

    def double(pipe):
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.attn.to_q.weight.data *= 2.0

    load()
    warnings.simplefilter("error", prefetch_offload.OffloadWarning)
    pipe = CASES["flux"].build(dtype=torch.bfloat16).to("simgpu")
    expected = [draw(pipe)]
    double(pipe)
    expected.append(draw(pipe))
    pipe = CASES["flux"].build(dtype=torch.bfloat16)
    opened = len(os.listdir("/proc/self/fd"))
    limit = opened + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    offload = prefetch_offload.enable(pipe, device="simgpu", transport="packed", unit_min=1 << 10, unit_max=64 << 10)
    units = [u for c in offload._session.client.components.values() for u in c.units if isinstance(u, EncodedUnit)]
    used = len(os.listdir("/proc/self/fd")) - opened
    files, telling = sum(isinstance(u.slab, FileSlab) for u in units), sum(u._tells for u in units)
    count = len(units)
    own = [open("/dev/null") for _ in range(limit // 4)]
    images = [draw(pipe)]
    double(pipe)
    images.append(draw(pipe))
    assert images == expected and expected[0] != expected[1]
    offload.disable()
    del units, own
    print(limit, count, files, telling, used, len(os.listdir("/proc/self/fd")) - opened)
"""


@on_files
@pytest.mark.parametrize("more", [40, 4000])
def test_files_leave_the_program_descriptors(more: int) -> None:
    """Those of which there is no descriptor hold weights all the same, and writes to them are seen by their fingerprints."""
    command = [sys.executable, "-c", textwrap.dedent(_DESCRIPTORS), str(more)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    limit, units, files, telling, used, after = map(int, run.stdout.split()[-6:])
    assert files == units > 20, "all of them in files"
    assert used == telling <= limit / 4 + 1 and after == 0
    assert (telling == files) == (more == 4000), "one each, where there are enough"


# ------------------------------------------------------------------ where there can be no file
def test_without_a_place_for_files_memory_holds_both_with_one_warning(
    sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "_warned", set())
    monkeypatch.setattr(originals, "_SPARED", 1 << 60)
    pipe = build("flux")
    with pytest.warns(OffloadWarning, match=r"the host holds both: .*(GiB free|no directory).*originals=") as caught:
        offload = enable(pipe, transport="packed", **UNITS)
    assert len(caught) == 1
    stats = offload.stats
    assert all(c.filed_nbytes == 0 and c.host_nbytes >= c.link_nbytes for c in stats.components)
    assert sum(c.host_nbytes for c in stats.components) > 1.5 * weight_nbytes(pipe)
    assert draw("flux", pipe) == resident("flux")[0]


def test_originals_in_memory_is_a_setting(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OffloadWarning)
        offload = enable(pipe, transport="packed", originals="memory", **UNITS)
    assert encoded_units(offload) and not any(isinstance(u.slab, FileSlab) for u in encoded_units(offload))
    assert draw("flux", pipe) == resident("flux")[0]
    if folder_for("file") is not None:
        enable(pipe, transport="packed", **UNITS)
        assert all(isinstance(u.slab, FileSlab) for u in encoded_units(offload)), "another setting takes them in anew"
        assert draw("flux", pipe) == resident("flux")[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "originals=3: give 'file', 'memory', or a directory"),
        ("/nowhere/at/all", r"originals='/nowhere/at/all': .*Give a directory on a disk"),
        ("/proc", r"originals='/proc': .*Give a directory on a disk"),
    ],
)
def test_places_that_do_not_serve_are_refused(given: Any, message: str, sim: Any) -> None:
    pipe = build("flux")
    with pytest.raises(SettingError, match=message):
        prefetch_offload.enable(pipe, device=DEVICE, transport="packed", originals=given, **UNITS)
    assert not hasattr(pipe.transformer, "_hf_hook")
    with pytest.raises(SettingError, match=message):
        prefetch_offload.install(transport="packed", originals=given)


# --------------------------------------------------------------------------- what goes with it
def test_raw_units_have_nothing_in_files(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    offload = enable(pipe, originals="/nowhere/at/all", **UNITS)  # not looked at: nothing travels encoded
    stats = offload.stats
    assert all(c.filed_nbytes == 0 for c in stats.components)
    assert sum(c.host_nbytes for c in stats.components) == stats.pinned_nbytes


def test_a_unit_that_is_given_up_leaves_masters_alone_that_another_has_taken_in(
    sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a unit of which one tensor was replaced, the others move on to a new unit; what the old one gives up is its own."""
    monkeypatch.setattr(Pins, "pin", Pins._pin_by_copy)  # unpinning moves
    for way in ("raw", "packed"):
        pipe = build("flux")
        offload = enable(pipe, transport=way, **UNITS)
        draw("flux", pipe)
        attention = pipe.transformer.transformer_blocks[0].attn
        attention.to_q.weight.data = attention.to_q.weight.data * 0.5
        draw("flux", pipe)
        with torch.no_grad():
            attention.to_k.weight.mul_(3.0)
        units = [u for c in offload._session.client.components.values() for u in c.units if isinstance(u, SlabUnit)]
        for unit in units:
            lo, hi = unit.slab.bytes.data_ptr(), unit.slab.bytes.data_ptr() + unit.slab.nbytes
            assert all(lo <= m.tensor.data_ptr() < hi for m in unit.masters)
        after = draw("flux", pipe)
        offload.disable()
        assert after == draw("flux", pipe.to(DEVICE))


@on_files
def test_a_pipeline_that_is_gone_copies_nothing_back(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    pipe = build("flux")
    offload = prefetch_offload.enable(pipe, device=DEVICE, transport="packed", **UNITS)
    draw("flux", pipe)
    kept = pipe.transformer.proj_out.weight
    value = kept.detach().clone()
    made: list[int] = []
    slab_init = Slab.__init__

    @functools.wraps(slab_init)
    def init(self: Slab, nbytes: int) -> None:
        made.append(nbytes)
        slab_init(self, nbytes)

    monkeypatch.setattr(Slab, "__init__", init)
    engine = offload._engine
    del pipe, offload
    gc.collect()
    with engine._held(), engine._change:
        pass
    assert not engine.live() and made == []
    assert torch.equal(kept, value), "what someone kept is as it was"


def test_pieces_are_told_apart_from_what_lies_between(sim: Any) -> None:
    """On the device, bytes between pieces are whatever was there: no weight that was written."""
    module = nn.Sequential(nn.Linear(96, 64), nn.BatchNorm1d(33), nn.Linear(33, 64)).to(torch.bfloat16)
    masters = [Master(t, n, []) for n, t in (*module.named_parameters(), *module.named_buffers())]
    settings = Settings.make(transport="packed", unit_min=1 << 20, unit_max=1 << 20)
    from prefetch_offload.codecs import Packed

    device = torch.device(DEVICE, 0)
    (unit,) = build_units("m#0", masters, settings, Pins(device), Packed())
    unit.allocate(device)
    unit.bytes.zero_()  # type: ignore[attr-defined]
    unit.lay_table(device)  # type: ignore[attr-defined]
    from prefetch_offload_kernels import cast_unit

    staged = unit.source.bytes.to(device)  # type: ignore[attr-defined]
    cast_unit(unit.table, staged, unit.bytes)  # type: ignore[attr-defined]
    unit.remember()  # type: ignore[attr-defined]
    assert unit.rewritten() == []  # type: ignore[attr-defined]
    unit.bytes.fill_(255)  # type: ignore[attr-defined]
    cast_unit(unit.table, staged, unit.bytes)  # type: ignore[attr-defined]
    assert unit.rewritten() == []  # type: ignore[attr-defined]
    for master in unit.masters:
        assert master.twin is not None
        if master.twin.numel():
            master.twin.data.view(-1)[-1] += 3
    assert {m.name for m in unit.rewritten()} == {m.name for m in unit.masters}  # type: ignore[attr-defined]
    unit.free()
    unit.retire()
