"""Settings: parsed and checked once, at the boundary, then frozen."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal

from .errors import SettingError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_SCALE = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-z]*)\s*", re.IGNORECASE)

Budget = int | Literal["stock"] | None


def told(nbytes: float) -> str:
    """A size in words: in GiB, or in MiB where that would be next to nothing."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 or not nbytes else f"{nbytes / MIB:.2f} MiB"


def parse_nbytes(value: int | str, what: str) -> int:
    """Bytes from an integer or a text such as ``"12GiB"``, ``"500 MB"`` or ``"4096"``.

    Args:
        value: the size. GB means 10**9 bytes and GiB 2**30.
        what: the name of the setting, for the message.

    Raises:
        SettingError: not a size, or not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SettingError(
            f"{what}={value!r} is of type {type(value).__name__}: give bytes as an int, or a text such as '12GiB'."
        )
    if isinstance(value, int):
        nbytes = value
    else:
        match = _SIZE.fullmatch(value)
        unit = match.group(2).lower() if match else ""
        if match is None or unit not in _SCALE:
            raise SettingError(f"{what}={value!r} is not a size: write it like '12GiB', '500MB' or 4096 (bytes).")
        nbytes = int(Fraction(match.group(1)) * _SCALE[unit])  # exact, unlike float
    if nbytes <= 0:
        raise SettingError(f"{what}={value!r} is less than one byte: give a positive size, or leave it out.")
    return nbytes


class Way:
    """What `transport` may be besides a name: `prefetch_offload.Codec` is its one subclass. Here, since it needs no torch."""

    lossless = False


# What `transport` may be: how weights lie in pinned host memory and travel. The dtypes go by torch's names for them.
TRANSPORTS = ("raw", "packed", "fp8", "int8", "auto")
LOSSLESS = ("raw", "packed", "auto")  # of these: what arrives is the weights, bit for bit
TRANSPORT_DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
# What people write for these.
_MEANT = {
    "fp16": "float16", "half": "float16", "f16": "float16", "bf16": "bfloat16", "e4m3": "float8_e4m3fn",
    "e4m3fn": "float8_e4m3fn", "float8_e4m3": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2",
    "fp8_e5m2": "float8_e5m2", "float8": "fp8", "none": "raw",
}  # fmt: skip
_ALLOWED = (
    f"{', '.join(map(repr, TRANSPORTS))}, one of {', '.join('torch.' + d for d in TRANSPORT_DTYPES)} or its name as a text, a "
    "`prefetch_offload.Codec`"
)

# One way for all components, or pairs of a component's name (or "default") and its way.
Transport = str | Way | tuple[tuple[str, str | Way], ...]


def parse_transport(value: Any) -> Transport:
    """How weights travel: a name, a torch dtype, a codec, or a mapping from components' names and ``"default"`` to these.

    Raises:
        SettingError: with what is allowed.
    """
    if not isinstance(value, Mapping):
        return _parse_way(value, "transport")
    if not value:
        raise SettingError(f"transport={value!r} names no component: leave it out, or give a way for one, or for 'default'.")
    for name in value:
        if not isinstance(name, str):
            raise SettingError(f"transport={value!r}: its keys are names of components, or 'default'; {name!r} is neither.")
    ways = {name: _parse_way(way, f"transport[{name!r}]") for name, way in value.items()}
    return tuple(sorted(ways.items(), key=lambda item: item[0]))


def _parse_way(value: Any, what: str) -> str | Way:
    if isinstance(value, Way):
        return value
    is_dtype = type(value).__module__ == "torch" and type(value).__name__ == "dtype"
    name = str(value) if is_dtype or isinstance(value, str) else ""
    dtype = name.removeprefix("torch.")
    if dtype in TRANSPORT_DTYPES:
        return dtype
    if name in TRANSPORTS:
        return name
    near = _MEANT.get(dtype.lower()) or next(
        iter(difflib.get_close_matches(dtype.lower(), (*TRANSPORTS, *TRANSPORT_DTYPES), n=1)), ""
    )
    if isinstance(value, type) and issubclass(value, Way):
        hint = " This is a class: give an instance of it."
    else:
        hint = f" Did you mean {near!r}?" if near else ""
    raise SettingError(f"{what}={value!r} is no way to move weights: give {_ALLOWED}, or a mapping per component.{hint}")


def parse_budget(value: int | str | None) -> Budget:
    """The device budget: bytes, ``"stock"``, or None for what is free on the device less the reserve."""
    if value is None or value == "stock":
        return value  # type: ignore[return-value]
    return parse_nbytes(value, "budget")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user can set. All sizes in bytes.

    Attributes:
        budget: device bytes for weights and activations together; ``"stock"``: never above what stock model offload
            would use; None: what is free on the device, less `reserve`.
        prefetch: copy the next components in while the current one runs.
        pin: keep the host masters in pinned memory. False: pageable masters behind a small pinned staging ring.
        pinned_limit: at most this many bytes of pinned host memory; None: what the host can spare.
        reserve: with ``budget=None``, device bytes left to others; None: the larger of 256 MiB and 4% of the device, and at
            most a tenth of it.
        unit_min, unit_max: a unit, the smallest thing moved together, is cut between these sizes where the model allows.
        staging: size of the pinned ring used for masters that could not be pinned.
        fingerprints: compare sampled bytes of each cached unit with its master at a component's first entry in a call,
            so that a write that leaves no other mark (``weight.data += delta``) is seen. About 1 ms per GB.
        strategy: how shares of the device are planned, a callable as in `prefetch_offload.strategy`; None: `balanced`.
        transport: how weights travel to the device, one way for all or ``{component: way, "default": way}``. ``"raw"``: as
            they are. ``"packed"``: bfloat16 weights losslessly in three quarters of their bytes, unpacked on arrival;
            float32 ones that a 16-bit type holds exactly as that.
            ``"fp8"``, ``"int8"``: float8 e4m3 or int8 with a scale per output channel, as `prefetch_offload.Quantized`; norms,
            embeddings, the layers that diffusers' layerwise casting skips, vectors and small tensors stay raw; results change.
            A torch dtype (``torch.float16``) or its name: wider weights travel as that and are cast back on arrival.
            ``"auto"``: packed where it was measured to be faster, else raw. A `prefetch_offload.Codec`: as that says.
            What `state_dict` shows and `disable` leaves stays exact, and changes made between calls are encoded again; only
            the device works with what lossy ways leave of them.
        originals: where the host's weights lie whose encoded bytes are in pinned memory. ``"file"``: in files without a name
            in the first of the temporary directory, ``/var/tmp`` and ``~/.cache`` that is on a disk with room for them, as
            long as the pipeline is enabled. A directory: there. ``"memory"``: in ordinary memory, so that the host holds both.
        transport_overflow: let a dtype that `transport` names turn finite weights into infinities, or into the
            largest number of one without infinities, instead of refusing it.
        strict_compile: a recompile or a graph break while a component runs is an error (`RecompileError`), raised once its call
            has returned.
        stable_addresses: every unit keeps its device address for life, as CUDA graphs need. Where the device has no virtual
            memory for it (CUDA with cuda-bindings), all units take device memory for good, within the budget. None: for
            components that are compiled with CUDA graphs.
        expandable_segments: let PyTorch's allocator for CUDA put free pieces of device memory together, for the whole process,
            as long as the pipeline is enabled. None: where its weights take more than half of what it may use, and nobody has
            decided otherwise by PYTORCH_CUDA_ALLOC_CONF. False: leave the allocator as it is.
        verify: record every stream operation and check it for hazards (`Offload.hazards`). Slow; for tests.
    """

    budget: Budget = None
    prefetch: bool = True
    pin: bool = True
    pinned_limit: int | None = None
    reserve: int | None = None
    unit_min: int = 16 * MIB
    unit_max: int = 256 * MIB
    staging: int = 64 * MIB
    fingerprints: bool = True
    strategy: Callable[..., Any] | None = None
    transport: Transport = "raw"
    originals: str = "file"
    transport_overflow: bool = False
    strict_compile: bool = False
    stable_addresses: bool | None = None
    expandable_segments: bool | None = None
    verify: bool = False

    @classmethod
    def make(cls, budget: int | str | None = None, **settings: Any) -> Settings:
        """Settings from what a user wrote.

        Raises:
            SettingError: an unknown name (the nearest known one is named), or a value that cannot be used.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {"budget": parse_budget(budget)}
        for name, value in settings.items():
            if name not in known or name == "budget":
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean `{near[0]}`?" if near else f" Known settings: {', '.join(sorted(known))}."
                raise SettingError(f"enable() has no setting `{name}`.{hint}")
            if known[name].type in ("int", "int | None"):
                if value is None and known[name].type == "int | None":
                    values[name] = None
                else:
                    values[name] = parse_nbytes(value, name)
            elif name == "strategy":
                if value is not None and not callable(value):
                    raise SettingError(f"strategy={value!r}: give a callable (workload, budget_nbytes, link) -> shares.")
                values[name] = value
            elif known[name].type == "bool | None" and value is None:
                values[name] = None
            elif name == "originals":
                if not isinstance(value, str | os.PathLike):
                    raise SettingError(f"originals={value!r}: give 'file', 'memory', or a directory.")
                values[name] = os.fspath(value)
            elif name == "transport":
                values[name] = parse_transport(value)
            elif not isinstance(value, bool):
                how = ", or None to have it found out" if known[name].type == "bool | None" else ""
                raise SettingError(f"{name}={value!r}: give True or False{how}.")
            else:
                values[name] = value
        made = cls(**values)
        if made.unit_min > made.unit_max:
            raise SettingError(f"unit_min={made.unit_min} is above unit_max={made.unit_max}: make it smaller.")
        return made

    def is_lossless(self, component: str) -> bool:
        """The device works with a component's weights as they are, bit for bit."""
        way = self.transport_of(component)
        return way.lossless if isinstance(way, Way) else way in LOSSLESS

    def transport_of(self, component: str) -> str | Way:
        """How the weights of a component travel."""
        if isinstance(self.transport, str | Way):
            return self.transport
        ways = dict(self.transport)
        return ways.get(component, ways.get("default", "raw"))
