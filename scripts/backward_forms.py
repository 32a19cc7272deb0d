"""Measure the arrangements of the backward against each other on a GPU: `python scripts/backward_forms.py --out nbs/results/backward-forms.json`.

Every arrangement of `theria.attention.backward` runs as it is called from `backward`, with the pinned tile sizes, on shapes that each favour another one. Gradients are
checked against float64 first. Times are of the device: the calls are recorded in a CUDA graph, so that Python and launch costs on the host do not count. The page
"Fused backward" (nbs/attention/backward.ipynb) shows the table.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from theria.attention.backward import backward
from theria.attention.contract import rel_err
from theria.attention.forward import forward
from theria.bench import NEEDED, Case, Stopwatch, attempt, captured, environment, inputs, interleave, last_heads, oracle, quantiles, tflops
from theria.records import Record

SHAPES = ((8, 8, 128, 128, 64), (4, 8, 512, 512, 64), (4, 8, 512, 512, 128), (16, 8, 564, 64, 64), (16, 8, 64, 564, 64), (1, 8, 1024, 1024, 64), (1, 2, 8192, 8192, 64),
          (1, 8, 205_000, 64, 64), (1, 8, 64, 205_000, 64), (4, 16, 4096, 4096, 64), (4, 16, 4096, 4096, 128))
FORMS = {"two launches": dict(form="two", parts=(1, 1)), "one launch": dict(form="once"), "in parts": dict(form="two"), "atomic": dict(form="atomic")}


def build(case, x, options): # the stage of `captured`: returns the closure that is recorded
    kw = dict(scale=case.D**-.5, is_causal=case.causal)
    o, L = forward(x["q"], x["k"], x["v"], **kw)
    def run():
        d = backward(x["q"], x["k"], x["v"], None, None, o, L, x["do"], **kw, **options)
        return d.q, d.k, d.v
    return run


def measure(case, names, device, ms):
    "A row for each arrangement: times in ms, the rate for the five products that are needed, and the largest relative error."
    x = inputs(case, device)
    exact, runs, rows = oracle(case, x), {}, {}
    for name in names:
        made, why = attempt(lambda: captured(partial(build, case, x, FORMS[name])), device)
        rows[name] = dict(p20=None, p50=None, p80=None, tflops=None, error=None, failure=why)
        if why: continue
        runs[name], out = made
        runs[name]()
        rows[name]["error"] = max(rel_err(last_heads(case, y, n), exact[n]) for n, y in zip(("dq", "dk", "dv"), out))
    for name, times in interleave(runs, ms, Stopwatch(device)).items():
        q = quantiles(times)
        rows[name] |= dict(q, tflops=tflops(case, NEEDED["backward"], q["p50"]))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/backward-forms.json", help="the result file")
    p.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    p.add_argument("--ms", type=float, default=20., help="time for each arrangement and shape")
    a = p.parse_args()
    if not torch.cuda.is_available(): sys.exit("got a machine without a CUDA device; accepted is a GPU of compute capability 8.0 or newer: run it there.")
    record = Record(a.out, environment("backward-forms", torch.device("cuda"), a.ms, 0), device="cuda")
    for sizes in SHAPES:
        for causal in (False, True):
            case = Case(*sizes, a.dtype, causal)
            if causal and case.Lq != case.Lk: continue
            for name, row in measure(case, list(FORMS), "cuda", a.ms).items():
                record.add(dict(case=str(case), form=name), row)
                print(f"{case!s:28} {name:14}" + (row["failure"] or f"{row['p50']:9.4f} ms {row['tflops']:7.0f} TFLOP/s, error {row['error']:.1e}"), flush=True)


if __name__ == "__main__": main()
