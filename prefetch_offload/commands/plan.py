"""`prefetch-offload plan`: what calls would take, in which memory, over which link. Predicted: no device is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import GIB, parse_nbytes, told
from ..errors import SettingError
from ..shapes import Kind, workload_of
from ..simulator import Link, Workload
from ..strategy import CallPlan, plan_call, stock_ms
from . import curve, models, picture

DEFAULT_LINK_GBPS = 25.0  # PCIe 4 x16, pinned: 24.8 published
# Stock offload copies from and to pageable memory. Published figures imply 0.6 to 2.2 GB/s for the way in and out together
# (SD3 on an A100, Flux on an H100); these two give 1.5.
PAGEABLE_IN_GBPS, PAGEABLE_OUT_GBPS = 6.0, 2.0
GRID = 7  # budgets from the smallest to all of it, when none are given
# For a model that no built-in figures are near to. Of the largest denoiser's bytes; published: 2% (Flux) to 6% (SDXL).
ASSUMED_ACTIVATIONS = 0.1
ASSUMED_STEPS = 30
ASSUMED_TIMES = (0.5, 2.0)  # encode and decode, in steps


@dataclasses.dataclass(frozen=True)
class Request:
    """The command's options. None and (): what the figures say, or a default that is printed."""

    model: str
    budgets: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    steps: int | None = None
    step_ms: float | None = None
    encode_ms: float | None = None
    decode_ms: float | None = None
    activations: float | None = None
    dtype: str | None = None
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One prediction.

    Attributes:
        exposed_s: what the call takes longer than its compute.
        copied_gbps, link_use: what the link really carries over the whole call, and the part of the call in which it copies.
        gap: how much longer than the limit, as a fraction.
        stock_s, resident_s: the call in these ways; None: that does not fit.
    """

    budget_nbytes: int
    link_gbps: float
    seconds: float
    exposed_s: float
    h2d_nbytes: int
    copied_gbps: float
    link_use: float
    peak_nbytes: int
    limit_s: float
    gap: float
    stock_s: float | None
    resident_s: float | None


@dataclasses.dataclass(frozen=True)
class Outlook:
    """All predictions for a model.

    Attributes:
        assumptions: what they rest on, each a line to print.
        stock_nbytes, resident_nbytes: device memory of these ways of running.
        plans: in the order of `rows`.
    """

    label: str
    workload: Workload
    assumptions: tuple[str, ...]
    stock_nbytes: int
    resident_nbytes: int
    rows: tuple[Row, ...]
    plans: tuple[CallPlan, ...]

    @property
    def resident_s(self) -> float:
        return self.workload.compute_ms / 1e3

    def stock_s(self, link_gbps: float) -> float:
        return stock_ms(self.workload, min(PAGEABLE_IN_GBPS, link_gbps), min(PAGEABLE_OUT_GBPS, link_gbps)) / 1e3


def check(request: Request) -> tuple[list[int], list[float]]:
    """Budgets in bytes and links in GB/s, smallest first.

    Raises:
        SettingError: a number that cannot be.
    """
    links = [_number("--link", text) for given in request.links for text in given.split(",")]
    for option, value in (
        ("--step-ms", request.step_ms),
        ("--encode-ms", request.encode_ms),
        ("--decode-ms", request.decode_ms),
        ("--activations", request.activations),
        *(("--link", gbps) for gbps in links),
    ):
        positive = option in ("--step-ms", "--link")
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and not positive))):
            raise SettingError(
                f"{option} {value:g}: give a {'positive number' if positive else 'number that is not negative'}."
            )
    if request.steps is not None and request.steps < 1:
        raise SettingError(f"--steps {request.steps}: give at least one.")
    models.check_dtype(request.dtype)
    if request.out is not None:
        picture.require_folder(request.out)
    texts = [text.strip() for given in request.budgets for text in given.split(",")]
    budgets = sorted({parse_nbytes(text, "--budget") for text in texts})
    return budgets, sorted(set(links)) or [DEFAULT_LINK_GBPS]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingError(f"{option} {text.strip()!r}: give a number of GB/s, like 25 or 12,25,55.") from None


def look(request: Request) -> Outlook:
    """Everything that the command prints.

    Raises:
        SettingError: an option, or a model, that cannot be used.
        BudgetError: a budget that the call cannot run in; the smallest is named.
    """
    budgets, links = check(request)
    known = models.find(request.model, request.dtype)
    workload, assumptions = _call(known, request)
    parts = workload.components.values()
    stock = max(c.total_nbytes + c.activation_nbytes for c in parts)
    resident = sum(c.total_nbytes for c in parts) + max(c.activation_nbytes for c in parts)
    look = Outlook(known.label, workload, tuple(assumptions), stock, resident, (), ())
    plans = [
        plan_call(workload, budget, Link(gbps))
        for gbps in links
        for budget in budgets or grid(workload.smallest_budget_nbytes, stock, resident)
    ]
    return dataclasses.replace(look, plans=tuple(plans), rows=tuple(_row(look, plan) for plan in plans))


def _call(known: models.Known, request: Request) -> tuple[Workload, list[str]]:
    figures = known.figures
    if figures is None and request.step_ms is None:
        raise SettingError(
            f"--model {request.model}: there are no built-in figures for a {known.pipeline} of this size: "
            "give --step-ms, the time of one denoising step on your GPU with all weights on it."
        )
    step_ms = request.step_ms if request.step_ms is not None else figures.step_ms if figures else 0.0
    # Encoding and decoding were not measured on the GPU of --step-ms: they are scaled with it.
    scale = step_ms / figures.step_ms if figures else 1.0
    encode, decode = (
        (figures.encode_ms, figures.decode_ms) if figures else (ASSUMED_TIMES[0] * step_ms, ASSUMED_TIMES[1] * step_ms)
    )
    steps = request.steps or (figures.steps if figures else ASSUMED_STEPS)
    encode_ms = encode * scale if request.encode_ms is None else request.encode_ms
    decode_ms = decode * scale if request.decode_ms is None else request.decode_ms

    def given(value: object, text: str) -> str:
        return "given" if value is not None else text

    sizes = ", ".join(f"{p.name} {p.total_nbytes / 1e9:.3g}" for p in known.parts)
    dtypes = " and ".join(dict.fromkeys(p.dtype for p in known.parts))
    assumed = [
        f"weights: {sizes} GB ({dtypes})",
        f"a step: {step_ms:g} ms ({given(request.step_ms, figures.step_source if figures else '')})",
        f"steps: {steps} ({given(request.steps, 'default')})",
    ]
    source = (
        (figures.times_source if scale == 1 else "built-in, scaled as the step") if figures else "assumed, in steps"
    )
    for option, value, ms in (("encode", request.encode_ms, encode_ms), ("decode", request.decode_ms, decode_ms)):
        assumed.append(f"{option}: {ms:.0f} ms ({given(value, source)})")

    overrides: dict[Kind, int] = {}
    largest = max(p.total_nbytes for p in known.parts if p.kind == "denoiser")
    if request.activations is not None:
        overrides["denoiser"] = round(request.activations * GIB)
        source = "given"
    elif figures is None:
        overrides["denoiser"] = round(largest * ASSUMED_ACTIVATIONS)
        source = "assumed: a tenth of its weights; see --activations"
    else:
        source = "built-in, see prefetch_offload/figures.py"
    workload = workload_of(known.parts, steps, step_ms, encode_ms, decode_ms, overrides)
    for kind in ("denoiser", "decoder"):
        most = max((workload.components[p.name].activation_nbytes for p in known.parts if p.kind == kind), default=0)
        text = source if kind == "denoiser" else "built-in" if figures else "not known: counted as nothing"
        assumed.append(f"activations of the {kind}: {told(most)} ({text})")
    assumed.append(
        f"stock offload: pageable copies at {PAGEABLE_IN_GBPS:g} GB/s in and {PAGEABLE_OUT_GBPS:g} out "
        "(assumed; hosts differ much)"
    )
    return workload, assumed + list(known.notes)


def _row(look: Outlook, plan: CallPlan) -> Row:
    budget, prediction = plan.budget_nbytes, plan.prediction
    return Row(
        budget,
        plan.link.gbps,
        prediction.call_ms / 1e3,
        max(0.0, prediction.call_ms - look.workload.compute_ms) / 1e3,
        prediction.h2d_nbytes,
        prediction.link_gbps,
        prediction.link_use,
        prediction.peak_nbytes,
        plan.bound_ms / 1e3,
        # Rounded: sums of the same times in another order differ in their last digits.
        round(prediction.call_ms / plan.bound_ms - 1, 6) + 0.0 if plan.bound_ms > 0 else 0.0,
        look.stock_s(plan.link.gbps) if budget >= look.stock_nbytes else None,
        look.resident_s if budget >= look.resident_nbytes else None,
    )


def grid(smallest: int, stock: int, resident: int) -> list[int]:
    """Budgets from the smallest that works to the one that holds everything, in equal ratios; stock's is among them."""
    ratio = (resident / smallest) ** (1 / (GRID - 1))
    return sorted({_rounded(n) for n in (*(smallest * ratio**i for i in range(GRID)), stock)})


def _rounded(nbytes: float) -> int:
    """Up to a number with few digits: 2.25 GiB, 13 GiB."""
    whole = math.ceil(nbytes)
    step = 1 << max(0, whole.bit_length() - 5)
    return -(-whole // step) * step


def table(look: Outlook) -> Table:
    """A row for each budget and link."""
    unit, scale = curve.unit_of(look.resident_nbytes)
    made = Table(title=f"predicted: {look.label}")
    for heading in (
        "GB/s",
        f"budget {unit}",
        "s a call",
        "exposed\ns",  # broken, so that rows are whole in 118 columns
        "copied\nGB",
        "link\nuse",
        f"peak\n{unit}",
        "limit\ns",
        "gap",
        "stock s",
        "resident s",
    ):
        made.add_column(heading, justify="right")
    for row, after in zip(look.rows, (*look.rows[1:], None), strict=True):
        made.add_row(
            f"{row.link_gbps:g}",
            f"{row.budget_nbytes / scale:.2f}",
            _seconds(row.seconds),
            _seconds(row.exposed_s),
            _gigabytes(row.h2d_nbytes),
            f"{row.link_use:.0%}",
            f"{row.peak_nbytes / scale:.2f}",
            _seconds(row.limit_s),
            f"{row.gap:.1%}",
            "out of memory" if row.stock_s is None else _seconds(row.stock_s),
            "out of memory" if row.resident_s is None else _seconds(row.resident_s),
            end_section=after is not None and after.link_gbps != row.link_gbps,
        )
    return made


def _seconds(value: float) -> str:
    return f"{value:.3f}" if 0.0005 <= value < 1 else f"{value:.2f}"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.0f}" if nbytes >= 1e11 else f"{nbytes / 1e9:.3g}"


def as_json(look: Outlook) -> dict[str, Any]:
    """For programs. Sizes in bytes, times in seconds; null: out of memory."""
    return {
        "predicted": True,
        "model": look.label,
        "assumptions": list(look.assumptions),
        "smallest_budget_nbytes": look.workload.smallest_budget_nbytes,
        "stock_nbytes": look.stock_nbytes,
        "resident_nbytes": look.resident_nbytes,
        "rows": [dataclasses.asdict(row) for row in look.rows],
    }


def shown_plan(look: Outlook) -> CallPlan:
    """The one whose timeline is shown: over the first link, the largest budget in which something is waited for."""
    first = [p for p in look.plans if p.link == look.plans[0].link]
    waiting = [p for p in first if p.prediction.call_ms > 1.01 * look.workload.compute_ms]
    return waiting[-1] if waiting else first[0]


def plan(request: Request, json_only: bool, console: Console) -> None:
    """Print it all, and write pictures where they were asked for.

    Raises:
        SettingError, BudgetError: see `look`.
    """
    made = look(request)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        unit, scale = curve.unit_of(made.resident_nbytes)
        curve.draw(curve_lines(made, scale), made.label, request.out / "curve.png", _marks(made, scale), unit)
        chosen = shown_plan(made)
        curve.draw_call(chosen, f"{made.label}: predicted", request.out / "call.png")
    if json_only:
        console.print_json(data=as_json(made))
        return
    console.print(table(made))
    console.print(
        "link use: the part of a call in which the link copies; limit: no schedule can be faster. Stock and resident are "
        "predicted too. These rest on:",
        style="dim",
        soft_wrap=True,
    )
    for line in made.assumptions:
        console.print(f"  {line}", soft_wrap=True, style="dim", markup=False, highlight=False)
    unit, scale = curve.unit_of(made.resident_nbytes)
    width = min(console.width, 118)
    console.print("\nSeconds a call in so much device memory, predicted:")
    console.print(Text(curve.bars(curve_lines(made, scale), width, unit)), soft_wrap=True)
    chosen = shown_plan(made)
    console.print(f"\nOne call in {told(chosen.budget_nbytes)} over {chosen.link.gbps:g} GB/s, predicted:")
    console.print(Text(curve.text(chosen, width)), soft_wrap=True)
    if request.out is not None:
        console.print(f"Wrote curve.png and call.png to {request.out}.", soft_wrap=True)


def curve_lines(look: Outlook, scale: int) -> list[curve.Line]:
    """A line for each link, its sizes in units of `scale` bytes."""
    links = list(dict.fromkeys(row.link_gbps for row in look.rows))
    return [
        curve.Line(
            f"{gbps:g} GB/s",
            tuple((r.budget_nbytes / scale, r.seconds, r.limit_s) for r in look.rows if r.link_gbps == gbps),
        )
        for gbps in links
    ]


def _marks(look: Outlook, scale: int) -> Sequence[curve.Mark]:
    stocks: dict[float, str] = {}  # links that are no slower than pageable copies make no difference
    for row in look.rows:
        stocks.setdefault(look.stock_s(row.link_gbps), f"{row.link_gbps:g} GB/s")
    return [
        *(
            curve.Mark(
                f"stock offload, {link}" if len(stocks) > 1 else "stock offload", look.stock_nbytes / scale, s, "s"
            )
            for s, link in stocks.items()
        ),
        curve.Mark("resident", look.resident_nbytes / scale, look.resident_s, "*"),
    ]
