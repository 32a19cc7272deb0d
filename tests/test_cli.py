"The `theria` command: what it does, what it refuses, and what an accident costs."
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import theria
from theria import cli, decoder
from theria.attention.contract import BACKENDS
from theria.meta.gradients import ESTIMATORS
from theria.records import Record, from_json

TINY = dict(tasks=2, depths=[1, 2], seeds=1, outer_steps=2, meta_batch=2, test_tasks=4)
ROOT = Path(theria.__file__).parents[1]
COMMANDS = ["contract", "audit", "train-decoder", "maml", "train-np", "reproduce", "bench"]
BENCH = ["sdpa", "second-order", "np", "np-kernels", "scaling", "uses", "merge", "tune", "show"]


@pytest.fixture
def call(capsys):
    "Call the command in this process: exit code, stdout, stderr."
    def call(*argv):
        with pytest.raises(SystemExit) as e: cli.main([str(a) for a in argv])
        return e.value.code, *capsys.readouterr()
    return call


@pytest.mark.parametrize("module", ["theria", "theria.cli"])
def test_as_a_module_of_python(module):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    r = subprocess.run([sys.executable, "-m", module, "contrakt"], capture_output=True, text=True, env=env)
    assert (r.returncode, r.stdout) == (2, "") and r.stderr.startswith("theria: got the command 'contrakt'") and r.stderr.count("\n") == 1


def process(*argv, root=ROOT, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-c", "from theria.cli import main; main()", *map(str, argv)], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def contract(folder, **sizes):
    return ["contract", "--out", folder, "--device", "cpu", "--backend", "reference", "--sizes", json.dumps({**TINY, **sizes})]


# Help and completion

@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], *([c, "--help"] for c in COMMANDS), *(["bench", c, "--help"] for c in BENCH)], ids=" ".join)
def test_help_reads_well(argv):
    result = CliRunner().invoke(cli.app, argv)
    assert result.exit_code == 0 and "Usage: theria" in result.stdout
    asked = [a for a in argv if a[0] != "-"]
    assert all(c in result.stdout for c in (asked or COMMANDS)) and (asked != ["bench"] or all(c in result.stdout for c in BENCH))
    assert "--sizes" not in result.stdout and "Traceback" not in result.stdout


def commands(group, path=()):
    for name, c in group.commands.items():
        yield from commands(c, (*path, name)) if hasattr(c, "commands") else [((*path, name), c)]


@pytest.mark.parametrize("path, command", list(commands(typer.main.get_command(cli.app))), ids=str)
def test_every_option_is_explained(path, command):
    assert command.help and command.help.split("\n")[0].endswith((".", "?", "scaling"))
    for p in command.params:
        hidden = getattr(p, "hidden", False)
        assert hidden or p.help and p.help[0].isupper() and p.help.endswith("."), f"{' '.join(path)} {p.name}: {p.help!r}"
        assert hidden or getattr(p, "is_flag", False) or p.metavar, f"{' '.join(path)} {p.name} has no metavar"


def test_version(call): assert call("--version")[:2] == (0, f"theria {theria.__version__}\n")


def test_the_command_itself_imports_neither_pytorch_nor_matplotlib():
    code = "import sys, theria; a = set(sys.modules); import theria.cli; sys.stdout.write(' '.join(set(sys.modules) - a))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    new = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout.split()
    assert "theria.cli" in new and not {m.split(".")[0] for m in new} & {"torch", "matplotlib", "triton", "jinja2", "tqdm"}


@pytest.mark.parametrize("words, expected", [("theria con", ["contract"]), ("theria contract --preset ", ["quick", "full"]),
                                             ("theria maml --estimator FO", ["FO", "FO_STRICT"]), ("theria audit --dt", ["--dtype"]), ("theria reproduce tbl-index-w", ["tbl-index-where"])])
def test_completion(words, expected):
    env = dict(_THERIA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    out = CliRunner().invoke(cli.app, [], prog_name="theria", env=env).stdout
    assert out.split() == expected


def test_names_in_the_help_are_those_of_the_package():
    assert cli.BACKENDS == tuple(BACKENDS)
    for module in ("estimators", "implicit"): importlib.import_module(f"theria.meta.{module}")  # they enter theirs into the table
    assert {e.lower() for e in cli.ESTIMATORS} == set(ESTIMATORS)
    from theria.neural_process import model, tasks
    assert set(cli.NP_ATTENTIONS) <= {"auto", *model.ATTENTIONS} and set(cli.NP_TASKS) == {"gp", *tasks.TASKS}
    assert all(isinstance(getattr(torch, d), torch.dtype) for d in cli.DTYPES)
    flags = lambda f: {n: p.default for n, p in inspect.signature(f).parameters.items()}
    assert flags(cli.train_decoder) == flags(decoder.command)


# Bad values

CUDA = [["contract", "--backend", "triton_fused"], ["contract", "--device", "cuda"], ["maml", "--device", "cuda"], ["train-decoder", "--device", "cuda"], ["audit", "reference", "--device", "cuda"],
        ["train-np", "--device", "cuda"], ["bench", "sdpa"], ["bench", "np"], ["bench", "np-kernels"], ["bench", "scaling"], ["bench", "uses"], ["bench", "tune"]]
BAD = [["contrakt"], ["--seed", "3"], ["contract", "extra"], ["contract", "--sed", "3"], ["contract", "--seed"],
       ["contract", "--seed", "-1"], ["contract", "--seed", "1.5"], ["contract", "--seed", "x"], ["contract", "--seed", str(2**70)], ["contract", "--seed", str(2**63 - 1)],
       ["contract", "--preset", "slow"], ["contract", "--preset", ""], ["contract", "--device", "tpu"], ["contract", "--device", "cuda:x"],
       ["contract", "--backend", "flash9"], ["contract", "--sizes", "[]"], ["contract", "--sizes", '{"no": 1}'],
       ["contract", "--sizes", '{"tasks": 0}'], ["contract", "--sizes", '{"depths": []}'], ["contract", "--sizes", '{"data": ["mnist"]}'], ["audit", "mine.py"],
       ["audit"], ["audit", "nothing"], ["audit", "a", "b"], ["audit", "no.py:f"], ["audit", "torch:nothing"], ["audit", "torch:Tensor"],
       ["audit", "no_such_module:f"], ["audit", "reference", "--dtype", "int8"], ["audit", "reference", "--layout", "lbhd"],
       ["audit", "reference", "--heads", "3", "--kv-heads", "2"], ["audit", "reference", "--lq", "0"], ["audit", "reference", "--json", "no/such/folder.json"],
       ["audit", "sdpa-cudnn"], ["audit", "torch:relu"],
       ["train-decoder", "--steps", "0"], ["train-decoder", "--seed", "-1"], ["train-decoder", "--n_heads", "5"], ["train-decoder", "--backend", "x"],
       ["maml", "--data", "mnist"], ["maml", "--estimator", "SECOND"], ["maml", "--ways", "0"], ["maml", "--inner-lr", "0"], ["maml", "--inner-lr", "nan"],
       ["maml", "--option", "keep"], ["maml", "--momentum", "1"], ["maml", "--prox", "-1"],
       ["contract", "--out", ""], ["maml", "--out", " "], ["train-np", "--out", ""], ["bench", "sdpa", "--out", ""], ["contract", "--only", "nothing"], ["contract", "--seconds", "0"],
       ["train-np", "--task", "weather"], ["train-np", "--contexts", "4,0"], ["train-np", "--attention", "flash9"], ["train-np", "--steps", "-1"],
       ["bench", "np", "--only", "fastest", "--device", "cpu"], ["bench", "scaling", "--queries", "0"], ["bench", "show", "nothing.json"], ["bench", "fastest"],
       ["reproduce"], ["reproduce", "fig-nothing"], ["maml", "--shots", "999"], ["maml", "--ways", "99999"]]


@pytest.mark.parametrize("argv", BAD + ([] if torch.cuda.is_available() else CUDA), ids=" ".join)
def test_a_bad_value_is_one_sentence(call, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("theria.attention.contract.INTERPRETING", False)  # the tests have the interpreter, users without a GPU have not
    code, out, err = call(*argv)
    name = " ".join(["theria", *[a for a in argv[:1] if a in COMMANDS]])
    assert (code, out) == (2, "")
    assert re.fullmatch(re.escape(name) + r": got .+; .+: .+\.\n", err)   # one line: what was got; what is accepted: what to do
    assert not list(tmp_path.glob("**/*.json"))


def test_bad_values_offer_the_nearest_good_one(call):
    assert "did you mean contract." in call("contrakt")[2]
    assert "did you mean --seed." in call("contract", "--sed", "3")[2]
    assert "did you mean quick." in call("contract", "--preset", "quik")[2]
    assert "did you mean stats_detach." in call("audit", "stat_detach")[2]


def test_out_must_be_a_folder_that_can_be_written(call, tmp_path):
    (tmp_path/"file").write_text("mine")
    for bad in (tmp_path/"file", tmp_path/"file"/"below"):
        code, out, err = call("contract", "--out", bad)
        assert (code, out) == (2, "") and err.startswith("theria contract: got --out=") and err.count("\n") == 1
    assert (tmp_path/"file").read_text() == "mine"
    if os.getuid():   # root may write anywhere
        tmp_path.chmod(0o500)
        assert call("contract", "--out", tmp_path/"new")[0] == 2
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("argv", [["train-decoder"], ["audit", "reference"], ["contract"]], ids=" ".join)
def test_an_early_interruption_says_so(call, tmp_path, monkeypatch, argv):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path)
    import theria.meta.safety  # before the audit that it takes over by name is replaced
    for name in ("theria.decoder.train_decoder", "theria.attention.audit.audit", "theria.meta.safety.run_contract"): monkeypatch.setattr(name, interrupt)
    assert call(*argv) == (130, "", f"theria {argv[0]}: interrupted before anything was finished.\n")


def test_sizes_beyond_memory_are_one_sentence(call):
    code, out, err = call("audit", "reference", "--lq", str(2**31 - 1), "--head-dim", str(10**6))
    assert (code, out) == (1, "") and re.fullmatch(r"theria audit: ran out of memory \(.+\); .+: choose smaller sizes\.\n", err)


def test_a_page_that_cannot_be_replaced_is_named(call, tmp_path):
    (tmp_path/"contract.html").mkdir()
    code, out, err = call(*contract(tmp_path))
    assert code == 1 and re.search(r"stopped because of \S*/contract\.html \(Is a directory\); rows that were finished are kept: .+\.\n$", err)
    assert len(Record(tmp_path/"contract.json").rows(every_run=True)) > 10


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(decoder, "train_decoder", lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): cli.main(["train-decoder", "--device", "cpu"])


def test_a_full_disk_is_a_sentence_and_not_a_refusal(call, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, out, err = call(*contract(tmp_path))
    assert code == 1 and err.splitlines()[-1].startswith("theria contract: stopped because of") and "No space left on device" in err


# The contract

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.refs, self.loads, self.unlabeled = [], set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k == "id": self.ids.append(v)
            if k in ("href", "xlink:href", "src", "srcset"): (self.refs.add(v[1:]) if v.startswith("#") else self.loads.append(v))
        self.unlabeled += tag == "svg" and not dict(attrs).get("aria-label")


def test_contract_writes_a_report_that_needs_nothing_else_and_a_result_file(call, tmp_path):
    code, out, err = call(*contract(tmp_path))
    assert code == 0 and "Result file:" in out and "unsafe" in out
    rows = from_json((tmp_path/"contract.json").read_text())["rows"]
    parts = [r["key"]["part"] for r in rows]
    assert [parts.count(p) for p in ("audit", "path", "orders", "damage", "training")] == [9, 9, 4, 16, 3]
    verdicts = {r["key"]["attention"]: r["value"]["audit"]["verdict"] for r in rows if r["key"]["part"] == "audit"}
    assert verdicts.pop("reference") == "safe" and verdicts.pop("sdpa-flash") == "conditional" and verdicts.pop("sdpa-math") == "conditional"
    assert set(verdicts.values()) == {"unsafe"} and len(verdicts) == 6
    text = (tmp_path/"contract.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and page.refs <= set(page.ids) and not page.loads and not page.unlabeled
    assert text.count("<svg") == 7 and "@import" not in text and "url(http" not in text
    assert str(tmp_path) not in text and str(Path.home()) not in text

    before = (tmp_path/"contract.json").stat().st_mtime_ns
    assert call(*contract(tmp_path))[0] == 0                                       # again: nothing is computed
    assert (tmp_path/"contract.json").stat().st_mtime_ns == before
    (tmp_path/"contract.json").write_text((tmp_path/"contract.json").read_text()[:5000])
    code, out, err = call(*contract(tmp_path, seeds=1))                            # damaged: named, kept, computed again
    assert code == 0 and "contract.json is damaged" in err and "kept aside as contract.damaged-1.json" in err
    assert len((tmp_path/"contract.damaged-1.json").read_text()) == 5000
    assert len(from_json((tmp_path/"contract.json").read_text())["rows"]) == len(rows)


def test_other_parameters_share_the_file_but_not_the_rows(tmp_path):
    from theria.meta.safety import run_contract
    sizes = dict(TINY, depths=(1,), out=tmp_path, device="cpu", backend="reference", progress=False)
    a, b = (run_contract(seed=s, **sizes) for s in (0, 1))
    assert len(a.record) == len(b.record) and len(b.record.rows(every_run=True)) == 2*len(b.record)
    error = lambda c: c.record[dict(part="damage", attention="stats_detach", K=1)]["error"]
    assert error(a) != error(b)


def test_interrupted_twice_loses_nothing_and_resumes(tmp_path):
    argv, kept = contract(tmp_path, tasks=3), 0
    root = shutil.copytree(ROOT/"theria", tmp_path/"code"/"theria").parent   # rows stand only as long as the source does: nobody edits this copy
    for _ in range(2):
        p, path = process(*argv, root=root, cwd=root), tmp_path/"contract.json"
        deadline = time.time() + 60
        while time.time() < deadline and (len(Record(path).rows(every_run=True)) if path.exists() else 0) < kept + 3: time.sleep(.02)
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=60)[1]
        last = err.replace("\r", "\n").splitlines()[-1]
        m = re.fullmatch(r"theria contract: interrupted with (\d+) of (\d+) pieces finished; they are kept in .*contract\.json: "
                         r"run the same command again to continue\.", last.strip())
        assert p.returncode == 130 and m and "Traceback" not in err
        rows = from_json(path.read_text())["rows"]
        assert int(m[1]) == len(rows) >= kept + 3
        kept = len(rows)
    p = process(*argv, root=root, cwd=root)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and int(m[2]) == len(from_json(path.read_text())["rows"])
    assert from_json(path.read_text())["rows"][:kept] == rows                      # the finished ones were not computed again
    assert "process 2" in (tmp_path/"contract.html").read_text()                   # and the report names every process


def test_data_that_are_missing_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    from theria.meta.safety import run_contract
    (tmp_path/"data"/"omniglot").mkdir(parents=True)
    (tmp_path/"data"/"omniglot"/"images_background.zip").write_text("broken")
    monkeypatch.setenv("THERIA_DATA", str(tmp_path/"data"))
    c = run_contract(out=tmp_path, device="cpu", backend="reference", progress=False, **{**TINY, "depths": (1,), "data": ("glyphs", "omniglot")})
    assert "Left out omniglot: got a damaged Omniglot archive" in capsys.readouterr().err
    assert {r["data"] for r in c.record.rows(part="training")} == {"glyphs"} and "Omniglot and glyphs" not in c.report.read_text()


# The audit

@pytest.mark.parametrize("target, code", [("auto", 0), ("sdpa-math", 0), ("sdpa-flash", 0), ("torch.nn.functional:scaled_dot_product_attention", 0),
                                          ("stats_detach", 1), ("theria.meta.variants:raw_kernel", 1)])
def test_audit_says_with_its_exit_code_whether_something_is_silently_wrong(call, target, code):
    got, out, err = call("audit", target)
    assert (got, err) == (code, "") and ("wrong, silently" in out) == bool(code)


def test_audit_names_the_cause(call):
    code, out, err = call("audit", "raw_kernel")
    assert code == 1 and "its second derivative is lost" in out


def test_audit_of_everything_that_has_a_name(call, tmp_path, monkeypatch):
    import theria.where
    monkeypatch.setattr(theria.where, "survey", partial(theria.where.survey, names=("reference", "sdpa-math", "sdpa-cudnn")))
    code, out, err = call("audit", "all", "--json", tmp_path/"where.json")
    assert (code, err) == (0, "") and all(words in out for words in ("reference", "exact", "raises", "not here"))
    assert len(Record(tmp_path/"where.json").rows(every_run=True)) == 3
    assert call("audit", "all", "--json", tmp_path/"where.json")[1] == out  # read, and not computed again


THEIRS = '''
import torch, helper
def blhd(q, k, v, causal=False): return helper.attend(q, k, v, causal).clone(), None
def detached(q, k, v): return torch.nn.functional.scaled_dot_product_attention(q, k, v).detach()
'''
HELPER = '''
import torch
def attend(q, k, v, causal):
    o = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)
    return o.transpose(1, 2)
'''


def test_audit_of_a_file_of_ones_own(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"theirs.py").write_text(THEIRS), (tmp_path/"helper.py").write_text(HELPER)
    code, out, err = call("audit", "theirs.py:blhd", "--layout", "blhd", "--causal", "--heads", "3", "--json", "found.json")
    assert (code, err) == (0, "")
    found = from_json((tmp_path/"found.json").read_text())
    assert found["verdict"] == "conditional" and found["is_causal"] and found["problem"]["Hq"] == 3 and found["provenance"]["torch"]
    assert str(tmp_path) not in (tmp_path/"found.json").read_text()
    code, out, err = call("audit", tmp_path/"theirs.py:detached", "--json", "-")
    assert code == 1 and from_json(out)["verdict"] == "unsafe"
    (tmp_path/"theirs.py").write_text("raise SystemExit('no')")
    code, out, err = call("audit", "theirs.py:blhd")
    assert code == 2 and "SystemExit: no" in err and err.count("\n") == 1


def test_audit_says_that_the_causal_triangle_was_not_asked_for(call, tmp_path):
    (tmp_path/"theirs.py").write_text(THEIRS), (tmp_path/"helper.py").write_text(HELPER)
    hint = "It has a causal switch, which was off: --causal audits it too.\n"
    blhd = ["audit", tmp_path/"theirs.py:blhd", "--layout", "blhd"]
    assert [hint in call(*argv)[1] for argv in (blhd, [*blhd, "--causal"], ["audit", tmp_path/"theirs.py:detached"])] == [True, False, False]
    assert from_json(call(*blhd, "--json", "-")[1])["verdict"] == "conditional"


def test_an_attention_that_exits_is_refused(call, tmp_path):
    (tmp_path/"leaves.py").write_text("def attend(q, k, v): raise SystemExit(3)\n")
    code, out, err = call("audit", tmp_path/"leaves.py:attend")
    assert (code, out) == (2, "") and "cannot be called on this problem (SystemExit: 3)" in err


# Training

def test_train_decoder(call):
    code, out, err = call("train-decoder", "--steps", "2", "--device", "cpu", "--d-model", "16", "--n_heads", "2", "--backend", "reference")
    assert (code, err) == (0, "") and "Loss decrease" in out and "backend reference on cpu" in out


def test_maml_runs_and_is_kept(call, tmp_path):
    argv = ["maml", "--estimator", "FO_STRICT", "--steps", "2", "--tasks", "2", "--device", "cpu", "--backend", "reference", "--out", tmp_path]
    code, out, err = call(*argv)
    assert code == 0 and "after 2 steps with fo_strict; guessing gives 20" in out
    before = (tmp_path/"maml.json").stat().st_mtime_ns
    assert call(*argv)[:2] == (0, out) and (tmp_path/"maml.json").stat().st_mtime_ns == before


def test_maml_takes_the_options_of_an_estimator(call, tmp_path):
    argv = ["maml", "--estimator", "TRUNCATED", "--option", "keep=1", "--data", "sinusoid", "--steps", "2", "--tasks", "2", "--test-tasks", "4", "--device", "cpu", "--backend", "reference"]
    assert call(*argv, "--out", tmp_path)[0] == 0
    runs = [s["run"] for s in from_json((tmp_path/"maml.json").read_text())["sessions"].values()]
    assert runs[0]["options"] == [["keep", 1]] and runs[0]["ways"] == 1 and runs[0]["estimator"] == "truncated"


def test_train_np(call, tmp_path):
    argv = ["train-np", "--device", "cpu", "--steps", "3", "--batch", "2", "--contexts", "4,8", "--targets", "4", "--out", tmp_path]
    assert call(*argv)[0] == 0 and (tmp_path/"train-np.json").is_file()


# Measurements and origins

def test_plans_are_printed_on_any_machine(call, tmp_path):
    for argv in (["sdpa", "--preset", "small"], ["second-order", "--preset", "small"], ["np", "--only", "small sdpa"]):
        code, out, err = call("bench", *argv, "--plan", "--device", "cpu", "--out", tmp_path)
        assert (code, err) == (0, "") and len(out.splitlines()) >= 1
    assert not list(tmp_path.iterdir())


def test_scaling_and_show(call, tmp_path):
    tiny = ["bench", "scaling", "--device", "cpu", "--queries", "32", "--keys", "16", "--dim", "16", "--dtype", "float32", "--repeats", "1", "--out", tmp_path]
    code, out, err = call(*tiny)
    assert (code, err) == (0, "") and "32 queries on 16 keys" in out
    assert call("bench", "show", tmp_path/"bench-scaling.json") == (0, out, "")


def test_merge(call, tmp_path):
    for i, name in enumerate("ab"): Record(tmp_path/f"{name}.json", dict(benchmark="sdpa", device="cpu")).add(dict(part="ceilings", i=i), dict(x=i))
    code, out, err = call("bench", "merge", tmp_path/"all.json", tmp_path/"a.json", tmp_path/"b.json")
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path}/all.json holds ") and (tmp_path/"all.json").is_file()
    assert "got FILE=" in call("bench", "merge", tmp_path/"all.json", tmp_path/"c.json")[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout with a figure from a file, whose command is quick, and a page that computes its own."
    (tmp_path/"nbs"/"results").mkdir(parents=True)
    with monkeypatch.context() as m:
        m.setattr(sys, "argv", ["theria", "train-decoder", "--steps", "1", "--device", "cpu"])
        m.setenv("TRITON_INTERPRET", "0")
        Record(tmp_path/"nbs"/"results"/"toy.json").add(dict(i=1), dict(x=2))
    cells = ["rows = Record('../results/toy.json').rows()", "#| label: fig-toy\n#| fig-cap: A toy.\nplot(rows)", "#| label: tbl-own\n#| tbl-cap: Own.\nprint(1)"]
    notebook = dict(cells=[dict(cell_type="code", source=c) for c in cells])
    (tmp_path/"nbs"/"toy.ipynb").write_text(json.dumps(notebook))
    monkeypatch.chdir(tmp_path)


def test_reproduce(call, checkout, monkeypatch):
    assert [line.split()[0] for line in call("reproduce")[1].splitlines()] == ["fig-toy", "tbl-own"]
    code, out, err = call("reproduce", "fig-toy")
    assert (code, err) == (0, "") and "A toy." in out and "theria train-decoder --steps 1 --device cpu\n" in out and "run on" in out
    assert "jupyter nbconvert --execute --to html --output-dir out nbs/toy.ipynb" in call("reproduce", "tbl-own")[1]
    assert call("reproduce", "fig-toi")[2].endswith("did you mean fig-toy.\n")
    ran = []
    monkeypatch.setattr("subprocess.run", lambda c: ran.append(c) or subprocess.CompletedProcess(c, len(ran) - 1))
    assert [call("reproduce", "fig-toy", "--run")[0] for _ in range(2)] == [0, 1]
    assert ran[0] == (sys.executable, "-m", "theria", "train-decoder", "--steps", "1", "--device", "cpu")


def test_every_label_of_the_site_has_an_origin(monkeypatch):
    from theria.reproduce import all_shown, origin
    for shown in all_shown(ROOT): assert origin(shown, ROOT).commands, shown
