"""The documentation says what is true of the code: links, messages, settings, names and commands. Pure; nothing is imported."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted([*ROOT.glob("prefetch_offload/**/*.py"), *ROOT.glob("kernels/prefetch_offload_kernels/*.py")])
GAP = "…"  # stands for whatever is filled in
FEWEST_WORDS = 3  # a message with fewer fixed words cannot be told from others, and a quote with fewer is no quote

# Keywords of other packages that the pages use in calls; everything else has to be a setting or an argument of ours.
FOREIGN = {
    "backend", "dynamic", "fullgraph", "hotswap", "low_cpu_mem_usage", "mode", "non_blocking", "options", "record_stream",
    "safe_fusing", "use_stream",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ Markdown
@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it begins on."""

    language: str
    text: str
    line: int


@functools.cache
def split(page: Path) -> tuple[tuple[tuple[int, str], ...], tuple[Block, ...]]:
    """Numbered lines of prose, and the fenced blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence, language, inside, start = "", "", [], 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        mark = re.match(r"\s*(```+)(\w*)", line)
        if fence:
            if mark and mark[1] == fence and not mark[2]:
                blocks.append(Block(language, "\n".join(inside), start))
                fence = ""
            else:
                inside.append(line)
        elif mark:
            fence, language, inside, start = mark[1], mark[2], [], number
        else:
            prose.append((number, line))
    assert not fence, f"{page.name}:{start}: a fence that is not closed"
    return tuple(prose), tuple(blocks)


SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def spans(line: str) -> list[str]:
    """The contents of the code spans in a line."""
    return [m[2].strip() for m in SPAN.finditer(line)]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    found: dict[str, int] = {}
    made = set()
    for _, line in split(page)[0]:
        heading = re.match(r"#+\s+(.*)", line)
        if heading:
            name = anchor(heading[1])
            made.add(f"{name}-{found[name]}" if name in found else name)
            found[name] = found.get(name, 0) + 1
    return frozenset(made)


def broken_links(page: Path) -> Iterator[str]:
    for number, line in split(page)[0]:
        for target in LINK.findall(SPAN.sub("", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, fragment = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            if not other.exists():
                yield f"{page.name}:{number}: {target}: there is no such file"
            elif fragment and fragment not in anchors(other):
                yield f"{page.name}:{number}: {target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page))


def test_every_page_is_listed() -> None:
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == pages
    assert {f"docs/{name}" for name in pages} <= set(LINK.findall((ROOT / "README.md").read_text()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_parses(page: Path) -> None:
    for block in split(page)[1]:
        if block.language == "python":
            try:
                ast.parse(block.text)
            except SyntaxError as error:
                pytest.fail(f"{page.name}:{block.line + (error.lineno or 0)}: {error.msg}")


# ------------------------------------------------------------------------------------------------------- messages
@dataclass(frozen=True)
class Message:
    """What a raise or a warning says, `GAP` where something is filled in."""

    where: str
    text: str

    @property
    def words(self) -> int:
        """Fixed words."""
        return max((len(re.findall(r"\w+", part)) for part in self.text.split(GAP)), default=0)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


OUR_ERRORS = re.compile(r"\w*(Error|Unavailable|Warning)$")


def text_of(node: ast.expr, resolve: dict[str, list[ast.expr]]) -> list[str]:
    """The texts that an expression may come to. Names and calls are looked up in `resolve`; what is not there is a gap."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [GAP]
    if isinstance(node, ast.JoinedStr):
        texts = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            lookup = isinstance(inner, ast.Call) or not isinstance(part, ast.FormattedValue)
            found = text_of(inner, resolve) if lookup else [GAP]
            texts = [a + b for a in texts for b in found]
        return texts
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in text_of(node.left, resolve) for b in text_of(node.right, resolve)]
    if isinstance(node, ast.IfExp):
        return text_of(node.body, resolve) + text_of(node.orelse, resolve)
    name = ""
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) + "()"
    known = resolve.get(name, [])
    return [t for e in known for t in text_of(e, {k: v for k, v in resolve.items() if k != name})] or [GAP]


def squeeze(text: str) -> str:
    """One gap for several in a row, one blank for several."""
    return re.sub(rf"{GAP}+", GAP, " ".join(text.split()))


def messages_of(name: str, tree: ast.Module) -> Iterator[Message]:
    """What the module raises, warns of, notes and prints in a colour of alarm."""
    resolve: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
            resolve[node.name + "()"] = returned if node.returns and ast.unparse(node.returns) == "str" else []
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            resolve.setdefault(ast.unparse(node.targets[0]), []).append(node.value)

    for node in ast.walk(tree):
        said: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            called = ast.unparse(node.exc.func).rpartition(".")[2]
            said = node.exc.args[:1] if OUR_ERRORS.match(called) else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            style = next((ast.unparse(k.value) for k in node.keywords if k.arg == "style"), "")
            alarm = called.endswith("console.print") and re.search("red|yellow", style)
            said = node.args[:1] if called in ("warnings.warn", "note") or alarm else []
        for each in said:
            for text in text_of(each, resolve):
                yield Message(f"{name}:{node.lineno}", squeeze(text))  # type: ignore[attr-defined]


@functools.cache
def messages() -> tuple[Message, ...]:
    found = [m for p in SOURCES for m in messages_of(str(p.relative_to(ROOT)), tree_of(p))]
    return tuple(m for m in found if m.words >= FEWEST_WORDS)


@functools.cache
def texts() -> tuple[str, ...]:
    """Every text in the source that is not a docstring, for what is quoted besides errors and warnings."""
    found = []
    for path in SOURCES:
        tree = tree_of(path)
        docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and (not isinstance(node.value, str) or " " not in node.value):
                continue  # most of them, and none is quoted
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and id(node) not in docstrings:
                found += [squeeze(t) for t in text_of(node, {})]
    return tuple(found)


def quotes(page: Path = TROUBLES) -> list[tuple[int, str]]:
    """The convention of troubleshooting.md: a heading that is a code span, and a table's first cell that is one, quote a
    message; `GAP` stands for what is filled in."""
    found = []
    for number, line in split(page)[0]:
        heading = re.fullmatch(r"#+\s+(`.*`)\s*", line)
        cell = re.match(r"\|\s*(`.*?`)\s\|", line)
        quoted = spans((heading or cell)[1]) if heading or cell else []  # type: ignore[index]
        found += [(number, squeeze(q)) for q in quoted]
    return found


def matches(quote: str, text: str) -> bool:
    """`quote` is a part of `text`, word for word; it may begin or end with a gap of its own."""
    return quote.strip(GAP + " ") in text


def test_quoted_messages_are_in_the_source() -> None:
    assert len(quotes()) > 50
    other = [(n, q) for n, q in quotes() if not any(matches(q, m.text) for m in messages())]
    wrong = [f"{TROUBLES.name}:{n}: {q}" for n, q in other if not any(matches(q, text) for text in texts())]
    assert not wrong, "\n".join(wrong)
    short = [q for _, q in quotes() if Message("", q).words < 2]
    assert not short, "too short to be found by"


def test_every_message_is_quoted() -> None:
    assert len(messages()) > 80
    missed = [m for m in messages() if not any(matches(q, m.text) for _, q in quotes())]
    assert not missed, "not in docs/troubleshooting.md:\n" + "\n".join(f"{m.where}: {m.text}" for m in missed)


def test_no_message_is_quoted_twice() -> None:
    once = [q for _, q in quotes()]
    assert len(once) == len(set(once))


# ---------------------------------------------------------------------------------- settings, names, commands, files
def class_body(path: str, name: str) -> list[ast.stmt]:
    tree = tree_of(ROOT / path)
    return next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


@functools.cache
def fields(path: str, name: str) -> frozenset[str]:
    """Annotated fields, methods and properties of a class."""
    body = class_body(path, name)
    annotated = {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return frozenset(annotated | {n.name for n in body if isinstance(n, ast.FunctionDef)})


def settings() -> set[str]:
    body = class_body("prefetch_offload/config.py", "Settings")
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def python_in(page: Path) -> Iterator[tuple[int, ast.AST]]:
    """Every node of the Python blocks, and of the code spans that are expressions or assignments."""
    for block in split(page)[1]:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                yield block.line + getattr(node, "lineno", 0), node
    for number, line in split(page)[0]:
        for span in spans(line) if page != TROUBLES else ():
            try:
                tree = ast.parse(span)
            except SyntaxError:
                continue
            for node in ast.walk(tree):
                yield number, node


def ours(call: ast.Call) -> bool:
    return ast.unparse(call.func).rpartition(".")[2] in ("enable", "install")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_exist(page: Path) -> None:
    known = settings() | {"gpu_id", "device"}
    wrong = []
    for line, node in python_in(page):
        if isinstance(node, ast.Call) and ours(node):
            wrong += [f"{line}: {k.arg}" for k in node.keywords if k.arg is not None and k.arg not in known]
    for number, line in split(page)[0]:
        for span in spans(line):
            named = re.match(r"([a-z_]+)=(?!=)\S", span)
            if named and named[1] not in known | FOREIGN:
                wrong.append(f"{number}: {span}")
    for number, line in split(page)[0]:  # tables of settings
        heading = re.match(r"\|\s*setting", line)
        if heading:
            rows = [text for n, text in split(page)[0] if n > number + 1]
            for row in rows[: next((i for i, r in enumerate(rows) if not r.startswith("|")), len(rows))]:
                wrong += [f"{number}: {name}" for name in spans(row.split("|")[1]) if name not in settings()]
    assert not wrong, f"{page.name}: no such settings: {wrong}"


def test_every_setting_is_documented() -> None:
    told = {
        name
        for page in PAGES
        for _, line in split(page)[0]
        if line.startswith("|")
        for name in spans(line.split("|")[1])
    }
    assert settings() <= told


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_attributes_of_the_handle_exist(page: Path) -> None:
    known = {
        "offload": fields("prefetch_offload/handle.py", "Offload"),
        "stats": fields("prefetch_offload/stats.py", "Stats"),
        "component": fields("prefetch_offload/stats.py", "ComponentStats"),
        "last_call": fields("prefetch_offload/stats.py", "LastCall"),
        "plan": fields("prefetch_offload/stats.py", "Plan"),
    }
    exported = set(ast.literal_eval(next(
        n.value for n in tree_of(ROOT / "prefetch_offload/__init__.py").body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    )))  # fmt: skip
    packages = {p.stem for p in (ROOT / "prefetch_offload").glob("*.py")} | {"testing", "commands"}
    known["prefetch_offload"] = frozenset(exported | packages | {"__version__"})
    wrong = []
    for line, node in python_in(page):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).rpartition(".")[2]
            if owner in known and node.attr not in known[owner]:
                wrong.append(f"{line}: {owner}.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module == "prefetch_offload":
            wrong += [f"{line}: {a.name}" for a in node.names if a.name not in known["prefetch_offload"]]
    assert not wrong, f"{page.name}: {wrong}"


@functools.cache
def commands() -> dict[str, frozenset[str]]:
    """The commands of the command line and their options."""
    tree = tree_of(ROOT / "prefetch_offload/cli.py")
    aliases = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    made = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not any("app." in ast.unparse(d) for d in node.decorator_list):
            continue
        options = {"--help"}
        for argument in node.args.args:
            assert argument.annotation is not None
            annotation = aliases.get(ast.unparse(argument.annotation), argument.annotation)
            named = {n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            own = {n for n in named if re.fullmatch(r"--[a-z-]+", n)}
            options |= own or {"--" + argument.arg.replace("_", "-")}
        made["" if node.name == "main" else node.name] = frozenset(options)
    return made


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_options_exist(page: Path) -> None:
    lines = [(b.line + i, t) for b in split(page)[1] for i, t in enumerate(b.text.replace("\\\n", " ").splitlines(), 1)]
    lines += [(n, s) for n, line in split(page)[0] for s in spans(line)]
    wrong = []
    for number, line in lines:
        for given in re.findall(r"(?:^|\s)prefetch-offload((?:\s+[^\s#|;&]+)*)", line):
            words = given.split()
            command = words[0] if words and not words[0].startswith("-") else ""
            if command not in commands():
                wrong.append(f"{number}: prefetch-offload {command}")
                continue
            wrong += [
                f"{number}: {w}" for w in words if w.startswith("--") and w.split("=")[0] not in commands()[command]
            ]
    assert not wrong, f"{page.name}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    wrong = [
        path for path in re.findall(r"(?<![\w/.-])((?:benchmarks|kernels|tests|docs|prefetch_offload)/[\w./-]*\w)", text)
        if not (ROOT / path).exists() and not (page.parent / path).exists()
    ]  # fmt: skip
    for module in re.findall(r"python -m ((?:benchmarks|prefetch_offload|prefetch_offload_kernels)[\w.]*)", text):
        path = module.replace(".", "/")
        if not any(
            (ROOT / base / f"{path}{end}").exists() for base in ("", "kernels") for end in (".py", "/__main__.py")
        ):
            wrong.append(module)
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(
        r"^([\w-]+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
    assert "cuda-graphs" in extras
    for name, extra in re.findall(r"pip install (?:-e )?'([\w.-]+)\[([\w,-]+)\]'", text):
        if name != "." or not set(extra.split(",")) <= set(extras):  # the package is on no index
            wrong.append(f"{name}[{extra}]")
    assert not wrong, f"{page.name}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_nothing_deprecated_is_shown(page: Path) -> None:
    """diffusers takes `dtype` from 0.41 on, our oldest, and warns of what it was called before."""
    assert "torch_dtype" not in page.read_text()


def test_what_others_published_is_committed() -> None:
    """The README's seconds with a source of others are in a file of results, with the same source."""
    committed = (ROOT / "benchmarks" / "results" / "published.md").read_text().splitlines()
    rows = [line for _, line in split(ROOT / "README.md")[0] if line.startswith("|") and "](http" in line]
    assert rows
    for row in rows:
        *_, source = LINK.findall(row)
        (match,) = [line for line in committed if source in line and line.startswith("|")]
        told, known = (re.findall(r"\d+\.\d+", text.partition("](")[0].partition("|")[2]) for text in (row, match))
        assert told == known, source


def test_every_result_is_explained() -> None:
    """docs/benchmarks.md and docs/kernels.md say of each committed result how it is made."""
    told = "".join((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "kernels.md"))
    results = [*ROOT.glob("benchmarks/results/*"), *ROOT.glob("kernels/results/*")]
    assert results
    assert not [str(r.relative_to(ROOT)) for r in results if r.name not in told]


# ------------------------------------------------------------------------------------------------ that it can fail
def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    heading = "# A `b`: c\n\n"
    page.write_text(
        heading + "[here](#a-b-c) [gone](#a) [file](none.md) `[code](none.md)`\n\n" + heading + "[two](#a-b-c-1)\n"
    )
    assert [line.split(": ")[1] for line in broken_links(page)] == ["#a", "none.md"]
    source = (
        "def _say(x) -> str:\n    return f'{x} cannot be done in pieces'\n"
        "def f(x):\n    message = f'late {x} at once and more'\n    raise SettingError(message)\n"
        "def g(x):\n    raise BudgetError(f'{x}: ' + 'one two ' f'three {x!r}')\n"
        "def h(x):\n    raise torch.OutOfMemoryError(f'{x} {_say(x)}')\n"
        "def i(x):\n    warnings.warn('this one is slow', OffloadWarning)\n    raise typer.Exit('not a message')\n"
    )
    found = {m.text for m in messages_of("m.py", ast.parse(source))}
    assert found == {
        "late … at once and more",
        "…: one two three …",
        "… … cannot be done in pieces",
        "this one is slow",
    }
    assert matches("…: one two three", "…: one two three …") and not matches("one two four", "…: one two three …")


def test_the_readmes_simulated_seconds_are_those_of_the_committed_run() -> None:
    def cells(line: str) -> list[str]:
        return line.strip("| ").split(" | ")

    result = (ROOT / "benchmarks" / "results" / "simulated-demo.md").read_text()
    readme = (ROOT / "README.md").read_text().partition("| small SDXL, simulated |")[2].partition("\n\n")[0]
    run = [cells(line) for line in result.splitlines() if line.startswith(("| resident", "| stock", "| prefetch_offload"))]
    shown = [cells(line) for line in readme.splitlines()[2:]]
    assert len(run) == len(shown) == 4
    for (what, _, later, peak, _), (name, seconds, memory) in zip(run, shown, strict=True):
        assert what.split(":")[0] == name.split(":")[0].replace("stock model", "stock")
        assert (seconds, memory) == (later, f"{peak} MiB")
