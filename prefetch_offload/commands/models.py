"""What `plan` needs to know about a model: built-in figures, or what a folder or the hub says without loading a weight."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import diffusers
from huggingface_hub import HfApi, hf_hub_download, parse_safetensors_file_metadata, try_to_load_from_cache
from safetensors import safe_open

from ..config import Settings
from ..errors import SettingError
from ..figures import MODELS
from ..shapes import Kind, Model, Part, blocks_of, idle
from ..units import Extent, cut, order_of_use

# Bits of an element, by the name that safetensors gives its type.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_DENOISERS = re.compile(r"(unet|transformer|prior|decoder|denoiser)(_\d+)?")
_DECODERS = re.compile(r"(vae|movq|vqgan|vqvae|audio_vae|vocoder)(_\d+)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_PLAIN = ("diffusion_pytorch_model", "model")

# Where the top-level children of a model stand in its forward, as far as names tell. Blocks go by their numbers.
_PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        r"shared|.*embed.*|.*_in|visual|quant_conv|caption_projection",
        r"encoder|down_blocks|text_model|model",
        r"mid_block|post_quant_conv|transformer_blocks|blocks|layers",
        r"decoder|up_blocks|single_transformer_blocks|single_blocks",
        r".*(out|final|head|norm).*|text_projection",
    )
)

Tensor = tuple[str, str, Sequence[int]]  # name, type, shape


def check_dtype(name: str | None) -> None:
    """`name`, as `--dtype` was given, is one of `DTYPES`, if it was. Before anything runs.

    Raises:
        SettingError: there is no such type.
    """
    if name is not None and name not in DTYPES:
        raise SettingError(f"--dtype {name}: give one of {', '.join(DTYPES)}.")


class Source(Protocol):
    """A pipeline's files, wherever they are."""

    label: str

    def index(self) -> dict[str, Any]:
        """model_index.json."""
        ...

    def files(self, component: str) -> list[str]:
        """Names of its safetensors files."""
        ...

    def tensors(self, component: str, file: str) -> list[Tensor]: ...


class Folder:
    """A folder in diffusers' format."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label

    def index(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "model_index.json").read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SettingError(f"--model {self.label}: its model_index.json is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise SettingError(f"--model {self.label}: its model_index.json holds no table of components.")
        return found

    def files(self, component: str) -> list[str]:
        return sorted(p.name for p in (self.path / component).glob("*.safetensors"))

    def tensors(self, component: str, file: str) -> list[Tensor]:
        path = self.path / component / file
        try:
            # Opening reads the header; a slice knows its shape before anything of it is read.
            with safe_open(path, framework="numpy") as opened:
                slices = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118, it is no dict
                return [(name, s.get_dtype(), s.get_shape()) for name, s in slices]
        except Exception as error:  # safetensors raises an exception of its own, and OSError
            raise SettingError(f"--model {self.label}: {component}/{file} cannot be read: {error}") from error


@contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Whatever keeps the hub from answering becomes one line."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # the base class of HTTP errors is another in each major version of huggingface_hub
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"--model {repo}: no folder here, not in the local cache, and the hub did not give it: {why} "
            f"Built-in figures: {', '.join(MODELS)}."
        ) from error


class Hub:
    """A repository of the hub, of which only JSON and headers are fetched."""

    def __init__(self, repo: str) -> None:
        self.label = repo
        with _asking(repo):
            self._files = [s.rfilename for s in HfApi().model_info(repo).siblings or []]

    def index(self) -> dict[str, Any]:
        if "model_index.json" not in self._files:
            raise SettingError(f"--model {self.label}: the repository has no model_index.json: no diffusers pipeline.")
        with _asking(self.label):
            return dict(json.loads(Path(hf_hub_download(self.label, "model_index.json")).read_text()))

    def files(self, component: str) -> list[str]:
        names = (f.removeprefix(component + "/") for f in self._files if f.startswith(component + "/"))
        return sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)

    def tensors(self, component: str, file: str) -> list[Tensor]:
        with _asking(self.label):
            header = parse_safetensors_file_metadata(self.label, f"{component}/{file}")
        return [(name, str(t.dtype), t.shape) for name, t in header.tensors.items()]


@dataclasses.dataclass(frozen=True)
class Known:
    """A model that can be planned for.

    Attributes:
        figures: the built-in ones: its own, or those of a model of the same pipeline class and about the same size.
        own: `figures` are its own.
        notes: what had to be assumed.
    """

    label: str
    pipeline: str
    parts: tuple[Part, ...]
    figures: Model | None = None
    own: bool = False
    notes: tuple[str, ...] = ()


def find(model: str, dtype: str | None) -> Known:
    """Built-in figures of that name, or a folder, or a model of the hub.

    Args:
        dtype: float weights count as if they were loaded in it; None: as they are stored.

    Raises:
        SettingError: there is no such model, or nothing can be told of it.
    """
    folder = Path(model)
    if model in MODELS and not folder.exists():
        if dtype is not None:
            raise SettingError(f"--dtype {dtype}: built-in figures have a dtype of their own; it is for folders.")
        own = MODELS[model]
        return Known(f"{own.title} ({own.output})", own.pipeline, own.parts, own, True)
    return read(_source(model, folder), dtype)


def _source(model: str, folder: Path) -> Source:
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not folder.is_dir():
            raise SettingError(f"--model {model}: there is no such folder.")
        if not (folder / "model_index.json").is_file():
            raise SettingError(
                f"--model {model}: the folder has no model_index.json, so it holds no diffusers pipeline."
            )
        return Folder(folder, model)
    if "/" not in model:
        raise SettingError(
            f"--model {model}: neither a folder here nor the name of built-in figures, which are {', '.join(MODELS)}."
        )
    with _asking(model):
        cached = try_to_load_from_cache(model, "model_index.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*/*.safetensors")):
        return Folder(Path(cached).parent, model)
    return Hub(model)


def read(source: Source, dtype: str | None) -> Known:
    """A pipeline from its index and its weights' headers.

    Raises:
        SettingError: it is no pipeline of diffusers, or it has no weights in safetensors.
    """
    index = source.index()
    pipeline = str(index.get("_class_name"))
    sequence = getattr(getattr(diffusers, pipeline, None), "model_cpu_offload_seq", None)
    if sequence is None:
        raise SettingError(
            f"--model {source.label}: {pipeline} is no pipeline of diffusers {diffusers.__version__} "
            "with an order of its components (model_cpu_offload_seq)."
        )
    listed = [n for n, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None]
    notes: list[str] = []
    parts: list[Part] = []
    for name in (n for n in sequence.split("->") if n in listed):
        part, variant = _part(source, name, dtype)
        if part is not None:
            parts.append(part)
        if variant:
            notes.append(f"{name}: the weights of variant {variant}")
    if not any(p.kind == "denoiser" for p in parts):
        raise SettingError(
            f"--model {source.label}: no unet, transformer or prior with weights in safetensors was found."
        )
    others = [n for n in listed if n not in sequence.split("->") and source.files(n)]
    if others:
        notes.append(f"left out, because model offload does not move them in turn: {', '.join(others)}")
    figures = _relative(pipeline, parts)
    if figures is not None:
        known = {p.name: p for p in figures.parts}
        parts = [
            dataclasses.replace(
                p,
                activation_nbytes=known[p.name].activation_nbytes,
                passes_per_step=known[p.name].passes_per_step,
                step_share=known[p.name].step_share,
            )
            if p.name in known
            else p
            for p in parts
        ]
        notes.append(f"activations and times are those of the built-in {figures.name}: a {pipeline} of about this size")
    return Known(source.label, pipeline, tuple(parts), figures, notes=tuple(notes))


def _relative(pipeline: str, parts: Sequence[Part]) -> Model | None:
    """Figures of the same class, if a denoiser has about their size: half to twice the parameters."""
    for model in MODELS.values():
        theirs = sum(p.parameters for p in model.parts if p.kind == "denoiser")
        mine = sum(p.parameters for p in parts if p.kind == "denoiser")
        if model.pipeline == pipeline and theirs / 2 <= mine <= theirs * 2:
            return model
    return None


def _part(source: Source, name: str, dtype: str | None) -> tuple[Part | None, str]:
    """A component, None without safetensors; and which variant of its weights was taken, if it had to be one."""
    files, variant = _chosen(source.files(name))
    if not files:
        return None, ""
    tensors = [t for file in files for t in source.tensors(name, file)]
    types = {d: sum(math.prod(s) for _, kind, s in tensors if kind == d) for d in {d for _, d, _ in tensors}}
    stored = max(types, key=types.__getitem__)
    kind = _kind(name)
    extents = [
        Extent(key, _nbytes(source, d, shape, dtype))
        for key, d, shape in sorted(tensors, key=lambda t: _position(t[0]))
    ]
    extents = [extents[i] for i in order_of_use([e.name for e in extents])]
    settings = Settings()
    layouts = cut([e for e in extents if e.nbytes], settings.unit_min, settings.unit_max)
    names = [e.name for e in extents if e.nbytes]
    units = [(u.name, u.nbytes, idle(kind, [names[p.extent] for p in u.placements])) for u in layouts]
    shown = dtype or {v: k for k, v in DTYPES.items()}.get(stored, stored)
    return Part(name, kind, shown, blocks_of(units), sum(types.values())), variant


def _chosen(files: Sequence[str]) -> tuple[list[str], str]:
    """The shards of one copy of the weights: the one without a variant, or the first variant there is."""
    copies: dict[str, list[str]] = {}
    for file in files:
        copies.setdefault(_SHARD.sub("", file.removesuffix(".safetensors")), []).append(file)
    for stem in _PLAIN:
        if stem in copies:
            return copies[stem], ""
    stem = min((s for s in copies if s.startswith(_PLAIN)), default="")
    return copies.get(stem, []), stem.partition(".")[2]


def _nbytes(source: Source, stored: str, shape: Sequence[int], dtype: str | None) -> int:
    kind = DTYPES[dtype] if dtype is not None and stored in _FLOATS else stored
    if kind not in _BITS:
        raise SettingError(f"--model {source.label}: tensors of type {kind} are not known here.")
    return math.prod(shape) * _BITS[kind] // 8


def _kind(name: str) -> Kind:
    if _DECODERS.fullmatch(name):
        return "decoder"
    return "denoiser" if _DENOISERS.fullmatch(name) else "encoder"


def _position(name: str) -> tuple[Any, ...]:
    """A sort key: safetensors keeps tensors by name, not in the order of the model."""
    top, _, _ = name.partition(".")
    place = next((i for i, pattern in enumerate(_PLACES) if pattern.fullmatch(top)), 2)
    return place, [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in name.split(".")]
