"""Kernels that turn a unit as it travelled into the unit as it is used, in one launch; each with its reference beside it.

``cast_unit`` converts, scales, copies and unpacks all tensors of a unit from a staging buffer into their places; ``pack_bf16``
makes bfloat16 weights a quarter smaller without losing a bit. With Triton on CUDA, with PyTorch's operators elsewhere.
"""

from __future__ import annotations

from .errors import FormatError, KernelWarning, TableError
from .launch import available, cast_unit, prepare, unpack, workspace_nbytes
from .packing import PackedHeader, Survey, pack_bf16, packing_workspace_nbytes, read_header, survey_bf16
from .reference import cast_unit_reference, unpack_reference
from .table import PACKED_BF16, Descriptor, Table, build_table

__all__ = [
    "PACKED_BF16",
    "Descriptor",
    "FormatError",
    "KernelWarning",
    "PackedHeader",
    "Survey",
    "Table",
    "TableError",
    "available",
    "build_table",
    "cast_unit",
    "cast_unit_reference",
    "pack_bf16",
    "packing_workspace_nbytes",
    "prepare",
    "read_header",
    "survey_bf16",
    "unpack",
    "unpack_reference",
    "workspace_nbytes",
]
