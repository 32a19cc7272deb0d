"""The package as others get it: built, unpacked where nothing of the development tools exists, imported, and asked for its attention."""
import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tarfile
import types
import typing
import zipfile
from collections.abc import Collection
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import theria

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in (ROOT/"theria").rglob("*.py") if p.name not in ("_modidx.py", "__main__.py"))
DEVELOPMENT = ("nbdev", "fastcore", "execnb", "ghapi", "IPython", "ipykernel", "jupyter_core", "nbformat", "pytest", "hypothesis", "jupytext", "transformers", "sklearn", "statsmodels", "yaml")


def run(*command, **kw):
    r = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, **kw)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    return r.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A source distribution of this tree, and a wheel made from it."
    if not find_spec("build") or not find_spec("setuptools"): pytest.skip("building needs the packages build and setuptools")
    folder = tmp_path_factory.mktemp("dist")
    tree = copytree(ROOT, folder/"tree", ignore=ignore_patterns(".git", ".venv", "nbs", "out", "_proc", "_docs", "build", "dist", "*.egg-info", "__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder/"dist", tree, cwd=folder)  # without options the wheel is built from the sdist
    sdist, = (folder/"dist").glob("*.tar.gz")
    wheel, = (folder/"dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as z: z.extractall(folder/"site")
    return sdist, wheel, folder/"site"


def clean(site):
    "An environment in which theria is the unpacked wheel, and development tools cannot be imported."
    blocked = site.parent/"blocked"
    blocked.mkdir(exist_ok=True)
    (blocked/"sitecustomize.py").write_text(f"import sys\nfor name in {DEVELOPMENT}: sys.modules[name] = None\n")
    return {**os.environ, "PYTHONPATH": f"{blocked}:{site}", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def test_what_is_inside(built):
    sdist, wheel, site = built
    with tarfile.open(sdist) as t: names = {n.partition("/")[2] for n in t.getnames()}
    around = {name for name in names if not name.startswith(("theria/", "theria.egg-info/")) and name not in ("", "theria", "theria.egg-info")}
    assert around == {"settings.ini", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "setup.py", "setup.cfg", "pyproject.toml", "PKG-INFO"}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT/"theria").rglob("*") if p.suffix in (".py", ".json", ".typed") and "__pycache__" not in p.parts}
    assert {"theria/py.typed", "theria/attention/configs.json", "theria/__main__.py"} <= wanted and wanted == {name for name in names if name.startswith("theria/") and Path(name).suffix}
    assert wanted == {p.relative_to(site).as_posix() for p in (site/"theria").rglob("*") if p.is_file()}


def test_metadata(built):
    text = next(built[2].glob("*.dist-info/METADATA")).read_text()
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT/"settings.ini")
    assert f"Version: {theria.__version__}\n" in text and settings["DEFAULT"]["version"] == theria.__version__
    assert {"dev", "data", "huggingface"} == set(re.findall(r"Provides-Extra: (\S+)", text))
    assert "Requires-Dist: transformers>=5; extra == \"huggingface\"" in text
    always = re.findall(r"Requires-Dist: ([\w-]+)[^;\n]*(?:; platform_system == \"Linux\")?\n", text)
    assert {"torch", "triton", "numpy"} <= set(always) and not {"nbdev", "fastcore", "transformers"} & set(always)
    assert "theria=theria.cli:main" in next(built[2].glob("*.dist-info/entry_points.txt")).read_text().replace(" ", "")


def test_every_module_imports_without_the_development_tools(built):
    code = f"import importlib, theria; assert 'site' in theria.__file__; [importlib.import_module(m) for m in {MODULES}]; print(len({MODULES}))"
    assert int(run(sys.executable, "-c", code, env=clean(built[2]), cwd=built[2].parent)) == len(MODULES)


def test_import_is_light_and_compiles_nothing(built):
    code = """
import sys, time
import torch
from pathlib import Path
start = time.process_time()
import theria
from theria import sdpa_custom, audit, FlashAttention
seconds = time.process_time() - start  # of this processor, whatever else runs
assert not [m for m in ('matplotlib', 'transformers', 'rich', 'typer') if sys.modules.get(m)], 'heavy imports'
q = torch.randn(1, 2, 3, 4, requires_grad=True)
g, = torch.autograd.grad(sdpa_custom(q, q, q).pow(2).sum(), q, create_graph=True)
g.pow(2).sum().backward()
assert q.grad.norm() > 0 and not any(Path(sys.argv[1]).iterdir())
print(seconds)
"""
    cache = built[2].parent/"triton-cache"
    cache.mkdir(exist_ok=True)
    times = [float(run(sys.executable, "-c", code, cache, env={**clean(built[2]), "TRITON_CACHE_DIR": str(cache)}, cwd=built[2].parent)) for _ in range(2)]
    assert min(times) < 2


def test_the_command_of_the_wheel(built):
    assert run(sys.executable, "-m", "theria", "--version", env=clean(built[2]), cwd=built[2].parent) == f"theria {theria.__version__}\n"
    r = subprocess.run([sys.executable, "-m", "theria", "audit", "stats_detach"], capture_output=True, text=True, env=clean(built[2]), cwd=built[2].parent, timeout=120)
    assert r.returncode == 1 and "wrong, silently" in r.stdout and r.stderr == ""


def test_type_checkers_see_what_the_package_offers():
    "The names that `theria` finds on demand stand with their modules in the block for type checkers."
    tree = ast.parse((ROOT/"theria"/"__init__.py").read_text())
    block, = (node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
    assert {alias.asname: statement.module for statement in block.body for alias in statement.names} == theria._HOME
    for name in theria.__all__:
        signature = inspect.signature(getattr(theria, name))
        assert all(p.annotation is not p.empty or p.default is not p.empty or p.name == "self" for p in signature.parameters.values()), name


def fits(value, hint):
    "Whether a default is what its hint says; () is the empty default of every collection."
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType): return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal: return value in arguments
    kind = origin or hint
    if kind in (int, float): return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return kind is typing.Any or not isinstance(kind, type) or isinstance(value, kind) or value == () and issubclass(kind, Collection)


@pytest.mark.parametrize("value, hint, good", [(1, int, True), (True, int, False), (1, float, True), (None, int | None, True), (None, int, False), ("a", typing.Literal["a"], True),
                                               ("b", typing.Literal["a"], False), ((), list[int], True), ((1,), list[int], False), (1, typing.Any, True)])
def test_what_fits(value, hint, good): assert fits(value, hint) == good


@pytest.mark.parametrize("module", [m for m in MODULES if m != "theria.cli"])  # the command's defaults are text, which its parsers read
def test_type_hints_resolve_and_fit_their_defaults(module):
    found = importlib.import_module(module)
    public = [getattr(found, name) for name in getattr(found, "__all__", ())]
    functions = [f for thing in public for f in ([thing] if inspect.isfunction(thing) else [*vars(thing).values()] if inspect.isclass(thing) and thing.__module__ == module else []) if inspect.isfunction(f)]
    for function in functions:
        hints = typing.get_type_hints(function)  # a name that does not exist raises here
        wrong = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty and n in hints and not fits(p.default, hints[n])}
        assert not wrong, f"{module}.{function.__qualname__}: {wrong}"


def test_the_changelog_has_this_version():
    text = (ROOT/"CHANGELOG.md").read_text()
    assert f"## {theria.__version__}" in text
