"""A timeline as a picture: what ran, what was copied meanwhile, what compute waited for, and the memory it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import MIB
from ..errors import SettingError
from ..trace import Level, Span, Timeline, Track

# Paul Tol's "bright", which people with any colour vision can tell apart; grey goes to whoever comes eighth.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
OTHER = "#BBBBBB"
OURS = "#4477AA"
ROWS: tuple[tuple[Track, str], ...] = (("compute", "compute"), ("stalls", "waits for copies"), ("copy", "copies in"))
INK = "#333333"
POINTS_PER_LETTER = 5.6  # of the label font, 9 points


def calls_of(timeline: Timeline) -> list[Span]:
    """The calls, first one first."""
    return sorted((s for s in timeline.spans if s.track == "calls"), key=lambda s: s.start_ms)


def window(timeline: Timeline, start_ms: float, end_ms: float) -> Timeline:
    """What overlaps [start_ms, end_ms], cut to it and told from its start."""
    spans = tuple(
        Span(
            s.track,
            s.name,
            max(s.start_ms, start_ms) - start_ms,
            min(s.end_ms, end_ms) - max(s.start_ms, start_ms),
            s.args,
        )
        for s in timeline.spans
        if s.end_ms > start_ms and s.start_ms < end_ms
    )
    before = [level for level in timeline.levels if level.start_ms <= start_ms]
    levels = [Level(0.0, before[-1].nbytes)] if before else []
    levels += [Level(v.start_ms - start_ms, v.nbytes) for v in timeline.levels if start_ms < v.start_ms < end_ms]
    return Timeline(spans, tuple(levels), timeline.simulated, timeline.device)


def joined(spans: Sequence[Span], gap_ms: float) -> list[Span]:
    """Neighbours of one name as one span where less than `gap_ms` lies between: where labels go."""
    made: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start_ms):
        last = made[-1] if made else None
        if last is not None and last.name == span.name and span.start_ms - last.end_ms <= gap_ms:
            made[-1] = Span(last.track, last.name, last.start_ms, max(last.end_ms, span.end_ms) - last.start_ms)
        else:
            made.append(span)
    return made


def without(spans: Sequence[Span], holes: Sequence[Span]) -> list[Span]:
    """The parts of `spans` that no hole covers: compute without the waits in it."""
    left = list(spans)
    for hole in holes:
        pieces: list[Span] = []
        for span in left:
            for start, end in (
                (span.start_ms, min(span.end_ms, hole.start_ms)),
                (max(span.start_ms, hole.end_ms), span.end_ms),
            ):
                if end > start:
                    pieces.append(Span(span.track, span.name, start, end - start, span.args))
        left = pieces
    return left


def require() -> Any:
    """matplotlib, drawing to files.

    Raises:
        SettingError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SettingError(
            "the picture needs matplotlib, which is the extra `plot`: pip install '.[plot]' in the checkout."
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def require_folder(out: Path) -> None:
    """Pictures can be drawn into the folder `out`, which need not be there yet. Before anything runs.

    Raises:
        SettingError: matplotlib is not installed, or `out` is no folder.
    """
    require()
    if any(p.exists() and not p.is_dir() for p in (out, *out.parents)):
        raise SettingError(f"--out {out}: that is a file; give a folder for the pictures.")


def draw(timeline: Timeline, path: Path, title: str, subtitle: str, seconds: Mapping[str, float]) -> None:
    """Write a PNG of the last two calls, with the time of a call in each way of running above it.

    Raises:
        SettingError: matplotlib is not installed, or nothing was recorded.
    """
    pyplot = require()
    calls = calls_of(timeline)[-2:]
    if not calls:
        raise SettingError("no call was recorded, so there is nothing to draw.")
    start_ms, end_ms = calls[0].start_ms, calls[-1].end_ms
    shown = window(timeline, start_ms, end_ms)
    names = list(dict.fromkeys(s.name for s in shown.spans if s.track == "compute"))
    names += sorted({s.name for s in shown.spans if s.track == "copy"}.difference(names))
    colours = {name: COLOURS[i] if i < len(COLOURS) else OTHER for i, name in enumerate(names)}

    with pyplot.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#999999"}):
        figure, (bars, gantt, memory) = pyplot.subplots(
            3, 1, figsize=(12, 7), height_ratios=[0.36 * len(seconds) + 0.2, 2.2, 1.2], layout="constrained"
        )
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        _bars(bars, seconds)
        _gantt(gantt, shown, colours, subtitle)
        _memory(memory, shown, end_ms - start_ms)
        for axes in (gantt, memory):
            axes.set_xlim(0, (end_ms - start_ms) / 1e3)
            for call in calls[1:]:
                axes.axvline((call.start_ms - start_ms) / 1e3, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _bars(axes: Any, seconds: Mapping[str, float]) -> None:
    rows = range(len(seconds))
    axes.barh(
        rows, seconds.values(), height=0.62, color=["#BBBBBB", "#BBBBBB", *["#4477AA"] * len(seconds)][: len(seconds)]
    )
    for row, value in zip(rows, seconds.values(), strict=True):
        axes.text(value, row, f" {value:.2f} s", va="center", fontsize=9)
    axes.set_yticks(rows, seconds.keys())
    axes.set_xlim(0, max(seconds.values()) * 1.1)
    axes.invert_yaxis()
    axes.set_title("one call, after the first (shorter is better)", loc="left", fontsize=10)
    _plain(axes)
    axes.tick_params(axis="x", labelbottom=False, length=0)


def _gantt(axes: Any, shown: Timeline, colours: Mapping[str, str], subtitle: str) -> None:
    calls = calls_of(shown)
    length_ms = max(call.end_ms for call in calls)
    points_per_ms = axes.figure.get_figwidth() * 72 * 0.78 / length_ms  # the row labels take the rest
    for row, (track, _) in enumerate(ROWS):
        spans = _of(shown, track)
        bars = [(s.start_ms / 1e3, s.duration_ms / 1e3) for s in spans]
        faces = [colours.get(s.name, OTHER) for s in spans]
        # A white edge tells neighbours apart, and would be all that is seen of a thin one.
        edges = ["white" if s.duration_ms * points_per_ms > 3 else face for s, face in zip(spans, faces, strict=True)]
        axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=faces, edgecolors=edges, linewidth=0.4)
        for call in calls:
            inside = window(shown, call.start_ms, call.end_ms)
            for span in joined(_of(inside, track), gap_ms=length_ms / 200):
                if span.duration_ms * points_per_ms > POINTS_PER_LETTER * (len(span.name) + 2):
                    middle = (call.start_ms + span.start_ms + span.duration_ms / 2) / 1e3
                    box = {"facecolor": colours.get(span.name, OTHER), "edgecolor": "none", "pad": 1.5}
                    axes.text(middle, row, span.name, ha="center", va="center", fontsize=9, color="white", bbox=box)
    axes.set_yticks(range(len(ROWS)), [label for _, label in ROWS])
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set_title(subtitle, loc="left", fontsize=10)
    handles = [axes.barh(0, 0, color=colour, label=name) for name, colour in colours.items()]
    axes.legend(
        handles=handles, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, fontsize=9
    )
    _plain(axes)
    axes.tick_params(axis="x", labelbottom=False)


def _of(timeline: Timeline, track: Track) -> list[Span]:
    """The spans of a row. A component's compute lasts until the next one runs, and so includes what that one waits for."""
    spans = [s for s in timeline.spans if s.track == track]
    return without(spans, [s for s in timeline.spans if s.track == "stalls"]) if track == "compute" else spans


def _memory(axes: Any, shown: Timeline, length_ms: float) -> None:
    if shown.levels:
        times = [level.start_ms / 1e3 for level in shown.levels] + [length_ms / 1e3]
        sizes = [level.nbytes / MIB for level in (*shown.levels, shown.levels[-1])]
        axes.fill_between(times, sizes, step="post", color=INK, alpha=0.12, linewidth=0)
        axes.step(times, sizes, where="post", color=INK, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    axes.set_xlabel("s")
    axes.set_title("weights on the device", loc="left", fontsize=10)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
