"""The checks of scripts/check.py catch what they are there for: each test plants one fault in a small repository."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
import assertions
import check
import git_notebooks
import pages
import readme

HOST = "https://theria-attention.github.io/theria"
BIB = "@article{ada1843,\n  title = {Notes},\n  author = {Lovelace, Ada},\n  year = {1843},\n  eprint = {1843.00001}\n}\n"


def md(source): return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source, *outputs):
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": list(outputs), "source": source}


def text(value): return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/plain": value}}


def png(): return {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}}


def svg(words): return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"image/svg+xml": f'<svg viewBox="0 0 1 1" role="img" aria-label="{words}"></svg>'}}


TITLE = md("# Doubling\n\n> Twice a thing is the thing added to itself.")
DOUBLE = [TITLE, code("#| default_exp attention.double"), code("#| hide\nfrom fastcore.test import test_eq"),
          md("Two halves make one whole [@ada1843]:\n\n$$ 2x = x + x $$ {#eq-double}\n\nand @eq-double is what we write, for `@eq-nothing` at all."),
          code('#| export\ndef double(\n    x:int, # a number\n) -> int: # twice of it\n    "Twice of a number (@eq-double)."\n    return x + x'),
          code("test_eq(double(2), 4)\ndouble(3)", text("6"))]
INDEX = [md("# theria\n\n> Attention."), md("See [doubling](attention/double.ipynb#eq-double).")]


def write(root, path, cells):
    "Write a notebook as nbdev_clean leaves it."
    cells = [{**cell, "id": f"{i:08x}", "source": cell["source"].splitlines(keepends=True)} for i, cell in enumerate(cells)]
    notebook = {"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    (root/path).parent.mkdir(parents=True, exist_ok=True)
    (root/path).write_text(git_notebooks.clean(json.dumps(notebook)), encoding="utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "A repository of two notebooks, in a folder with a space in its name, that passes every check."
    root = tmp_path_factory.mktemp("house")/"the house"
    (root/"nbs").mkdir(parents=True)
    shutil.copy(ROOT/"settings.ini", root)
    write(root, "nbs/attention/double.ipynb", DOUBLE)
    write(root, "nbs/index.ipynb", INDEX)
    (root/"nbs"/"refs.bib").write_text(BIB)
    (root/"nbs"/"sidebar.yml").write_text("website:\n  sidebar:\n    contents:\n      - index.ipynb\n      - section: One\n        contents: [attention/double.ipynb]\n")
    (root/"theria"/"attention").mkdir(parents=True)
    (root/"theria"/"__init__.py").write_text('__version__ = "0.1.0"\n')
    assert pages.nbdev("doclinks.nbdev_export()", root)[0] == 0
    shutil.copy(ROOT/"_quarto.yml", root/"nbs")
    assert pages.run([sys.executable, "-c", "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"], root)[0] == 0
    readme.write(root)
    return root


@pytest.fixture
def house(template, tmp_path): return Path(shutil.copytree(template, tmp_path/"the house", symlinks=True))


def said(problems, *words):
    "Whether exactly one problem was found, and it says all the words."
    return len(problems) == 1 and all(word in problems[0] for word in words) or pytest.fail(f"expected one problem with {words}, got {problems}")


# Type hints

@pytest.mark.parametrize("module, user, words", [
    ("def twice(x:float) -> float: return 2*x", "twice(1.0)", None),
    ("def twice(x:float) -> str: return 2*x", "twice(1.0)", ("theria/hints.py line 1", '"float"', '"str"')),
    ("def twice(x:float) -> float: return 2*x", "twice('1')", ("tests/typed.py line 2", '"str"')),
    ("def twice(x:float) -> float: return 2*x", "twice(1.0) # type: ignore", ("tests/typed.py line 2", "ignore")),
    ("def twice(x:float) -> float: return 2*", "twice(1.0)", ("theria/hints.py line 1", "syntax"))], ids=["sound", "hint", "user", "ignore", "syntax"])
def test_type_hints(tmp_path, module, user, words):
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    for path, source in (("theria/__init__.py", ""), ("theria/hints.py", module), ("tests/typed.py", f"from theria.hints import twice\n{user}")):
        (tmp_path/path).parent.mkdir(exist_ok=True)
        (tmp_path/path).write_text(source + "\n")
    problems, summary = check.check_types(tmp_path)
    assert problems == [] and summary == "3 files." if words is None else said(problems, *words)


# The repository without a fault, and the checks that need nbdev

def test_a_sound_house_passes_and_stays_as_it_is(house):
    before = check.contents(house)
    for name in ("layers", "asserts", "clean", "pages"): assert check.CHECKS[name](house)[0] == [], name
    assert check.contents(house) == before


def test_dirty_notebook(house):
    path = house/"nbs/attention/double.ipynb"
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 7', 2))
    assert said(check.check_clean(house)[0], "nbs/attention/double.ipynb", "cell 2", "nbdev_clean")


@pytest.mark.parametrize("change, words", [
    (lambda root: (root/"theria/attention/double.py").write_text((root/"theria/attention/double.py").read_text().replace("x + x", "2*x")),
     ("theria/attention/double.py", "x + x", "nbdev_export")),
    (lambda root: write(root, "nbs/attention/double.ipynb", DOUBLE[:4] + [code(DOUBLE[4]["source"] + "\n")] + DOUBLE[5:] + [code("#| export\nfour = 4")]),
     ("theria/attention/double.py", "nbdev_export")),
    (lambda root: shutil.copy(root/"theria/attention/double.py", root/"theria/attention/triple.py"), ("theria/attention/triple.py", "no notebook")),
    (lambda root: (root/"theria/attention/byhand.py").write_text("x = 1\n"), ("theria/attention/byhand.py", "by hand")),
], ids=["module edited", "notebook edited", "orphan", "by hand"])
def test_stale_export(house, change, words):
    change(house)
    problems = [problem for problem in check.check_clean(house)[0] if "_modidx" not in problem]
    assert said(problems, *words)


@pytest.mark.parametrize("output, word", [
    ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "error"),
    ({"output_type": "stream", "name": "stderr", "text": "careful"}, "stderr"),
    (text("/home/ada/theria/x.json"), "/home/ada")])
def test_stored_accidents(house, output, word):
    write(house, "nbs/attention/double.ipynb", DOUBLE + [code("double(4)", output)])
    assert said(check.check_clean(house)[0], "nbs/attention/double.ipynb cell 7", word)


def test_result_of_an_earlier_version(house):
    write(house, "nbs/attention/double.ipynb", DOUBLE + [code("y = double(4)", text("8"))])
    assert said(check.check_clean(house)[0], "nbs/attention/double.ipynb cell 7", "no longer gives")


def test_broken_notebook(house):
    (house/"nbs/attention/double.ipynb").write_text("<<<<<<< HEAD\n{}")
    with pytest.raises(SystemExit, match="nbs/attention/double.ipynb is not a notebook"): check.check_clean(house)


def test_failing_notebook_and_left_files(house):
    write(house, "nbs/attention/double.ipynb", DOUBLE + [code("test_eq(double(2), 5)")])
    write(house, "nbs/index.ipynb", INDEX + [code("open('left.txt', 'w').close()")])
    failing, left = check.check_notebooks(house)[0]
    assert "nbs/attention/double.ipynb fails" in failing and "4" in failing and "5" in failing
    assert "nbs/left.txt" in left and not (house/"nbs/left.txt").exists()


def test_time_limit():
    status, output = pages.run([sys.executable, "-c", "import time; print('so far'); time.sleep(60)"], ROOT, limit=2)
    assert status is None and "so far" in output


def test_late_notebook(house, monkeypatch):
    monkeypatch.setattr(check, "nbdev", lambda *args, **kwargs: (None, "so far") if "index" in args[2] else (0, "Success."))
    assert said(check.check_notebooks(house, limit=5)[0], "nbs/index.ipynb", "5 s", "so far")


def test_notebook_that_nbdev_skips(house, monkeypatch):
    monkeypatch.setattr(check, "nbdev", lambda *args, **kwargs: (0, "No files were eligible for testing"))
    assert len(check.check_notebooks(house)[0]) == 2


def test_page_that_does_not_process(house):
    write(house, "nbs/attention/double.ipynb", DOUBLE + [code("#| export\nimport nothing_of_this_name")])
    assert "nothing_of_this_name" in check.check_pages(house)[0][-1]


def test_pytest_failure_and_left_files(house):
    (house/"tests").mkdir()
    (house/"tests"/"test_it.py").write_text("def test_it():\n    open('left.txt', 'w').close()\n    assert 1 + 1 == 3\n")
    left, failing = check.check_tests(house)[0]
    assert "left.txt" in left and "1 + 1 == 3" in failing


# Pages; processed ones are stood in for by the notebooks themselves

def page_faults(house, *cells, index=INDEX):
    write(house, "nbs/attention/double.ipynb", DOUBLE + list(cells))
    write(house, "nbs/index.ipynb", index)
    shutil.copytree(house/"nbs", house/"_proc", dirs_exist_ok=True)
    pages.link_across(house)
    return check.page_problems(house, HOST)


@pytest.mark.parametrize("cell, words", [
    (md("By @eq-triple."), ("cell 7", "@eq-triple")),
    (md("By [-@fig-triple]."), ("cell 7", "@fig-triple")),
    (md("$$ y $$ {#eq-double}"), ("eq-double is given 2 times", "cell 4", "cell 7")),
    (md("$$ y $$\n{#eq-late}"), ("{#eq-late}", "one line")),
    (md("As in [see @babbage1837, p. 3]."), ("@babbage1837", "refs.bib")),
    (md("![A plan](plan.png)"), ("plan.png", "does not exist")),
    (md("![](../refs.bib)"), ("../refs.bib", "description")),
    (md("<img src='../refs.bib'>"), ("cell 7", "alt")),
    (md("[away](../../README.md)"), ("../../README.md", "outside the site")),
    (md("[gone](gone.ipynb)"), ("gone.ipynb", "does not exist")),
    (md("[start](../index.ipynb#nowhere)"), ("../index.ipynb#nowhere", "no such anchor")),
    (md("[below](#nowhere)"), ("#nowhere", "no such anchor")),
    (md(f"[`gone`]({HOST}/attention/gone.html#gone)"), ("gone.html", "does not exist")),
    (code("double(5)", png()), ("cell 7", "fig-alt")),
    (code("#| label: fig-five\n#| fig-cap: Five\ndouble(5)", png()), ("cell 7", "fig-alt")),
    (md("[see [here](../index.ipynb) too](../index.ipynb)"), ("cell 7", "link within the link")),
    (code("#| label: fig-five\n#| fig-cap: Five\ndouble(5)"), ("fig-five", "stores nothing")),
    (code("#| label: fig-five\ndouble(5)", png()), ("cell 7", "fig-cap")),
    (code("double(5)", {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/markdown": "By @eq-triple."}}), ("cell 7", "@eq-triple")),
])
def test_page_faults(house, cell, words):
    assert any(all(word in problem for word in words) for problem in page_faults(house, cell))


@pytest.mark.parametrize("cell", [
    md("## A *new* part, `with` code\n\n[here](#a-new-part-with-code)"), md("mail@eq-mail.org and `@gone`, \\@ada, ${@gone}$"),
    md("```\n@eq-gone [x](gone.png)\n```"), md("[@ada1843; @eq-double] and [web](https://example.org/@gone)"), md("![A plan](../refs.bib){#fig-plan}\n\nSee @fig-plan."),
    md("[index](../index.html)"), code("#| label: fig-five\n#| fig-cap: 'Five, by @eq-double'\n#| fig-alt: A five\ndouble(5)", png())])
def test_sound_pages(house, cell): assert page_faults(house, cell) == []


def test_reference_to_another_page_becomes_a_link(house):
    there = md("# theria\n\n> Attention."), md("$$ a $$ {#eq-a}\n\n$$ b $$ {#eq-b}")
    assert page_faults(house, md("By @eq-b, [@eq-a] and `@eq-b`."), index=list(there)) == []
    linked = pages.read_cells(house, "_proc/attention/double.ipynb")[-1].source
    assert linked == "By [Equation 2 in “index”](../index.ipynb#eq-b), [Equation 1 in “index”](../index.ipynb#eq-a) and `@eq-b`."


def test_references_in_tables_and_of_other_kinds_become_links(house):
    there = [*INDEX, code("#| label: fig-plan\n#| fig-cap: A plan.\n#| fig-alt: A plan\ndouble(5)", png()), md("## Twice {#sec-twice}")]
    table = {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/markdown": "| see @fig-plan |\n|---|"}}
    page_faults(house, md("As in @Fig-plan, and\nin [-@fig-plan]; `@fig-plan`\n\n```\n@fig-plan\n```"), code("double(6)", table), index=there)
    *_, prose, cell = pages.read_cells(house, "_proc/attention/double.ipynb")
    link = "[Figure 1 in “index”](../index.ipynb#fig-plan)"
    assert prose.source == f"As in {link}, and\nin {link}; `@fig-plan`\n\n```\n@fig-plan\n```"
    assert next(cell.texts("text/markdown")) == f"| see {link} |\n|---|"


def test_figures_bring_their_words_and_links_do_not_nest(house):
    write(house, "nbs/attention/double.ipynb", DOUBLE + [code("double(5)", svg("A &lt;five&gt;")), md("[see `double` too](../index.ipynb), not `double`")])
    assert pages.process(house) is None and check.page_problems(house, HOST) == []
    *_, figure, prose = pages.read_cells(house, "_proc/attention/double.ipynb")
    assert figure.directives["fig-alt"] == "A <five>" and figure.code.strip() == "double(5)"
    assert prose.source == f"[see `double` too](../index.ipynb), not [`double`]({HOST}/attention/double.html#double)"


PARTS = """website:
  sidebar:
    contents:
      - index.ipynb
      - section: "Part I: the numbers"
        contents: [attention/double.ipynb, attention/triple.ipynb, {text: all, href: print/the-numbers.ipynb}]
"""


def with_a_part(house, *cells):
    "A house whose second part page refers to the first, with `cells` at its end, processed as the site is."
    write(house, "nbs/attention/triple.ipynb", [md("# Tripling\n\n> More."), md("$$ 3x = 2x + x $$ {#eq-triple}\n\nSee @eq-double, @eq-triple and @eq-start."), *cells])
    write(house, "nbs/index.ipynb", [INDEX[0], md("$$ a $$ {#eq-start}")])
    (house/"nbs/sidebar.yml").write_text(PARTS)
    assert pages.process(house) is None
    pages.link_across(house)
    return pages.read_cells(house, "_proc/print/the-numbers.ipynb")


def test_a_private_name_is_no_link(house):
    private = code("#| export\ndef _half(x): return x/2")
    write(house, "nbs/attention/double.ipynb", [*DOUBLE, private, code("assert _half(2) == 1"), md("`_half` and `double`")])
    assert pages.nbdev("doclinks.nbdev_export()", house)[0] == 0 and pages.process(house) is None
    assert pages.read_cells(house, "_proc/attention/double.ipynb")[-1].source == f"`_half` and [`double`]({HOST}/attention/double.html#double)"


def test_a_part_is_also_one_page(house):
    cells = with_a_part(house, md("[one](../index.ipynb), [two](double.ipynb#eq-double), [three](#below), `[four](x)`\n\n## Below"))
    text = "\n".join(cell.source for cell in cells)
    assert text.index("# Doubling {#page-attention-double}") < text.index("{#eq-double}") < text.index("# Tripling") < text.index("{#eq-triple}")
    assert "See @eq-double, @eq-triple and [Equation 1 in “theria”](../index.ipynb#eq-start)." in text  # numbered through, except what lies outside
    assert "[one](../index.ipynb), [two](../attention/double.ipynb#eq-double), [three](../attention/triple.ipynb#below), `[four](x)`" in text
    assert cells[0].kind == "raw" and "Part I: the numbers" in cells[0].source and "search: false" in cells[0].source
    assert check.page_problems(house, HOST) == []


def test_a_part_that_lost_something(house):
    with_a_part(house)
    file = house/"_proc/print/the-numbers.ipynb"
    file.write_text(file.read_text().replace("{#eq-triple}", ""))
    assert any(all(word in problem for word in ("print/the-numbers.ipynb", "Part I: the numbers", "eq-triple")) for problem in check.page_problems(house, HOST))


def test_a_part_that_the_sidebar_does_not_offer(house):
    (house/"nbs/sidebar.yml").write_text(PARTS.replace(", {text: all, href: print/the-numbers.ipynb}", ""))
    write(house, "nbs/attention/triple.ipynb", [TITLE])
    assert said(check.sidebar_problems(house), "print/the-numbers.ipynb", "Part I: the numbers")


def test_references_within_a_page_are_left_to_quarto(house):
    assert page_faults(house, md("Again @eq-double.")) == []
    assert pages.read_cells(house, "_proc/attention/double.ipynb")[-1].source == "Again @eq-double."


@pytest.mark.parametrize("bib, words", [
    (BIB + BIB.replace("ada1843", "zuse1936"), ("zuse1936", "cited by no page")),
    (BIB + BIB, ("ada1843", "2 times")),
    (BIB.replace("  year = {1843},\n", ""), ("ada1843", "no year")),
    (BIB + BIB.replace("ada1843", "aaa1800"), ("aaa1800", "sorted"))])
def test_bibliography_faults(house, bib, words):
    (house/"nbs"/"refs.bib").write_text(bib)
    assert any(all(word in problem for word in words) for problem in page_faults(house, md("[@aaa1800]") if "aaa" in bib else md("")))


@pytest.mark.parametrize("cells, word", [
    ([md("# T\n\n> C.\n\nLost prose.")], "Lost prose"), ([md("# T")], "claim"), ([code("x = 1")], "Title"), ([md("# T\n\n> C.\n\n- skip_showdoc: true")], None)])
def test_title_cell(house, cells, word):
    write(house, "nbs/new.ipynb", cells)
    problems = check.title_problems(pages.read_cells(house, "nbs/new.ipynb"))
    assert said(problems, word) if word else problems == []


def test_imports_stand_alone(house):
    write(house, "nbs/new.ipynb", [TITLE, code("import os\nprint(os)"), code("import os"), code("#| export\nimport os\nhere = os.getcwd()")])
    assert [check.mixed_imports(cell) for cell in pages.read_cells(house, "nbs/new.ipynb")] == [False, True, False, False]


def test_sidebar(house):
    write(house, "nbs/new.ipynb", [TITLE])
    (house/"nbs/sidebar.yml").write_text((house/"nbs/sidebar.yml").read_text().replace("index.ipynb", "gone.ipynb"))
    problems = "\n".join(check.sidebar_problems(house))
    assert all(f"nbs/{name}.ipynb is not in" in problems for name in ("new", "index")) and "lists gone.ipynb, which does not exist" in problems


# Layers

@pytest.mark.parametrize("path, line, words", [
    ("attention/double.py", "from theria.layers import x", ("theria/attention/double.py line 1", "outside itself")),
    ("attention/double.py", "from ..records import x", ("theria.records", "outside itself")),
    ("attention/double.py", "import theria", ("outside itself",)),
    ("layers.py", "from .meta.adapt import x", ("theria.meta.adapt", "upwards")),
    ("records.py", "from theria import layers", ("theria.layers", "upwards")),
    ("meta/adapt.py", "def f():\n    import theria.cli", ("line 2", "upwards")),
    ("meta/adapt.py", "import importlib\nimportlib.import_module('theria.cli')", ("line 2", "upwards")),
    ("layers.py", "from fastcore.test import test_eq", ("fastcore", "development")),
    ("layers.py", "def f():\n    import nbdev", ("nbdev", "development")),
    ("layers.py", "import IPython", ("IPython", "requirements")),
    ("layers.py", "import pandas", ("pandas", "requirements")),
    ("surprise.py", "", ("theria/surprise.py", "no layer")),
    ("__init__.py", "from .layers import x", ("light",))])
def test_upward_imports(house, path, line, words):
    (house/"theria"/path).parent.mkdir(exist_ok=True)
    for name in ("layers", "records", "cli"): (house/"theria"/f"{name}.py").touch()
    (house/"theria"/path).write_text(line + "\n")
    assert said(check.check_layers(house)[0], *words)


def test_downward_imports(house):
    (house/"theria/layers.py").write_text("import torch, json\nfrom theria import attention\nfrom .attention.double import double\n")
    (house/"theria/records.py").write_text("from . import __version__\nimport theria\n")
    (house/"theria/cli.py").write_text("from theria import layers, records\ndef f():\n    import sklearn\n")
    assert check.check_layers(house)[0] == []


def test_layers_of_theria(): assert check.check_layers(ROOT)[0] == []


# Assertions

@pytest.mark.parametrize("source, word", [
    ("def test_it(): print(1)", "without asserting"),
    ("def test_it():\n    def inner(): assert f()", "without asserting"),
    ("def test_it():\n    if cuda: assert f()", "without asserting"),
    ("def test_it(): f(raise_exception=False) or gradcheck(f, x, raise_exception=False)", "without asserting"),
    ("def helper(): pass\ndef test_it(): helper()", "without asserting"),
    ("class TestIt:\n    def test_it(self): self.x = 1", "without asserting"),
    ("def test_it():\n    assert f()\n    assert True", "always true"),
    ("def test_it():\n    assert f()\n    assert (f() == 2, 'two')", "always true"),
    ("def test_it():\n    assert f()\n    assert x.shape == x.shape", "always true"),
    ("def test_it():\n    assert f()\n    torch.testing.assert_close(x, x)", "always true"),
    ("def test_it():\n    try: assert f()\n    except AssertionError: pass", "swallows"),
    ("def test_it():\n    try: assert f()\n    except: x = 1", "swallows"),
    ("def test_it():\n    with suppress(Exception): assert f()", "suppresses"),
    ("@pytest.mark.skip\ndef test_it(): assert f()", "without a reason"),
    ("@pytest.mark.skipif(not cuda, reason='')\ndef test_it(): assert f()", "without a reason"),
    ("@pytest.mark.xfail(strict=True)\ndef test_it(): assert f()", "without a reason"),
    ("def test_it():\n    pytest.skip()\n    assert f()", "without a reason")])
def test_assertion_free_tests(tmp_path, source, word):
    (tmp_path/"test_it.py").write_text(source)
    assert said(list(assertions.test_problems(tmp_path/"test_it.py", "tests/test_it.py")), "tests/test_it.py line", word)


@pytest.mark.parametrize("source", [
    "def helper(): assert f()\ndef other(): helper()\ndef test_it(): other()", "def test_it():\n    with pytest.raises(ValueError, match='x'): f()",
    "def test_it():\n    for x in y:\n        if x: assert f()", "def test_it():\n    if a: assert f()\n    else: test_eq(f(), 1)", "def test_it(): gradcheck(f, x)",
    "class TestIt:\n    def same(self): assert f()\n    def test_it(self): self.same()", "def test_it():\n    try: f()\n    except ValueError as e: assert 'x' in str(e)\n    else: pytest.fail('x')",
    "@pytest.mark.skipif(not cuda, reason='needs a GPU')\ndef test_it(): assert f() == f()", "def test_it():\n    if not cuda: pytest.skip('needs a GPU')\n    assert f()",
    "def test_it():\n    def inner(): assert f()\n    call(inner)", "def test_it():\n    if f() != 1: raise AssertionError('x')"])
def test_asserting_tests(tmp_path, source):
    (tmp_path/"test_it.py").write_text(source)
    assert list(assertions.test_problems(tmp_path/"test_it.py", "tests/test_it.py")) == []


def notebook_faults(house, *cells):
    write(house, "nbs/attention/double.ipynb", DOUBLE + list(cells))
    return check.check_asserts(house)[0]


@pytest.mark.parametrize("cells, words", [
    ([code("double(5)")], ("cell 7", "neither asserts nor shows")),
    ([code("print(double(5))")], ("cell 7", "neither asserts nor shows")),
    ([code("#| export\ndef triple(x): return 3*x")], ("cell 7", "triple", "no assertion")),
    ([code("#| export\ndef triple(x): return 3*x"), code("triple(2)", text("6"))], ("triple", "no assertion")),
    ([code("#| export\nTHREE = 3"), code("assert double(5) == 10")], ("THREE", "no assertion")),
    ([code("#| export\ndef triple(x): return 3*x"), code("y = triple(1)"), code("y = double(1)"), code("assert y == 2")], ("triple", "no assertion")),
    ([code("#| eval: false\nassert double(5) == 11")], ("cell 7", "neither asserts nor shows")),
    ([code("try: double('x')\nexcept TypeError: pass", text("1"))], ("cell 7", "line 2", "swallows")),
    ([code("assert double(1) and True\nassert 1")], ("cell 7", "always true"))])
def test_cells_that_check_nothing(house, cells, words): assert said(notebook_faults(house, *cells), *words)


@pytest.mark.parametrize("cells", [
    [code("import math\nx = math.pi\ndef f(): return 1\nfor i in range(3): x += i")], [code("double(5)", text("10"))], [code("#| hide\nimport math")],
    [code("#| export\ndef triple(x): return 3*x"), code("y = triple(1)"), code("z = y + 1"), code("assert z == 4")],
    [code("#| export\ndef _triple(x): return 3*x\ndef six(x): return double(_triple(x))"), code("test_eq(six(1), 6)")],
    [code("#| export\nTABLE = {}\ndef entry(f):\n    TABLE[f.__name__] = f\n    return f"), code("#| export\n@entry\ndef triple(x): return 3*x"), code("assert TABLE['triple'](1) == 3")],
    [code("#| export\ndef triple(x): return 3*x"), code("def same(f, y): test_eq(f(1), y)"), code("same(triple, 3)")],
    [code("%matplotlib inline\nx = double(1)")], [code("%%bash\nls", text("x"))]])
def test_cells_that_check_something(house, cells): assert notebook_faults(house, *cells) == []


def test_assertions_reach_through_other_notebooks(house):
    write(house, "nbs/attention/part.ipynb", [TITLE, code("#| default_exp attention.part"), code("#| export\nONE = 1\ndef part(x): return x*ONE\ndef unused(x): return x")])
    problems = notebook_faults(house, code("#| export\nfrom theria.attention.part import part"), code("#| export\ndef whole(x): return part(x)"), code("assert whole(1) == 1"))
    assert said(problems, "nbs/attention/part.ipynb cell 3", "unused")


def test_skipped_notebook(house):
    write(house, "nbs/new.ipynb", [md("# T\n\n> C.\n\n- skip_exec: true")])
    assert said(check.check_asserts(house)[0], "nbs/new.ipynb", "skip_exec")


# README.md

def test_stale_readme(house):
    write(house, "nbs/index.ipynb", INDEX + [md("More.")])
    assert said(readme.differences(house), "README.md", "make readme")


def test_readme(house):
    write(house, "nbs/index.ipynb", [
        md("# theria\n\n> Attention.\n\n- skip_showdoc: true"), code("#| hide\nimport secret"), code("#| echo: false\nimport quiet", text("loud")),
        md("::: {.callout-note}\nSee [this](attention/double.ipynb#x), ![a plan](plan.png), <a href='../LICENSE'>it</a>, [web](https://x.y), [@ada1843, p. 3] and @ada1843.\n:::\n\n"
           "$$ a $$ {#eq-a}\n\n## Start {#sec-start}\n\n```bash\nmake demo # [x](y.ipynb) @gone\n```"),
        code("#| eval: true\ndouble(1)\nhidden() #| hide_line", text("2")),
        code("#| label: fig-x\n#| fig-cap: A figure\n#| echo: false\ndraw()", png())])
    readme.write(house)
    found = (house/"README.md").read_text()
    for part in ("# theria\n\n> Attention.\n", "[this](nbs/attention/double.ipynb#x)", "![a plan](nbs/plan.png)", "<a href='LICENSE'>", "[web](https://x.y)",
                 "([Lovelace, 1843](https://arxiv.org/abs/1843.00001), p. 3) and Lovelace ([1843](https://arxiv.org/abs/1843.00001))", "$$ a $$\n", "## Start\n",
                 "make demo # [x](y.ipynb) @gone", "```python\ndouble(1)\n```\n\n```text\n2\n```", "```text\nloud\n```", "![A figure](README_files/figure_"): assert part in found, part
    for part in ("skip_showdoc", "secret", "quiet", "hide_line", "hidden", "#|", ":::", "{#"): assert part not in found, part
    assert readme.differences(house) == []
    (house/"README_files"/"old.png").touch()
    assert said(readme.differences(house), "README_files/old.png")


@pytest.mark.parametrize("prose, words", [("See @eq-double.", ("@eq-double", "cannot number")), ("[@gone]", ("@gone", "refs.bib"))])
def test_readme_refuses(house, prose, words):
    write(house, "nbs/index.ipynb", INDEX + [md(prose)])
    with pytest.raises(SystemExit) as refusal: readme.render(house)
    assert all(word in str(refusal.value) for word in words)


def test_names_in_the_bibliography():
    entries = {"pair": {"author": r"Erd{\H o}s, P. and R{\'e}nyi, A.", "year": "1959", "doi": "d"},
               "three": {"author": r"{\L}ukasiewicz, Jan and B and C", "year": "1920", "url": "u"}}
    assert readme.cite("pair", entries) == ("Erdős and Rényi", "1959", "https://doi.org/d")
    assert readme.cite("three", entries) == ("Łukasiewicz et al.", "1920", "u")


# git and make

def git(root, *args): return subprocess.run(["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b.c", *args], check=True, capture_output=True, text=True).stdout


def test_git_cleans_and_merges_notebooks(house):
    (house/".venv").symlink_to(sys.prefix)
    shutil.copytree(ROOT/"scripts", house/"scripts")
    for name in (".gitattributes", ".gitconfig"): shutil.copy(ROOT/name, house)
    git(house, "init", "-q", "-b", "main")
    git(house, "config", "--local", "include.path", "../.gitconfig")
    path = "nbs/attention/double.ipynb"
    (house/path).write_text((house/path).read_text().replace('"execution_count": null', '"execution_count": 7'))
    git(house, "add", path, ".gitattributes")
    assert '"execution_count": null' in git(house, "show", f":{path}") and '"execution_count": 7' not in git(house, "show", f":{path}")
    git(house, "commit", "-qm", "one")
    for branch, cell in (("theirs", md("Theirs.")), ("main", md("Ours."))):
        git(house, "checkout", "-q", *(["-b"] if branch == "theirs" else []), branch)
        write(house, path, DOUBLE + [cell])
        git(house, "commit", "-qam", branch)
    merging = subprocess.run(["git", "-C", house, "-c", "user.name=a", "-c", "user.email=a@b.c", "merge", "theirs"], capture_output=True, text=True)
    sources = [cell.source for cell in pages.read_cells(house, path)]  # it is still a notebook, with the conflict in cells of its own
    assert merging.returncode == 1 and {"Ours.", "Theirs."} <= set(sources) and sources[:4] == [cell["source"] for cell in DOUBLE[:4]]


def test_git_leaves_what_is_not_a_notebook(): assert git_notebooks.clean("<<<<<<< HEAD\n{}") == "<<<<<<< HEAD\n{}"


def make(folder, *args): return subprocess.run(["make", "-C", folder, *args], capture_output=True, text=True)


def test_make_says_what_it_needs(tmp_path):
    shutil.copy(ROOT/"Makefile", tmp_path)
    for name in ("requirements.txt", "settings.ini", "setup.py"): (tmp_path/name).touch()
    (tmp_path/"python2").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path/"python2").chmod(0o755)
    refusal = make(tmp_path, "demo", f"PYTHON={tmp_path/'python2'}")
    assert refusal.returncode == 2 and "Python 3.11 or newer" in refusal.stderr and "python2 is not" in refusal.stderr and not (tmp_path/".venv").exists()


def test_make_lists_its_targets(tmp_path):
    shutil.copy(ROOT/"Makefile", tmp_path)
    listed = make(tmp_path).stdout
    assert all(f"make {target}" in listed for target in ("demo", "test", "docs", "lab", "readme", "clean"))


@pytest.mark.parametrize("says, refusal", [("all good", None), ("WARNING: Unable to resolve crossref @eq-gone", "dead references")])
def test_docs(house, tmp_path, monkeypatch, says, refusal):
    (tmp_path/"quarto").write_text(f"#!/bin/sh\nmkdir _docs && cp index.ipynb _docs/index.html && echo '{says}'\n")
    (tmp_path/"quarto").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(pages, "process", lambda tree: shutil.copytree(tree/"nbs", tree/"_proc") and None)
    if refusal:
        with pytest.raises(SystemExit, match=refusal): pages.build(house)
    else: pages.build(house)
    assert (house/"_docs"/"index.html").exists() == (refusal is None)


def test_docs_without_quarto(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs Quarto"): pages.build()


def test_unknown_check():
    refusal = subprocess.run([sys.executable, ROOT/"scripts"/"check.py", "spelling"], capture_output=True, text=True)
    assert refusal.returncode == 2 and "no check 'spelling'" in refusal.stderr


# How a processed page is arranged

def processed(house, *cells):
    "The double page, processed, with `cells` exported after its own."
    write(house, "nbs/attention/double.ipynb", [*DOUBLE, *cells])
    assert pages.nbdev("doclinks.nbdev_export()", house)[0] == 0
    assert pages.process(house) is None
    return pages.read_cells(house, "_proc/attention/double.ipynb")


def test_what_a_page_says_of_a_function_stands_before_its_source(house):
    shown = code('#| exports\ndef thrice(\n    x:int, # a number\n) -> int: # three times it\n    "Thrice of a number."\n    return 3*x')
    cells = processed(house, shown, code("test_eq(thrice(2), 6)"))
    order = [cell.number for cell in cells]
    said, source = (next(i for i, cell in enumerate(cells) if re.search(pattern, cell.code, re.MULTILINE)) for pattern in (r"^show_doc\(thrice\)", r"^def thrice"))
    assert said == source - 1 and cells[source].source.startswith("#| classes: exported\n") and "code-fold" not in cells[source].source
    text = next(cells[said].texts("text/markdown"))
    assert "Thrice of a number" in text and "def thrice" not in text and "#### thrice" in text.replace("##### ", "#### ").replace("### ", "#### ")[:400]
    assert order == sorted(order)
    alone = next(cell for cell in cells if re.search(r"^show_doc\(double\)", cell.code, re.MULTILINE))
    assert "double" in "".join(alone.texts("text/markdown")) and not any("def double" in cell.code for cell in cells)


def test_a_docstring_that_nobody_wrote_is_left_out(house):
    cells = processed(house, code("#| export\ndef bare(x): return x"), code("test_eq(bare(2), 2)"))
    bare = next(cell for cell in cells if re.search(r"^show_doc\(bare\)", cell.code, re.MULTILINE))
    assert next(bare.texts("text/markdown")) == "::: {#bare}\n:::\n"


def test_what_pytest_found_is_counted_over_processes(house):
    (house/"tests").mkdir()
    (house/"tests"/"test_one.py").write_text("def test_a(): assert 1 + 1 == 2\ndef test_b(): assert 1 + 1 == 2\n")
    (house/"tests"/"test_two.py").write_text("import pytest\n@pytest.mark.skip(reason='later')\ndef test_c(): assert 1 + 1 == 2\n")
    assert check.check_tests(house) == ([], "2 tests passed, 1 were skipped.")
    (house/"tests"/"test_two.py").write_text("def test_c(): assert 1 + 1 == 3\n")
    assert said(check.check_tests(house)[0], "pytest fails in test_two.py", "1 + 1 == 3")
