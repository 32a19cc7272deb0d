"""Every check of `make test`, each with a name.

    python scripts/check.py                  all of them, the quick ones first
    python scripts/check.py clean pages      only these

A check returns its problems, each a sentence that names the file and the cell, and one sentence on what it looked at. Whatever
has to write (nbdev's exporter, test runner and docs processing) works on a temporary copy: the checkout itself stays as it is.
"""
import argparse
import ast
import configparser
import json
import os
import posixpath
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns
from urllib.parse import unquote

import yaml

from assertions import Notebook, test_problems
from pages import all_notebooks, link_across, nbdev, notebook_paths, owners, parts, process, read_pages, read_parts, run, stop
from readme import ROOT, bibliography, differences

BY_PRODUCTS = (".git", ".venv", "_proc", "_docs", "out", "build", "dist", "*.egg-info", "__pycache__", ".ipynb_checkpoints", ".pytest_cache",
               ".hypothesis", ".cache", ".quarto", ".last_checked", ".jupyter_cache")


# A copy of the tree

@contextmanager
def copy_of(root):
    "A temporary copy of the checkout without what building and testing leaves in it."
    with tempfile.TemporaryDirectory(prefix="theria-check-") as folder:
        tree = Path(folder).resolve()/"theria"
        if dotted := [part for part in tree.parts if part.startswith((".", "_"))]:
            sys.exit(f"Temporary files would lie below {dotted[0]}, and nbdev skips such folders: set TMPDIR to another one.")
        copytree(root, tree, symlinks=True, ignore=ignore_patterns(*BY_PRODUCTS))
        yield tree


def contents(tree):
    "What lies in a tree, by-products aside: {path: bytes}."
    skip = ignore_patterns(*BY_PRODUCTS)
    found = {}
    for folder, subfolders, files in os.walk(tree):
        ignored = skip(folder, subfolders + files)
        subfolders[:] = [s for s in subfolders if s not in ignored]
        for name in files:
            path = Path(folder)/name
            if name not in ignored and path.is_file(): found[path.relative_to(tree).as_posix()] = path.read_bytes()
    return found


def changed(before, after): return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def settings(root):
    "The settings that nbdev and setup.py read."
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def tail(output, lines=60): return "\n".join("    " + line for line in output.strip().splitlines()[-lines:])


# clean: notebooks as nbdev_clean leaves them, theria/ as nbdev_export makes it

def unclean_cells(before, after):
    "Which cells of a notebook nbdev_clean would change."
    old, new = json.loads(before), json.loads(after)
    cells = [f"cell {i + 1}" for i, (a, b) in enumerate(zip(old["cells"], new["cells"])) if a != b]
    return ", ".join(cells + ["the notebook's metadata"] * (old["metadata"] != new["metadata"])) or "its layout as a file"


def first_difference(before, after):
    "The first line of `after` that `before` does not have at that place."
    old, new = (text.decode().splitlines() for text in (before, after))
    n = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    return f"line {n + 1}" + (f", {new[n].strip()!r}" if n < len(new) else "")


def check_clean(root):
    "Notebooks are as nbdev_clean leaves them, and theria/ is exactly what nbdev_export makes of them."
    problems = []
    for cells in all_notebooks(root).values():
        for cell in cells:
            if any(o["output_type"] == "error" for o in cell.outputs): problems.append(f"{cell} stores an error: mend it and run it again.")
            if any(o["output_type"] == "execute_result" for o in cell.outputs) and not (cell.body and isinstance(cell.body[-1], ast.Expr)):
                problems.append(f"{cell} stores a result that its code no longer gives: clear the output and run it again.")
            if any(o.get("name") == "stderr" for o in cell.outputs): problems.append(f"{cell} stores what went to stderr: silence its cause.")
            if found := re.search(r"(?<![\w.:/])/(?:home|root|tmp|Users|work|private|usr)/[\w.-]+", "\n".join(cell.texts("text"))):
                problems.append(f"{cell} stores the path {found[0]} of one machine: print something that holds everywhere.")
    with copy_of(root) as tree:
        before = contents(tree)
        status, output = nbdev("clean.nbdev_clean()", tree)
        if status != 0: return problems + [f"nbdev_clean failed:\n{tail(output)}"], ""
        cleaned = contents(tree)
        problems += [f"{page} is not clean ({unclean_cells(before[page], cleaned[page])}): run nbdev_clean." for page in changed(before, cleaned)]
        for path in (p for p in cleaned if p.startswith("theria/") and p.endswith(".py") and not p.endswith(("__init__.py", "__main__.py"))):
            if b"AUTOGENERATED! DO NOT EDIT!" in cleaned[path] or path.endswith("_modidx.py"): (tree/path).unlink()
            else: problems.append(f"{path} is written by hand: everything in theria/ is exported from a notebook.")
        status, output = nbdev("doclinks.nbdev_export()", tree)
        if status != 0: return problems + [f"nbdev_export failed:\n{tail(output)}"], ""
        exported = contents(tree)
        for path in changed(cleaned, exported):
            if path not in exported: problems.append(f"{path} is exported by no notebook any more: delete it.")
            elif path not in cleaned: problems.append(f"{path} does not exist yet: run nbdev_export.")
            else: problems.append(f"{path} is not what its notebook exports, from {first_difference(cleaned[path], exported[path])}: run nbdev_export.")
    modules = [path for path in exported if path.startswith("theria/") and path.endswith(".py")]
    return problems, f"{len(notebook_paths(root))} notebooks, {len(modules)} modules."


# notebooks: every notebook runs

def check_notebooks(root, limit=300, workers=2):
    "Every notebook runs through nbdev's test runner, in a process of its own with a time limit, and leaves nothing behind."
    def test(path):
        start = time.monotonic()
        status, output = nbdev("test.nbdev_test(path=sys.argv[1], n_workers=0)", tree, f"nbs/{path}", limit=limit)
        seconds = time.monotonic() - start
        if status is None: problem = f"nbs/{path} was ended after {limit} s, its time limit; so far it printed:\n{tail(output)}"
        elif status != 0 or "Success." not in output: problem = f"nbs/{path} fails:\n{tail(output.partition('nbdev Tests Failed')[0])}"
        else: problem = None
        print(f"  {path}: {'failed' if problem else 'passed'}, {seconds:.0f} s", flush=True)
        return seconds, path, problem

    with copy_of(root) as tree:
        before = contents(tree)
        pool = ThreadPoolExecutor(workers)
        try: results = list(pool.map(test, notebook_paths(tree)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()  # nothing is left to stop unless this was interrupted
        problems = [problem for *_, problem in results if problem]
        for path in changed(before, contents(tree)): problems.append(f"Running the notebooks wrote or changed {path}: use a temporary folder.")
    slowest = ", ".join(f"{path} {seconds:.0f} s" for seconds, path, _ in sorted(results, reverse=True)[:5])
    return problems, f"{len(results)} notebooks ran; the slowest: {slowest}."


# pages: the site as a reader will see it

def page_problems(tree, host):
    "Every reference, citation, link and figure of a tree's processed pages that leads nowhere."
    pages = read_pages(tree)
    known = owners(pages)
    problems = [problem for page in pages.values() for problem in page.problems]
    for label in known:
        places = [cell for page in pages.values() for cell in page.labels.get(label, ())]
        if len(places) > 1: problems.append(f"The label {label} is given {len(places)} times: {', '.join(map(str, places))}.")
    printed = read_parts(tree, pages)
    problems += [problem for page in printed.values() for problem in page.problems if problem not in problems]
    for path, (title, held) in parts(tree).items():
        lost = [label for page in held if page in pages for label in pages[page].labels if label not in printed[path].labels]
        if lost: problems.append(f"{path}, which is to hold all of {title}, has not {', '.join(lost)}.")
    for page in (*pages.values(), *printed.values()):
        for label, cell in page.references:
            name = label[0].lower() + label[1:]
            if name not in known: problems.append(f"{cell} refers to @{label}, which labels nothing on the site.")
            elif name not in page.labels:
                problems.append(f"{cell} refers to @{label} of {known[name].path} where it cannot be made a link: say it in the text.")
        for target, cell in page.links:
            if problem := broken_link(target, page, pages, tree/"_proc", host): problems.append(f"{cell} links to {target}, {problem}.")
    return problems + bibliography_problems(tree, pages)


def broken_link(target, page, pages, site, host):
    "Why a link does not lead anywhere, or None; addresses outside the site are taken as they are."
    from_nbdev = target.startswith(host + "/")
    if from_nbdev: address, _, anchor = target[len(host) + 1:].partition("#")
    elif re.match(r"[a-zA-Z][\w+.-]*:|//", target): return None
    else: address, _, anchor = target.partition("#")
    if not address and not from_nbdev: return None if unquote(anchor) in page.anchors else "but this page has no such anchor"
    path = posixpath.normpath(unquote(address) if from_nbdev else posixpath.join(posixpath.dirname(page.path), unquote(address)))
    if path.startswith(("..", "/")): return "which lies outside the site: link to the repository on the web"
    path = re.sub(r"\.html$", ".ipynb", path)
    if path.endswith(".ipynb") and path not in pages or not (site/path).exists(): return "which does not exist"
    if anchor and not from_nbdev and path in pages and unquote(anchor) not in pages[path].anchors: return f"but {path} has no such anchor"


def bibliography_problems(root, pages):
    "Citations without an entry; entries without a citation, given twice, out of order or without what a reader needs."
    problems, entries = [], bibliography(root)
    keys = [key for key, _, _ in entries]
    cited = {key for page in pages.values() for key, _ in page.citations}
    for page in pages.values():
        problems += [f"{cell} cites @{key}, which is not in nbs/refs.bib." for key, cell in page.citations if key not in keys]
    for (key, fields, line), before in zip(entries, [""] + keys):
        where = f"nbs/refs.bib line {line}: the entry {key}"
        if key not in cited: problems.append(f"{where} is cited by no page.")
        if keys.count(key) > 1: problems.append(f"{where} stands there {keys.count(key)} times.")
        if key.lower() < before.lower(): problems.append(f"{where} stands after {before}: keep the entries sorted by key.")
        for needed in {"title", "author", "year"} - fields.keys(): problems.append(f"{where} has no {needed}.")
    return problems


def title_problems(cells):
    "nbdev makes the first cell a page's title block: everything in it but the title and one line of claim would vanish."
    cell = cells[0]
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if cell.kind != "markdown" or not lines or not lines[0].startswith("# "): return [f"{cell} must be Markdown and open with `# Title`."]
    if len(lines) < 2 or not lines[1].startswith("> "): return [f"{cell} has no claim: below the title comes one line `> sentence`."]
    return [f"{cell} has {line[:40]!r} below the claim, which nbdev drops from the page: move it to a cell of its own."
            for line in lines[2:] if not re.match(r"- \S+:\s", line)]


def mixed_imports(cell):
    "Building the docs runs every cell that imports something, so imports stand alone."
    if cell.exported or not cell.kind == "code": return False
    nodes = [type(node) for statement in cell.body for node in ast.walk(statement)]
    return bool({ast.Import, ast.ImportFrom} & set(nodes)) and bool({ast.Expr, ast.Assign} & set(nodes))


def sidebar_problems(root):
    def targets(node):
        if isinstance(node, str): return [node]
        values = node if isinstance(node, list) else [node[key] for key in ("contents", "href", "file") if key in node]
        return [target for value in values for target in targets(value)]
    listed = targets(yaml.safe_load((root/"nbs"/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"])
    paths, whole = notebook_paths(root), parts(root)
    return ([f"nbs/sidebar.yml does not list {path}, all of {title} on one page: put it below the pages of that part." for path, (title, _) in whole.items() if path not in listed]
            + [f"nbs/{path} is not in nbs/sidebar.yml." for path in paths if path not in listed]
            + [f"nbs/sidebar.yml lists {path}, which does not exist." for path in listed if not (root/"nbs"/path).exists() and path not in whole]
            + [f"nbs/sidebar.yml lists {path} {listed.count(path)} times." for path in dict.fromkeys(listed) if listed.count(path) > 1])


def check_pages(root):
    "Every page goes through nbdev's docs processing, and every reference, citation, link, figure and image on it resolves."
    notebooks = all_notebooks(root)
    problems = sidebar_problems(root)
    for cells in notebooks.values():
        problems += title_problems(cells)
        problems += [f"{cell} imports and does other things, and docs builds would run all of it: give imports a cell of their own."
                     for cell in cells if mixed_imports(cell)]
    problems += differences(root) if "index.ipynb" in notebooks else ["nbs/index.ipynb does not exist, and README.md is made from it."]
    with copy_of(root) as tree:
        if output := process(tree): return problems + [f"nbdev's docs processing fails:\n{tail(output)}"], ""
        if missing := [path for path in notebooks if not (tree/"_proc"/path).exists()]:
            return problems + [f"nbs/{path} was left out by nbdev's docs processing." for path in missing], ""
        if (tree/"nbs"/"nbdev.yml").read_bytes() != (root/"nbs"/"nbdev.yml").read_bytes():
            problems.append("nbs/nbdev.yml is not what settings.ini gives: run nbdev_proc_nbs or copy the changed line.")
        link_across(tree)
        facts = settings(root)
        problems += page_problems(tree, facts["doc_host"] + facts["doc_baseurl"])
    return problems, f"{len(notebooks)} pages, {len(bibliography(root))} works cited."


# layers: who may import whom

LAYERS = (("attention",), ("records", "report"), ("layers", "decoder", "drop_in", "huggingface", "distributed"), ("bench",), ("meta", "neural_process", "uses"), ("where", "reproduce"), ("cli", "__main__"))
DEVELOPMENT = {"nbdev", "fastcore", "execnb"}
MODULE_OF = {"scikit-learn": "sklearn", "pillow": "PIL"}


def imports(path, package, lib):
    "Every import of a file as (module, line, whether it runs with the module), with relative names resolved."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            submodules = [a.name for a in node.names if module == lib.name and ((lib/a.name).is_dir() or (lib/f"{a.name}.py").exists())]
            names = [f"{module}.{name}" for name in submodules] + [module] * (len(submodules) < len(node.names))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        yield from ((name, node.lineno, id(node) not in inside) for name in names)


def requirements(root):
    "The modules theria may always import, and those an extra may bring."
    found = {key: {MODULE_OF.get(name, name) for name in re.findall(r"(?:^|\s)([\w-]+)", value)}
             for key, value in settings(root).items() if key.endswith("requirements") and not key.startswith("dev")}
    return found.get("requirements", set()), set().union(*found.values())


def check_layers(root):
    "theria/attention imports nothing of theria outside itself, nothing imports upwards, and only declared dependencies are imported."
    problems, lib = [], root/"theria"
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    always, extras = requirements(root)
    files = [path for path in sorted(lib.rglob("*.py")) if path.name != "_modidx.py"]
    for path in files:
        package = list(path.relative_to(root).with_suffix("").parts[:-1])
        own = path.relative_to(lib).parts[0].removesuffix(".py")
        if own != "__init__" and own not in level:
            problems.append(f"{path.relative_to(root)} has no layer: give {own} its place in LAYERS of scripts/check.py.")
            continue
        for module, line, at_start in imports(path, package, lib):
            where, (top, _, rest) = f"{path.relative_to(root)} line {line} imports {module}", module.partition(".")
            other = rest.partition(".")[0]
            if top == lib.name:
                if own == "__init__" and other not in ("", "attention"):
                    problems.append(f"{where}: theria/__init__.py offers the operator only, so that `import theria` stays light.")
                elif own == "attention" and other != "attention": problems.append(f"{where}: theria/attention imports nothing of theria outside itself.")
                elif own in level and level.get(other, 0) > level[own]: problems.append(f"{where}: {own} lies below {other}, and nothing imports upwards.")
            elif top in DEVELOPMENT: problems.append(f"{where}: {top} is a development tool that users do not have.")
            elif top not in sys.stdlib_module_names and top not in (always if at_start else extras | {"IPython"}):
                problems.append(f"{where}: {top} is not among the requirements of settings.ini.")
    return problems, f"{len(files)} modules."


# types: the hints are right, and a user's type checker sees them

def check_types(root):
    "Type hints agree with the code and with what a user's type checker is to see (tests/typed.py), as mypy judges."
    with tempfile.TemporaryDirectory(prefix="theria-check-") as cache:
        status, output = run([sys.executable, "-m", "mypy", "--cache-dir", cache, "--no-pretty", "--hide-error-context"], root)
    found = re.findall(r"^(\S+?):(\d+): error: (.*?)(?:  \[([\w-]+)\])?$", output, re.M)
    problems = [f"{path} line {line}: {message.removesuffix('.')} ({code or 'error'})." for path, line, message, code in found]
    if status != 0 and not problems: problems = [f"mypy fails:\n{tail(output)}"]
    files = re.search(r"in (\d+) source files", output)
    return problems, f"{files[1]} files." if files else ""


# asserts: nothing passes without checking something

def check_asserts(root):
    "No test, and no notebook cell, can pass without asserting or showing something; assertions reach every exported name."
    notebooks = [Notebook(cells) for cells in all_notebooks(root).values()]
    problems = [problem for notebook in notebooks for problem in notebook.problems]
    counted = -1
    while counted < (count := sum(len(notebook.reached) for notebook in notebooks)):
        counted = count
        passed_on = {origin for notebook in notebooks for origin in notebook.passed_on()}
        for notebook in notebooks: notebook.credit(name for name in notebook.public if (notebook.module, name) in passed_on)
    for notebook in notebooks:
        problems += [f"{cell} exports {name}, which no assertion of this notebook reaches."
                     for name, cell in notebook.public.items() if name not in notebook.reached]
    files = [path for folder in ("tests", "examples", "scripts") for path in sorted((root/folder).rglob("*.py"))]
    for path in files: problems += test_problems(path, path.relative_to(root).as_posix())
    return problems, f"{len(notebooks)} notebooks and {len(files)} files."


# tests: pytest

def check_tests(root, limit=900, workers=2):
    "pytest passes, and leaves nothing behind."
    def test(files):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={limit // 2}", "--durations=3", *files]
        status, output = run(command, tree, limit=limit)
        names = ", ".join(path.name for path in files)
        if status is None: return {}, f"pytest was ended after {limit} s, its time limit, in {names}; so far it printed:\n{tail(output)}"
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output.strip().rpartition("\n")[2])}
        return counts, f"pytest fails in {names}:\n{tail(output, 200)}" if status != 0 else None

    with copy_of(root) as tree:
        before = contents(tree)
        files = sorted((tree/"tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
        groups = [files[i::3*workers] for i in range(min(3*workers, len(files)))]  # several for each worker, so that a slow one does not come last
        pool = ThreadPoolExecutor(workers)
        try: results = list(pool.map(test, groups))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
        problems = [f"Running the tests wrote or changed {path}: use tmp_path." for path in changed(before, contents(tree))]
    problems += [problem for _, problem in results if problem]
    total = lambda what: sum(counts.get(what, 0) for counts, _ in results)
    return problems, f"{total('passed')} tests passed, {total('skipped')} were skipped."


CHECKS = dict(layers=check_layers, asserts=check_asserts, types=check_types, clean=check_clean, pages=check_pages, notebooks=check_notebooks, tests=check_tests)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"checks to run: {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to work on")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in CHECKS]:
        parser.error(f"there is no check {unknown[0]!r}: choose from {', '.join(CHECKS)}")
    failed, start = [], time.monotonic()
    for name in args.names or CHECKS:
        check, began = CHECKS[name], time.monotonic()
        print(f"{name}: {check.__doc__}", flush=True)
        problems, summary = check(args.root.resolve())
        for problem in problems: print(f"- {problem}")
        verdict = f"FAILED, {len(problems)} to mend" if problems else "passed"
        print(f"  {verdict} in {time.monotonic() - began:.0f} s{': ' * bool(summary)}{summary}\n", flush=True)
        if problems: failed.append(name)
    print(f"{'Failed: ' + ', '.join(failed) if failed else 'All passed'}, in {time.monotonic() - start:.0f} s.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: sys.exit("Interrupted.")
