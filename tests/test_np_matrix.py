"The benchmark matrix: its plan, its rows right and wrong, resuming, and what is said about it."
import math

import pytest
import torch
from matplotlib.figure import Figure

from theria.attention.contract import ContractError
from theria.bench import read_rows
from theria.neural_process import matrix as m
from theria.neural_process.matrix import (COMPARED, FUSED, PLAIN, PRESETS, SHAPES, Matrix, Row, Shape, best_pytorch, check_losses, is_pytorch, leaders, losses_figure, on_cpu, plan_np, plan_of, predicted_memory, published_shapes,
                                          row_of, run_matrix, saved_per_row, shape_table, smoothed, speedup_figure, steps_of, work)
from theria.neural_process.model import Size
from theria.neural_process.training import Switches

TOY = Shape("toy", 2, 6, 5, Size(16, 2, 2, 21, 3))
SDPA, REFERENCE = (Row(TOY, Switches(attention=a, precision="fp32", **PLAIN)) for a in ("sdpa", "reference"))


def test_the_specified_shapes():
    assert {(s.M, s.N) for s in SHAPES.values()} == {(64, 500), (10_000, 1_000), (200_000, 5_000)}
    assert {s.B for s in SHAPES.values() if s.M == 64} == {1, 16, 128}
    for s in SHAPES.values(): assert s.size == Size() and s.tokens == s.B*(s.M + s.N)
    assert {(s.M, s.N, s.B) for s in published_shapes()} >= {(32, 256, 64), (1024, 256, 64), (256, 128, 64), (256, 512, 64), (256, 256, 256)}


def test_attention_grows_with_the_shape():
    share = {name: work(s)[1]/sum(work(s)) for name, s in SHAPES.items()}
    assert share["small"] == pytest.approx(share["small-1"]) and share["small"] < .03 < .4 < share["mid"] < .9 < share["large"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_plan_has_the_axes(preset):
    plan = plan_np(preset)
    assert len({str(r) for r in plan}) == len(plan) == len({tuple(map(str, r.key.items())) for r in plan})
    assert [row_of(r.key) for r in plan] == plan
    small = [r.switches for r in plan if r.shape.name == "small"]
    for name, values in (("graph", {False, True}), ("checkpoint", {False, True}), ("rows", {"all", "needed"})): assert {getattr(s, name) for s in small} == values
    assert {s.compile for s in small} == {"no", "blocks", "whole"} and {s.precision for s in small} == {"autocast", "bf16"}
    assert {"flash", "cudnn", "theria", "theria-two", "theria-once", "theria-fp8"} <= {s.attention for s in small}


def test_the_whole_product_is_in_the_paper_s_plan():
    rows = [r.switches for r in plan_of(SHAPES["mid"], True)]
    for attention in ("flash", "cudnn", "theria-two", "theria-once", "theria-fp8"):
        for parts in (PLAIN, FUSED):
            found = {(s.checkpoint, s.graph, s.compile) for s in rows if s.attention == attention and s.mlp == s.heads == s.gmm == s.adamw == parts["mlp"]}
            assert found >= {(c, g, k) for c in (False, True) for g in (False, True) for k in ("no", "blocks")}


def test_a_baseline_has_nothing_of_this_package():
    assert is_pytorch(Switches(attention="cudnn", **PLAIN, precision="bf16", compile="whole", graph=True))
    for s in (Switches(attention="theria", **PLAIN), Switches(attention="cudnn", mlp="fused", heads="reference", gmm="reference"), Switches(attention="cudnn"), Switches(attention="reference", **PLAIN)):
        assert not is_pytorch(s)


def test_memory_is_predicted_from_what_blocks_save():
    size = Size(64, 3, 2, 96, 4)
    few, many = (saved_per_row(size, rows=n) for n in (32, 128))
    assert many == pytest.approx(few, rel=.02)
    shape = Shape("", 1, 1000, 100, size)
    light, heavy = (predicted_memory(shape, Switches(precision="bf16", checkpoint=c)) for c in (True, False))
    assert light < heavy
    assert predicted_memory(shape._replace(M=2000), Switches(precision="bf16")) - heavy == pytest.approx(1000*size.n_layers*saved_per_row(size))


def test_a_run_is_resumed_and_failures_are_kept(tmp_path, monkeypatch):
    gpu_only = Row(TOY, Switches(attention="flash", precision="fp32", **PLAIN))
    plan = [SDPA, gpu_only, REFERENCE]
    first = run_matrix(plan[:2], tmp_path, "cpu", ms=5., show=False)
    assert [r["failure"] is None for r in first.rows(part="step")] == [True, False]
    monkeypatch.setattr(m, "set_up", lambda *a, set_up=m.set_up: pytest.fail("measured twice") if a[0] in plan[:2] else set_up(*a))
    second = run_matrix(plan, tmp_path, "cpu", ms=5., show=False)
    assert [r["attention"] for r in second.rows(part="step")] == ["sdpa", "flash", "reference"]
    assert [r["failure"] is None for r in second.rows(part="step")] == [True, False, True]
    assert second.rows(part="step")[0] == first.rows(part="step")[0]


def test_a_row_with_wrong_losses_fails(tmp_path, monkeypatch):
    def wrong(row, *a, set_up=m.set_up):
        ready = set_up(row, *a)
        return ready._replace(facts=ready.facts | dict(losses=[x + (row == REFERENCE) for x in ready.facts["losses"]]))
    monkeypatch.setattr(m, "set_up", wrong)
    good, bad = run_matrix([SDPA, REFERENCE], tmp_path, "cpu", ms=5., show=False).rows(part="step")
    assert good["failure"] is None and bad["failure"].startswith("ArithmeticError: wrong result, losses") and bad["p50"] is None


@pytest.mark.parametrize("losses", [[1., math.nan], [math.inf], [1., 2., 2.9]])
def test_losses_that_stray(losses):
    with pytest.raises(ArithmeticError, match="wrong result"): check_losses(losses, [1., 2., 3.])


def test_speedups_are_over_the_best_pytorch_row():
    value = dict(losses=[1.], memory=None, anchor_ms=None, failure=None)
    timed = lambda switches, ms: {**Row(TOY, switches).key, **value, "p20": ms, "p50": ms, "p80": ms, "seed": 0}
    fast = dict(precision="bf16", compile="blocks", graph=True)
    rows = [timed(Switches(attention="flash", **PLAIN, precision="autocast"), 9.), timed(Switches(attention="cudnn", **PLAIN, precision="autocast"), 8.),
            timed(Switches(attention="cudnn", **PLAIN, **fast), 4.), timed(Switches(attention="theria", **FUSED, **fast), 2.),
            {**timed(Switches(attention="theria-fp8", **FUSED, **fast), 1.), "p50": None, "failure": "not on this device"}]
    found = steps_of(rows, "toy")
    assert best_pytorch(found)["p50"] == 4. and best_pytorch(found, True)["p50"] == 8.
    table = shape_table(rows, "toy").rows
    assert [line["p50"] for line in table] == [2., 4., 8., 9., None]
    assert (table[0]["best"], table[0]["usual"], table[-1]["failure"]) == (2., 4., "not on this device")
    assert table[0]["tokens"] == TOY.tokens/2.*1e3
    assert [r["p50"] for r in leaders(rows)[0][1:]] == [8., 4., 2.]


def test_bars_are_over_what_every_shape_has():
    "Without a row of customary PyTorch for each shape, over the best one of PyTorch."
    timed = lambda switches, ms, name: {**Row(TOY._replace(name=name), switches).key, "p50": ms}
    fast = dict(precision="bf16", compile="blocks", graph=True)
    best = [timed(Switches(attention=a, **parts, **fast), ms, name) for name in ("one", "two") for a, parts, ms in (("cudnn", PLAIN, 4.), ("theria", FUSED, 2.5))]
    usual = [timed(Switches(attention="cudnn", **PLAIN, precision="autocast"), 8., name) for name in ("one", "two")]
    for rows, bars in ((best, ["1.00", "1.60"]), ([*best, usual[0]], ["1.00", "1.60"]), ([*best, *usual], ["1.00", "2.00", "3.20"])):
        figure = speedup_figure(rows)
        assert [figure.count(f">{bar}<") for bar in bars] == [2]*len(bars), bars
        assert ("PyTorch with autocast</text>" in figure) == (len(bars) == 3)


def test_no_run_is_missing_in_the_figure_of_losses():
    losses = {name: [2. + i, 1. + i, 1.5] for i, name in enumerate(COMPARED)}
    m._plot_losses(losses, ax := Figure().subplots())
    assert [list(line.get_ydata()) for line in ax.lines] == [smoothed(losses[name], 50) for name in sorted(COMPARED, key=lambda name: not name.startswith("plain"))]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain", *(name for name in COMPARED if not name.startswith("plain"))]
    for name in COMPARED: assert name in losses_figure(losses)


def test_a_file_is_shown(tmp_path, capsys):
    run_matrix([SDPA, REFERENCE], tmp_path, "cpu", ms=5., losses=3, show=True)
    printed = capsys.readouterr().out
    assert "over the best PyTorch row" in printed and "Result file:" in printed and "nan" not in printed.lower()
    rows = read_rows(tmp_path/"bench-np.json")
    assert {r["part"] for r in rows} == {"step", "stages", "losses"}
    blocks = m.show_results(tmp_path/"bench-np.json")
    assert sum(hasattr(b, "_repr_svg_") for b in blocks) == 3


def test_rows_are_set_up_ahead_in_processes(capsys):
    "As many rows as processes, of those that compile; here it cannot run, and that is told."
    rows = [Row(TOY, Switches(attention=a, precision="fp32", compile="blocks", graph=True, **PLAIN)) for a in ("cudnn", "flash")]
    assert m.set_up_ahead([SDPA, *rows], "cpu", 1) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("Setting up toy cudnn fp32 compiled graph ahead failed: ContractError: got graph=True on cpu") and "flash" not in printed


@pytest.mark.parametrize("only, words", [("fastest", "got --only='fastest'"), ("small tpu", "got --only='small tpu'")])
def test_nothing_to_measure_is_refused(only, words):
    with pytest.raises(ContractError, match=words): plan_np("medium", only)


def test_a_processor_tries_the_benchmark_out():
    for row in plan_np("large", device="cpu"): row.switches.settle(torch.device("cpu"))
    assert on_cpu(Switches(attention="cudnn", **PLAIN, graph=True)).attention == "sdpa"


@pytest.mark.gpu
def test_rows_of_the_matrix_on_a_gpu(tmp_path):
    "Two small shapes of a small model: every leading row is right, names its kernels and is timed beside its anchor."
    shape = Shape("gpu-toy", 4, 64, 100, Size(128, 2, 2, 200, 3))
    rows = run_matrix([Row(shape, r.switches) for r in plan_of(SHAPES["small"])[:12]], tmp_path, "cuda", ms=20., losses=20, show=False).rows(part="step")
    for r in rows:
        if r["attention"] == "theria-fp8": continue
        assert r["failure"] is None, (r["attention"], r["failure"])
        assert r["attention_kernels"] and r["memory"] > 0 and sum(r["kinds"].values()) > 0
    assert all(r["anchor_ms"] > 0 for r in rows[1:] if r["failure"] is None)
    assert Matrix.measure is not None and rows[0]["anchor"] is None
