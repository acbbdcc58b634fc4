"""Predictions for full-size SDXL and Flux beside what others published. No device is used.

    python -m benchmarks.predict

Writes benchmarks/results/predicted-sdxl.{csv,png}, predicted-flux.{csv,png} and predicted.md, with the code of
`prefetch-offload plan`. Nothing in them was measured here.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from prefetch_offload.commands import curve
from prefetch_offload.commands.plan import Outlook, Request, Row, curve_lines, look
from prefetch_offload.config import GIB

RESULTS = Path(__file__).parent / "results"
LINKS = ("12,25,55",)  # PCIe 3, 4 and 5 x16, pinned: 12.2, 24.8 and 55.6 GB/s published


@dataclasses.dataclass(frozen=True)
class Published:
    """What someone else measured: seconds a call at this much device memory."""

    what: str
    gib: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a GPU for which figures were published.

    Attributes:
        request: of the curve, which has all links.
        setup: what was published, where, and how the step time follows from it.
        link: of the GPU they were published for, in GB/s.
        beside: budgets, in GiB, to put beside the published figures.
    """

    name: str
    title: str
    request: Request
    setup: str
    link: float
    beside: tuple[float, ...]
    published: tuple[Published, ...]


SDXL_BUDGETS = ("2,3,4,5,6,7,8,10".replace(",", "GiB,") + "GiB",)
FLUX_BUDGETS = ("2,3,4,6,8,10,12,14,16,18,20,22,24,28,36".replace(",", "GiB,") + "GiB",)

CASES = (
    Case(
        "sdxl",
        "SDXL, A100: one image of 1024 x 1024, 30 steps",
        Request("sdxl", SDXL_BUDGETS, LINKS, steps=30, step_ms=102),
        "Resident time published for an A100 80 GB (diffusers, *Accelerate inference of text-to-image "
        "diffusion models*: 3.31 s, bfloat16 with fused attention). No figures for offload were published "
        "with it. A step: (3.31 s less 20 ms encode, less 228 ms decode) / 30 = 102 ms.",
        25,
        (2, 4, 6, 8),
        (Published("resident", None, 3.31),),
    ),
    Case(
        "sdxl-4",
        "SDXL, A100 40 GB: four images of 1024 x 1024, 50 steps",
        Request(
            "sdxl",
            ("14GiB,16GiB,20GiB,24GiB",),
            LINKS,
            steps=50,
            step_ms=209,
            encode_ms=20,
            decode_ms=912,
            activations=1.24,
        ),
        "Published: Hugging Face, *Exploring simple optimizations for SDXL*. A step: (11.41 s less 20 ms, "
        "less 4 x 228 ms) / 50 = 209 ms, where 50 steps are the pipeline's default and an assumption. "
        "Denoiser's activations for a batch of 8: 1.24 GiB. The published peak of 20 to 22 GiB is that of "
        "decoding four images in float32; ours is predicted for decoding one at a time, so memory is not to "
        "be compared here.",
        25,
        (16, 20),
        (
            Published("resident", 21.7, 11.41),
            Published("stock model offload", 20.2, 16.08),
            Published("sequential offload", 19.9, 67.0),
        ),
    ),
    Case(
        "flux",
        "Flux dev, L20: one image of 1024 x 1024, 28 steps",
        Request("flux", FLUX_BUDGETS, LINKS, steps=28, step_ms=825, encode_ms=100, decode_ms=250),
        "Published: cache-dit's guide on offload and its release notes, NVIDIA L20 48 GB (PCIe 4 x16). A "
        "step: (23.4 s less 350 ms) / 28 = 825 ms (rounded); encode and decode are estimates. Ours cannot go "
        "below 1.52 GiB: decoding takes 1.5 GiB besides weights, without tiles.",
        25,
        (2, 4, 8, 14, 16, 24),
        (
            Published("resident", 38, 23.4),
            Published("stock model offload", 25, 56.0),
            Published("cache-dit layerwise", 1, 49.0),
            Published("cache-dit, asynchronous", 4, 41.0),
            Published("cache-dit, some layers kept", 8, 33.0),
            Published("cache-dit, more layers kept", 14, 26.0),
            Published("cache-dit, more layers kept", 16, 24.6),
        ),
    ),
    Case(
        "flux-h100",
        "Flux dev, a GPU like an H100: one image, 28 steps",
        Request("flux", FLUX_BUDGETS, LINKS, steps=28, step_ms=230, encode_ms=50, decode_ms=100),
        "Published: huggingface/diffusers#11682, GPU not named; its times are those of an H100. A step: (6.59"
        " s less 150 ms) / 28 = 230 ms; encode and decode are estimates. Memory was not published.",
        55,
        (2, 8, 16, 24),
        (
            Published("resident", None, 6.59),
            Published("stock model offload", None, 21.68),
            Published("diffusers group offload", None, 47.7),
            Published("sequential offload", None, 68.4),
        ),
    ),
    Case(
        "flux-a100",
        "Flux dev transformer, A100 80 GB: 28 forward passes",
        Request("flux", FLUX_BUDGETS, LINKS, steps=28, step_ms=535),
        "Published: diffusers/benchmarks (huggingface/diffusers#11565): a forward pass of the transformer "
        "takes 0.535 s resident and 1.90 s with group offload by leaves; times 28 here, without encoders and "
        "decoder, which ours have (0.22 s of compute, and the copies of T5). Its memory is that of the "
        "transformer alone: ours has no prediction there, and the nearest is for 2 GiB.",
        25,
        (2, 8, 16, 24),
        (
            Published("resident, transformer only", 22.6, 28 * 0.535),
            Published("diffusers group offload, leaves, transformer only", 0.53, 28 * 1.90),
        ),
    ),
)
DRAWN = ("sdxl", "flux")  # cases with a curve
# What README.md and docs/choosing-a-budget.md quote, by the commands that they show.
QUOTED = {
    "plan --model sdxl --budget 7GiB --link 12 --step-ms 400": Request("sdxl", ("7GiB",), ("12",), step_ms=400),
    "plan --model flux --budget 7GiB --link 12,25 --step-ms 825": Request("flux", ("7GiB",), ("12", "25"), step_ms=825),
    "plan --model flux --budget 12GiB --link 25 --step-ms 230": Request("flux", ("12GiB",), ("25",), step_ms=230),
    "plan --model flux --budget 14GiB --link 12,25 --step-ms 825": Request("flux", ("14GiB",), ("12", "25"), step_ms=825),
}


def write_csv(made: Outlook, path: Path) -> None:
    with path.open("w", newline="") as file:
        names = [f.name for f in dataclasses.fields(Row)]
        writer = csv.DictWriter(file, ["kind", *names], lineterminator="\n")
        writer.writeheader()
        for row in made.rows:
            values = dataclasses.asdict(row).items()
            writer.writerow({"kind": "predicted"} | {k: round(v, 4) if isinstance(v, float) else v for k, v in values})


def section(case: Case, beside: Outlook) -> list[str]:
    """A case as Markdown: what is published, and under it what is predicted."""
    lines = [f"## {case.title}", "", case.setup, ""]
    lines += [f"| | GiB | s a call over {case.link:g} GB/s | limit s | copied GB a call |", "|---|---|---|---|---|"]
    for item in case.published:
        memory = "not published" if item.gib is None else f"{item.gib:g}"
        lines.append(f"| published: {item.what} | {memory} | {item.seconds:.2f} | | |")
    # Where others are below the smallest budget that ours can run in, there is nothing to compare.
    smallest = beside.workload.smallest_budget_nbytes
    for gib in sorted({item.gib for item in case.published if item.gib is not None and item.gib * GIB < smallest}):
        lines.append(f"| predicted: prefetch_offload | {gib:g} | not feasible: at least {smallest / GIB:.2f} GiB | | |")
    for row in beside.rows:
        lines.append(
            f"| predicted: prefetch_offload | {row.budget_nbytes / GIB:g} | {row.seconds:.2f} | {row.limit_s:.2f} | "
            f"{row.h2d_nbytes / 1e9:.1f} |"
        )
    stock = beside.stock_s(case.link)
    lines.append(f"| predicted: stock model offload | {beside.stock_nbytes / GIB:.1f} | {stock:.2f} | | |")
    lines.append(f"| predicted: resident | {beside.resident_nbytes / GIB:.1f} | {beside.resident_s:.2f} | | 0 |")
    return [*lines, "", "Rests on:", "", *(f"- {line}" for line in beside.assumptions), ""]


def quoted() -> list[str]:
    """The examples as Markdown."""
    lines = ["## Quoted elsewhere", ""]
    lines.append("| prefetch-offload | GiB | GB/s | s a call | of it waiting for copies | limit s | stock offload s |")
    lines.append("|---|---|---|---|---|---|---|")
    for command, request in QUOTED.items():
        made = look(request)
        for row in made.rows:
            fits = made.stock_nbytes <= row.budget_nbytes
            stock = f"{made.stock_s(row.link_gbps):.1f}" if fits else f"needs {made.stock_nbytes / GIB:.1f} GiB"
            lines.append(
                f"| `{command}` | {row.budget_nbytes / GIB:g} | {row.link_gbps:g} | {row.seconds:.1f} | {row.exposed_s:.1f} | "
                f"{row.limit_s:.1f} | {stock} |"
            )
    return [*lines, ""]


def curve_table(name: str, made: Outlook) -> list[str]:
    """Seconds a call, a row for each budget and a column for each link; the limit in brackets."""
    links = list(dict.fromkeys(row.link_gbps for row in made.rows))
    lines = [
        f"| {name}, GiB | " + " | ".join(f"{gbps:g} GB/s" for gbps in links) + " |",
        "|---" * (len(links) + 1) + "|",
    ]
    for budget in dict.fromkeys(row.budget_nbytes for row in made.rows):
        cells = [f"{r.seconds:.2f} ({r.limit_s:.2f})" for r in made.rows if r.budget_nbytes == budget]
        lines.append(f"| {budget / GIB:g} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def marks_of(case: Case, made: Outlook) -> list[curve.Mark]:
    """Resident and stock as predicted, and what was published where its memory is known."""
    shapes = {"resident": "*", "stock model offload": "s"}
    marks = [
        curve.Mark("stock offload, predicted", made.stock_nbytes / GIB, made.stock_s(case.link), "s"),
        curve.Mark("resident, predicted", made.resident_nbytes / GIB, made.resident_s, "*"),
    ]
    seen: set[str] = set()
    for item in case.published:
        if item.gib is None:
            continue
        label = f"{item.what.partition(',')[0].removesuffix(' layerwise')}, published"
        # matplotlib leaves labels that begin with an underscore out of the legend
        marks.append(
            curve.Mark(
                "_" + label if label in seen else label, item.gib, item.seconds, shapes.get(item.what, "o"), True
            )
        )
        seen.add(label)
    return marks


def main(results: Path = RESULTS, cases: Sequence[Case] = CASES) -> None:
    results.mkdir(parents=True, exist_ok=True)
    text = [
        "# Predicted: SDXL and Flux at full size",
        "",
        "`python -m benchmarks.predict`. **Nothing here was measured by this project.** Rows that say "
        "*predicted* come from the simulated clock of `prefetch-offload plan`; rows that say *published* are "
        "others' measurements on the named GPU. A prediction counts kernels and copies: no time of the host, "
        "no allocator, and a link that always gives its full speed. *limit*: no schedule of the same work can"
        " be faster.",
        "",
    ]
    for case in cases:
        made = look(case.request)
        budgets = tuple(f"{gib}GiB" for gib in case.beside)
        beside = look(dataclasses.replace(case.request, budgets=budgets, links=(f"{case.link:g}",)))
        text += section(case, beside)
        if case.name in DRAWN:
            write_csv(made, results / f"predicted-{case.name}.csv")
            curve.draw(curve_lines(made, GIB), case.title, results / f"predicted-{case.name}.png", marks_of(case, made))
            text += ["All links, seconds a call and in brackets the limit:", "", *curve_table(case.name, made)]
            text += [f"![{case.title}](predicted-{case.name}.png)", ""]
        print(f"{case.title}: {len(made.rows)} predictions")
    text += quoted()
    (results / "predicted.md").write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
