"""README.md is made from nbs/index.ipynb: run this file to write it, with --check to see whether it is up to date."""
import argparse
import posixpath
import re
import shutil
import sys
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "README_files"
NOTICE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.*?)\s*$")
MAGIC = re.compile(r"^\s*[%!].*\n?", re.MULTILINE)
CROSS_REFERENCE = r"(?:eq|fig|tbl|sec|lst|thm|lem|cor|prp|cnj|def|exm|exr|alg)-[\w-]*\w"
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```text
{{ output.text | strip_ansi | trim }}
```
{% endblock %}
{% block data_text %}
```text
{{ output.data['text/plain'] | strip_ansi | trim }}
```
{% endblock %}"""


def split_directives(source):
    "The `#| name: value` lines that open a cell, as a dictionary, and the code below them."
    found, lines = {}, source.splitlines(keepends=True)
    while lines and (not lines[0].strip() or DIRECTIVE.match(lines[0])):
        if match := DIRECTIVE.match(lines.pop(0)):
            name, _, value = match[1].replace(":", " ", 1).partition(" ")
            found[name] = value.strip().strip("\"'")
    return found, "".join(lines)


def outside_code(text, change):
    "Apply `change` to the parts of a Markdown text that are neither fenced nor inline code."
    parts = re.split(r"(^```.*?^```\s*?$|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def bibliography(root):
    "The entries of nbs/refs.bib in their order, as (key, fields, line)."
    path = root/"nbs"/"refs.bib"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    starts = [m for m in re.finditer(r"^@(\w+)\s*\{\s*([^,\s]+)\s*,", text, re.MULTILINE) if m[1].lower() not in ("comment", "string")]
    entries = []
    for start, stop in zip(starts, [m.start() for m in starts[1:]] + [len(text)]):
        fields = re.findall(r"^\s*(\w+)\s*=\s*[{\"]?(.*?)[}\"]?,?\s*$", text[start.end():stop], re.MULTILINE)
        entries.append((start[2], {name.lower(): value for name, value in fields}, text.count("\n", 0, start.start()) + 1))
    return entries


def plain(latex):
    "A BibTeX name without braces, its accents composed."
    accents = {"'": "\u0301", "`": "\u0300", '"': "\u0308", "^": "\u0302", "~": "\u0303", "c": "\u0327", "v": "\u030c", "H": "\u030b"}
    letters = dict(l="ł", L="Ł", o="ø", O="Ø", ss="ß")
    text = re.sub(r"\\(['`\"^~]|[cvH](?=[ {]))\s*\{?(\w)\}?", lambda m: m[2] + accents[m[1]], latex)
    text = re.sub(r"\\(l|L|o|O|ss)(?![a-zA-Z])", lambda m: letters[m[1]], text)
    return unicodedata.normalize("NFC", text.replace("{", "").replace("}", ""))


def cite(key, entries):
    "(names, year, address) of a bibliography entry, as a reader of plain Markdown needs them."
    if key not in entries: sys.exit(f"nbs/index.ipynb cites @{key}, which is not in nbs/refs.bib: add the entry or correct the key.")
    entry = entries[key]
    names = [plain(name).partition(",")[0].strip() for name in entry.get("author", key).split(" and ")]
    who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
    address = (f"https://arxiv.org/abs/{entry['eprint']}" if "eprint" in entry else
               f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", ""))
    return who, entry.get("year", "n.d."), address


def link(text, address): return f"[{text}]({address})" if address else text


def citations(text, entries):
    "Replace `[@key; @key]` and `@key` by names, years and links."
    if found := re.search(rf"(?<![\w\\])@{CROSS_REFERENCE}", text):
        sys.exit(f"nbs/index.ipynb refers to {found[0]}, which README.md cannot number: say it in words or with a link.")

    def group(match):
        keys = re.findall(r"-?@([\w:.+/-]*\w)([^;\]]*)", match[1])
        return "(" + "; ".join(link("{}, {}".format(*cite(k, entries)[:2]), cite(k, entries)[2]) + rest.rstrip() for k, rest in keys) + ")"

    def single(match):
        who, year, address = cite(match[1], entries)
        return f"{who} ({link(year, address)})"
    text = re.sub(r"\[((?:[^\[\]]*?[\s;])?-?@[^\[\]]+)\](?!\()", group, text)
    return re.sub(r"(?<![\w\\./-])@([\w:.+/-]*\w)", single, text)


def from_root(text):
    "Rewrite links and image addresses that are relative to nbs/ so that they hold in the folder above it."
    def move(match):
        target = match[2]
        if re.match(r"[a-zA-Z][\w+.-]*:|[/#]", target) or target.startswith(FIGURES + "/"): return match[0]
        path, mark, anchor = target.partition("#")
        return match[1] + posixpath.normpath("nbs/" + path) + mark + anchor
    return re.sub(r"""(\]\(\s*<?|\b(?:src|href)\s*=\s*["']|^\[[^\]]+\]:\s*)([^\s)>"']+)""", move, text, flags=re.MULTILINE)


def markdown(text, entries):
    "Markdown for Quarto as Markdown for GitHub."
    def change(part):
        part = re.sub(r"^:{3,}.*\n?", "", part, flags=re.MULTILINE)
        part = re.sub(r"[ \t]*\{[#.][^{}\n]*\}[ \t]*$", "", part, flags=re.MULTILINE)
        return from_root(citations(part, entries))
    return outside_code(text, change)


def visible(cell, first, entries):
    "A cell as the README shows it, or None when it stays hidden."
    source = cell["source"]
    if cell["cell_type"] == "raw": return None
    if cell["cell_type"] == "markdown":
        if first: source = re.sub(r"^- \S+:.*\n?", "", source, flags=re.MULTILINE)
        return {**cell, "source": markdown(source, entries)}
    directives, code = split_directives(source)
    if {"hide", "export", "exporti", "default_exp"} & directives.keys() or directives.get("include") == "false": return None
    code = MAGIC.sub("", "".join(line for line in code.splitlines(keepends=True) if not re.search(r"#\|\s*hide_line\s*$", line)))
    outputs = [] if directives.get("output") == "false" else [o for o in cell["outputs"] if o["output_type"] != "error"]
    alt = directives.get("fig-alt") or directives.get("fig-cap") or ""
    return {**cell, "source": "" if directives.get("echo") == "false" else code.strip(), "outputs": outputs, "metadata": {"alt": alt}}


def render(root=ROOT):
    "Every file the README consists of, as {path from the root: bytes}."
    import nbformat
    from nbconvert import MarkdownExporter
    notebook = nbformat.read(root/"nbs"/"index.ipynb", as_version=4)
    entries = {key: fields for key, fields, _ in bibliography(root)}
    cells = [visible(cell, i == 0, entries) for i, cell in enumerate(notebook["cells"])]
    notebook["cells"] = [c for c in cells if c and (c["source"].strip() or c.get("outputs"))]
    alts = [c["metadata"].get("alt", "") for c in notebook["cells"]]
    notebook["metadata"]["language_info"] = {"name": "python"}
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    text, resources = exporter.from_notebook_node(nbformat.from_dict(notebook), {"output_files_dir": FIGURES, "unique_key": "figure"})
    text = re.sub(rf"!\[\w*\]\(({FIGURES}/figure_(\d+)_\d+\.\w+)\)", lambda m: f"![{alts[int(m[2])]}]({m[1]})", text)
    text = re.sub(r"^ +$", "", re.sub(r"```python\s*```\n?", "", text), flags=re.MULTILINE)
    text = NOTICE + "\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return {"README.md": text.encode(), **{name: bytes(data) for name, data in resources.get("outputs", {}).items()}}


def differences(root=ROOT):
    "One sentence for every README file that is not what the notebook gives."
    files = render(root)
    wrong = [name for name, data in files.items() if not (root/name).is_file() or (root/name).read_bytes() != data]
    stale = [p.relative_to(root).as_posix() for p in sorted((root/FIGURES).glob("*")) if p.relative_to(root).as_posix() not in files]
    return ([f"{name} is not what nbs/index.ipynb gives: run `make readme`." for name in wrong]
            + [f"{name} belongs to no output of nbs/index.ipynb: run `make readme`." for name in stale])


def write(root=ROOT):
    "Write README.md and its figures."
    shutil.rmtree(root/FIGURES, ignore_errors=True)
    for name, data in render(root).items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when README.md is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to work on")
    args = parser.parse_args()
    if not (args.root/"nbs"/"index.ipynb").is_file(): sys.exit("nbs/index.ipynb does not exist, and README.md is made from it.")
    if not args.check: return write(args.root)
    sys.exit("\n".join(differences(args.root)) or 0)


if __name__ == "__main__": main()
