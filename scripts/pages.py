"""The site: its notebooks, the pages that nbdev makes of them and, run as a script, the whole of it, built by Quarto into _docs."""
import ast
import html
import json
import os
import posixpath
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from readme import CROSS_REFERENCE, ROOT, outside_code, split_directives

LABEL = re.compile(rf"\{{#({CROSS_REFERENCE})[^}}]*\}}")
REFERENCE = re.compile(rf"(?<![\w\\./@-])\[?-?@({CROSS_REFERENCE})\]?", re.IGNORECASE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^\s)>]*)>?(?:\s+[\"'][^)]*)?\)")
TAG = re.compile(r"<(img|a|source|link)\b([^>]*)>", re.IGNORECASE)
IMAGES = ("image/png", "image/svg", "image/jpeg")
NUMBERED = dict(eq="Equation", fig="Figure", tbl="Table", sec="Section", lst="Listing", thm="Theorem", lem="Lemma", cor="Corollary",
                prp="Proposition", cnj="Conjecture", exm="Example", exr="Exercise", alg="Algorithm") | {"def": "Definition"}


# Notebooks and their cells

@dataclass
class Cell:
    page: str     # path of the notebook from the root
    number: int   # counted from 1, as a reader scrolls
    raw: dict     # the cell as stored
    directives: dict = field(init=False)
    code: str = field(init=False)  # directives and magics left blank, so that lines keep their numbers

    def __post_init__(self):
        self.directives, code = split_directives(self.source) if self.kind == "code" else ({}, "")
        code = "" if code.lstrip().startswith("%%") else re.sub(r"^\s*[%!].*", "", code, flags=re.MULTILINE)
        self.code = "\n"*(self.source.count("\n") - code.count("\n")) + code

    def __str__(self):
        if documented := re.search(r"^show_doc\((.+)\)", self.code, re.MULTILINE): return f"{self.page}, the documentation of {documented[1]},"
        return f"{self.page} cell {self.number}" + (f" [{self.raw['id']}]" if "id" in self.raw else "")

    @property
    def kind(self): return self.raw["cell_type"]

    @property
    def source(self): return "".join(self.raw["source"])

    @property
    def outputs(self): return self.raw.get("outputs", [])

    @property
    def exported(self): return bool({"export", "exports", "exporti"} & self.directives.keys())

    @cached_property
    def body(self):
        "The statements of a code cell; none when its syntax is wrong, which the notebook's own run reports."
        try: return ast.parse(self.code).body
        except SyntaxError as e: return [ast.Pass(lineno=e.lineno)]

    def texts(self, *kinds):
        "The stored outputs of these MIME types (streams are text/plain), as strings."
        for output in self.outputs:
            data = {"text/plain": output["text"]} if "text" in output else output.get("data", {})
            yield from ("".join(data[kind]) for kind in data if kind.startswith(kinds))


def notebook_paths(root):
    "Every notebook of the site, as paths from nbs/."
    paths = (p.relative_to(root/"nbs") for p in (root/"nbs").rglob("*.ipynb"))
    return sorted(p.as_posix() for p in paths if not any(part[0] in "._" for part in p.parts))


def read_cells(root, path):
    "The cells of the notebook `path`, which counts from the root."
    try: notebook = json.loads((root/path).read_text(encoding="utf-8"))
    except ValueError as e: sys.exit(f"{path} is not a notebook any more: {e}. Mend it, with nbdev_fix if a merge left it so.")
    return [Cell(path, i + 1, raw) for i, raw in enumerate(notebook["cells"])]


def all_notebooks(root): return {path: read_cells(root, f"nbs/{path}") for path in notebook_paths(root)}


# Running nbdev

RUNNING = set()  # processes, each the leader of a group with what it started


def stop(*processes):
    "End processes and all that they started."
    for process in processes or tuple(RUNNING):
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command, tree, limit=600, **settings):
    "(exit status, output) of a command run in a tree with that tree's `theria`; the status is None when the time limit ended it."
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **settings}
    process = subprocess.Popen([str(part) for part in command], cwd=tree, env=env, text=True, errors="replace", stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    RUNNING.add(process)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output.replace(f"{tree}/", "")
    except subprocess.TimeoutExpired as late: return None, (late.output or b"").decode(errors="replace")
    finally:
        stop(process)
        RUNNING.discard(process)


def nbdev(call, tree, *args, **settings):
    "Run an nbdev command, given as `module.function(arguments)`, on a tree."
    module, _, function = call.partition(".")
    code = f"import sys; from nbdev import {module}; {module}.{function.replace('(', '.__wrapped__(', 1)}"
    return run([sys.executable, "-c", code, *args], tree, **settings)


def process(tree):
    "Send every notebook through nbdev's docs processing, into _proc; its output where that fails, else None."
    shutil.rmtree(tree/"_proc", ignore_errors=True)
    stub = tree/"build"/"bin"/"quarto"  # nbdev only looks whether Quarto is there, and would install it
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    # an interpreted kernel would lose its documentation
    status, output = nbdev("quarto.nbdev_proc_nbs(n_workers=2)", tree, TRITON_INTERPRET="0", PATH=path)
    if status != 0: return output or "no output"
    for page in notebook_paths(tree):
        if (tree/"_proc"/page).exists(): arrange(tree/"_proc"/page)
    for path in parts(tree): join(tree, path)


def arrange(file):
    """Put what a processed page says of its definitions in front of the cell that shows them, and leave out what that cell says itself.

    A figure that brings words for those who cannot see it gets them as its alt text, and a link that nbdev made inside a link goes.
    """
    notebook = json.loads(file.read_text(encoding="utf-8"))
    for raw in notebook["cells"]:
        describe(raw)
        for part in (raw, *(o.get("data", {}) for o in raw.get("outputs", ()))):
            for name in {"source"} if part is raw and raw["cell_type"] == "markdown" else {"text/markdown"} & part.keys():
                part[name] = unnest("".join(part[name])).splitlines(keepends=True)
    cells = [Cell(file.name, i + 1, raw) for i, raw in enumerate(notebook["cells"])]
    documented = {match[1]: cell for cell in cells if (match := re.search(r"^show_doc\((\w+)\)", cell.code, re.MULTILINE))}
    names = {cell.number: [node.name for node in cell.body if getattr(node, "name", None) in documented]
             for cell in cells if cell.directives.get("code-fold") == "show"}  # so nbdev marks a cell that is exported and shown
    moved = {documented[name].number for found in names.values() for name in found}
    for number in names: mark_exported(cells[number - 1])
    for name in documented: shorten(documented[name], name, whole=documented[name].number not in moved)
    notebook["cells"] = [part.raw for cell in cells if cell.number not in moved
                         for part in (*(documented[name] for name in names.get(cell.number, ())), cell)]
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unnest(text):
    "Markdown in which no link stands inside another, and none leads to a private name: nbdev links every name in backticks that it knows."
    def change(part):
        part = re.sub(r"\[(`_\w+`)\]\([^()\s]*#_\w+\)", r"\1", part)
        return re.sub(r"\[([^\[\]]*)\[(`[^`\]]+`)\]\([^()\s]*\)([^\[\]]*)\](?=\()", r"[\1\2\3]", part)
    return outside_blocks(text, change)


def describe(raw):
    "Give a figure without an alt text the words that it brings itself, as what `theria.report.draw` draws does."
    directives, code = split_directives("".join(raw["source"])) if raw["cell_type"] == "code" else ({}, "")
    drawn = [match[1] for output in raw.get("outputs", ()) if (match := re.search(r'<svg\b[^>]*\baria-label="([^"]+)"', "".join(output.get("data", {}).get("image/svg+xml", ""))))]
    if drawn and not directives.get("fig-alt"):
        raw["source"] = [f"#| fig-alt: {json.dumps(html.unescape('; '.join(drawn)), ensure_ascii=False)}\n", *"".join(raw["source"]).splitlines(keepends=True)]


def mark_exported(cell):
    "Let styles.css know an exported cell, in place of the fold that nbdev puts around it."
    code = re.sub(r"\A(\s*#\| code-(fold|summary):.*\n)+", "", cell.source)
    cell.raw["source"] = ("#| classes: exported\n" + code).splitlines(keepends=True)


def shorten(cell, name, whole):
    "Documentation without a docstring that nobody wrote and, unless it is wanted whole, without what the source below shows: rule and signature."
    for output in cell.outputs:
        if "text/markdown" not in output.get("data", {}): continue
        text = "".join(output["data"]["text/markdown"])
        if not whole:
            text = re.sub(r"^```python\n.*?^```\n*", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
            text = re.sub(r"\A---\n\n(\[source\].*)\n\n(#+ .*\n\n)", r"\2\1 ", text)
        if re.search(rf"\*(Call self as a function\.|{name}\()", text): text = f"::: {{#{identifier(name)}}}\n:::\n"
        output["data"]["text/markdown"] = text.splitlines(keepends=True)


# Pages

def outside_blocks(text, change):
    "Apply `change` to the parts of a Markdown text that are not fenced code."
    parts = re.split(r"(^```.*?^```\s*?$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def without_blocks(text):
    "Markdown without fenced code and comments."
    return re.sub(r"^(```+|~~~+).*?^\1\s*?$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)


def without(text, mathematics=True):
    "Markdown without fenced and inline code and comments, and without mathematics too unless it is asked for."
    text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", without_blocks(text), flags=re.DOTALL)
    if mathematics: text = re.sub(r"\$\$.*?\$\$|(?<![\\$])\$(?!\s)[^$\n]+?(?<![\s\\])\$(?!\d)", "", text, flags=re.DOTALL)
    return text


def identifier(heading):
    "The anchor that pandoc gives a heading."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\{[^}]*\}\s*$", "", heading)).lower()
    text = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text).strip())
    return re.sub(r"^[^a-z]+", "", text) or "section"


@dataclass
class Page:
    "One processed notebook: what can be referred to, and what it refers to."
    path: str           # from nbs/
    cells: list         # of the processed notebook
    labels: dict = field(default_factory=dict)      # label: the cells that give it
    anchors: set = field(default_factory=set)
    references: list = field(default_factory=list)  # (label, cell)
    citations: list = field(default_factory=list)   # (key, cell)
    links: list = field(default_factory=list)       # (target, cell)
    problems: list = field(default_factory=list)

    def __post_init__(self):
        for cell in self.cells:
            if cell.kind == "code": self.read_code(cell)
            else: self.read_text(cell.source, cell)
        self.anchors |= self.labels.keys()

    @property
    def title(self):
        header = yaml.safe_load(self.cells[0].source.strip().strip("-")) if self.cells[0].kind == "raw" else {}
        return header.get("title", self.path.removesuffix(".ipynb"))

    def number(self, label):
        "How Quarto calls a labelled thing on its own page."
        alike = [other for other in self.labels if other.partition("-")[0] == label.partition("-")[0]]
        return f"{NUMBERED[label.partition('-')[0]]} {alike.index(label) + 1}"

    def read_code(self, cell):
        "A code cell: its label, its figure, and the Markdown and HTML among its outputs."
        options = cell.directives
        shown = options.get("output") != "false" and options.get("include") != "false"
        if re.fullmatch(CROSS_REFERENCE, label := options.get("label", "")):
            self.labels.setdefault(label, []).append(cell)
            kind, stored = label[:4], ("text/html", "text/markdown") if label.startswith("tbl-") else ("text/html", *IMAGES)
            if kind in ("fig-", "tbl-") and not any(cell.texts(*stored)): self.problems.append(f"{cell} is labeled {label} but stores nothing of the kind.")
            if kind in ("fig-", "tbl-") and not options.get(f"{kind}cap"): self.problems.append(f"{cell} has no caption: add #| {kind}cap.")
        if shown and any(cell.texts(*IMAGES)) and not options.get("fig-alt"):
            self.problems.append(f"{cell} shows a figure and has no words for those who cannot see it: add #| fig-alt.")
        for option in ("fig-cap", "tbl-cap"): self.read_text(options.get(option, ""), cell)
        for text in cell.texts("text/markdown") if shown else (): self.read_text(text, cell)
        for text in cell.texts("text/html") if shown else (): self.read_tags(text, cell)

    def read_text(self, text, cell):
        "Markdown, written in a cell or stored as its output."
        for label in LABEL.finditer(prose := without(text, mathematics=False)):
            self.labels.setdefault(label[1], []).append(cell)
            if label[1].startswith("eq-") and not re.search(r"\$\$[ \t]+$", prose[:label.start()]):
                self.problems.append(f"{cell} has {label[0]} where Quarto does not see it: write `$$ {label[0]}` on one line.")
        prose = without(text)
        self.anchors |= {identifier(heading) for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", without_blocks(text), re.MULTILINE)}
        self.anchors |= set(re.findall(r"\{#([\w:.-]+)", prose))
        for mark in re.findall(r"(?<![\w\\./@-])-?@\{?(\w(?:[\w:.#$%&+?<>~/-]*\w)?)", prose):
            (self.references if re.fullmatch(CROSS_REFERENCE, mark, re.IGNORECASE) else self.citations).append((mark, cell))
        for image, words, target in LINK.findall(prose):
            self.links.append((target, cell))
            if "](" in words: self.problems.append(f"{cell} has a link within the link to {target}, which shows as brackets: leave one of them.")
            if image and not words.strip(): self.problems.append(f"{cell} shows the image {target} without a description: write it between the brackets.")
        self.links += [(target, cell) for target in re.findall(r"^\[[^\]^@]+\]:\s*<?([^\s>]+)", prose, re.MULTILINE)]
        self.read_tags(prose, cell)

    def read_tags(self, text, cell):
        "HTML, written in a cell or stored as its output."
        self.anchors |= set(re.findall(r"<[^>]*\bid\s*=\s*[\"']([^\"']+)", text))
        for name, attributes in TAG.findall(text):
            values = dict(re.findall(r"(\w+)\s*=\s*[\"']([^\"']*)", attributes))
            if name.lower() == "img" and not values.get("alt"): self.problems.append(f"{cell} has an <img> without an alt text.")
            if target := values.get("href") or values.get("src"): self.links.append((target, cell))


def read_pages(tree):
    "The processed pages of a tree; their cells are called what they are called in the notebooks they come from."
    pages = {}
    for path, written in all_notebooks(tree).items():
        here = {cell.raw["id"]: cell for cell in written if "id" in cell.raw}
        cells = read_cells(tree/"_proc", path)
        for cell in cells:
            cell.page, cell.number = f"nbs/{path}", getattr(here.get(cell.raw.get("id")), "number", cell.number)
        pages[path] = Page(path, cells)
    return pages


# Parts: the pages of each part once more as one page, to print

def parts(root):
    "The parts of the site, {page that holds all of one: (its title, its pages in reading order)}, from nbs/sidebar.yml."
    contents = yaml.safe_load((root/"nbs"/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    sections = [entry for entry in contents if isinstance(entry, dict) and str(entry.get("section", "")).startswith("Part ")]
    return {f"print/{identifier(s['section'].partition(': ')[2])}.ipynb": (s["section"], [page for page in s["contents"] if isinstance(page, str)]) for s in sections}


def join(tree, path):
    "Write the page that holds all of a part, from its processed pages: links lead to the pages themselves, labels are numbered through."
    title, pages = parts(tree)[path]
    cells, contents = [], []
    for page in pages:
        if not (tree/"_proc"/page).exists(): continue  # reported elsewhere
        here = json.loads((tree/"_proc"/page).read_text(encoding="utf-8"))["cells"]
        header = yaml.safe_load("".join(here[0]["source"]).strip().strip("-")) if here[0]["cell_type"] == "raw" else {}
        anchor, name = "page-" + page.removesuffix(".ipynb").replace("/", "-"), header.get("title", page)
        contents.append(f"- [{name}](#{anchor})\n")
        cells.append(markdown_cell(anchor, f"# {name} {{#{anchor}}}\n\n[{header.get('description', '')}]{{.claim}}\n"))
        for cell in here[1:] if header else here:
            cells.append({**cell, **({"source": rebase(cell["source"], page)} if cell["cell_type"] == "markdown" else {})})
            if "outputs" in cell: cells[-1]["outputs"] = [rebase_output(output, page) for output in cell["outputs"]]
    front = dict(title=title, description="Every page of this part on one, in reading order, to be printed or saved as a PDF by the browser.",
                 search=False, lightbox=False, **{"toc-depth": 1, "body-classes": "part"})
    opening = [{"cell_type": "raw", "id": "front", "metadata": {}, "source": f"---\n{yaml.safe_dump(front)}---\n".splitlines(keepends=True)},
               markdown_cell("contents", "".join(contents))]
    notebook = dict(cells=opening + cells, metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")), nbformat=4, nbformat_minor=5)
    (tree/"_proc"/path).parent.mkdir(exist_ok=True)
    (tree/"_proc"/path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown_cell(name, text): return {"cell_type": "markdown", "id": name[:64], "metadata": {}, "source": text.splitlines(keepends=True)}


def rebase(text, page):
    "Markdown lines of a page with the links they need in the folder print/; anchors lead to the page, for here they would not be unique."
    def move(match):
        target = match[2]
        if re.match(r"[a-zA-Z][\w+.-]*:|/", target): return match[0]
        address, mark, anchor = target.partition("#")
        there = posixpath.join(posixpath.dirname(page), address) if address else page
        return match[1] + posixpath.relpath(there, "print") + mark + anchor
    text = re.sub(r"^::: \{#\w+\}\n:::\n", "", "".join(text), flags=re.MULTILINE)  # an anchor that `shorten` left
    change = lambda part: re.sub(r"""(\]\(\s*<?|\b(?:src|href)\s*=\s*["']|^\[[^\]]+\]:\s*)([^\s)>"']+)""", move, part, flags=re.MULTILINE)
    return outside_code(text, change).splitlines(keepends=True)


def rebase_output(output, page):
    kinds = [kind for kind in ("text/markdown", "text/html") if kind in output.get("data", {})]
    return {**output, "data": {**output["data"], **{kind: rebase(output["data"][kind], page) for kind in kinds}}} if kinds else output


def read_parts(tree, pages):
    "The pages that hold a whole part; their cells are called what they are called in the notebooks they come from."
    named = {cell.raw["id"]: cell for page in pages.values() for cell in page.cells if "id" in cell.raw}
    found = {}
    for path in parts(tree):
        cells = read_cells(tree/"_proc", path)
        for cell in cells:
            if there := named.get(cell.raw.get("id")): cell.page, cell.number = there.page, there.number
        found[path] = Page(path, cells)
    return found


def owners(pages):
    "Which page gives each label."
    return {label: page for page in pages.values() for label in page.labels}


def link_across(tree):
    "Quarto numbers within a page only: write a reference to another page's label as a link that carries the number it has there."
    pages = read_pages(tree)
    owner = owners(pages)

    def rewrite(text, page):
        def change(match):
            label = match[1][0].lower() + match[1][1:]
            if label not in owner or label in page.labels: return match[0]
            there = posixpath.relpath(owner[label].path, posixpath.dirname(page.path) or ".")
            return f"[{owner[label].number(label)} in “{owner[label].title}”]({there}#{label})"
        # a list of lines: Quarto would run the lines of a single string together
        return outside_code("".join(text), lambda part: REFERENCE.sub(change, part)).splitlines(keepends=True)

    for page in (*pages.values(), *read_parts(tree, pages).values()):
        file = tree/"_proc"/page.path
        notebook = json.loads(file.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = rewrite(cell["source"], page)
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}): output["data"]["text/markdown"] = rewrite(output["data"]["text/markdown"], page)
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def build(root=ROOT):
    "The whole site, into _docs."
    if not shutil.which("quarto"):
        sys.exit("Building the site needs Quarto, which is not on PATH: install it from https://quarto.org/docs/get-started and run `make docs` again.")
    if output := process(root): sys.exit(f"nbdev's docs processing fails:\n{output}")
    link_across(root)
    status, output = run(["quarto", "render", "--no-cache"], root/"_proc", limit=1800)
    print(output)
    if status != 0: sys.exit("Quarto could not build the site; what it said stands above.")
    if lost := re.findall(r"Unable to resolve.*|Citeproc: citation .* not found", output): sys.exit("The site has dead references:\n" + "\n".join(lost))
    shutil.rmtree(root/"_docs", ignore_errors=True)
    shutil.move(root/"_proc"/"_docs", root/"_docs")
    print("The site is in _docs; open _docs/index.html.")


if __name__ == "__main__": build()
