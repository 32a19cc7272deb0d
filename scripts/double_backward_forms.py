"""Measure the forms of the double backward against each other on a GPU: `python scripts/double_backward_forms.py --out nbs/results/double-backward-forms.json`.

Three kernels or two passes, with the kernels of `theria.attention.jvp` and `theria.attention.tangent_backward` alone, and with those for Hopper where there are any. Every output is
checked against float64 first. Times are of the device: the calls are recorded in a CUDA graph, so that Python and launch costs on the host do not count. The page "Fused second order"
(nbs/attention/tangent_backward.ipynb) shows the table.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from theria.attention import ops, tuning  # registers the kernels for Hopper
from theria.attention.backward import backward
from theria.attention.contract import rel_err
from theria.attention.forward import forward
from theria.attention.jvp import jvp
from theria.attention.tangent_backward import double_backward, tangent_backward
from theria.bench import Case, Stopwatch, attempt, captured, environment, inputs, interleave, last_heads, oracle, quantiles, tflops
from theria.records import Record

assert ops.IMPLEMENTATIONS
SHAPES = ((8, 8, 128, 128, 64), (4, 8, 512, 512, 64), (4, 8, 2048, 2048, 64), (1, 8, 16384, 16384, 64), (4, 8, 512, 512, 128), (4, 8, 2048, 2048, 128), (1, 8, 16384, 16384, 128))
FORMS = {f"{passes}{machine}": (n, units, machine != "") for passes, n, units in (("three kernels", 3, 20), ("two passes", 2, 18)) for machine in ("", ", Hopper")}
WIDE = tuning.Config(128, 32, 8, 2)  # of the two passes where the table has none


def build(case, x, passes, hopper): # the stage of `captured`: returns the closure that is recorded
    kw = dict(scale=case.D**-.5, is_causal=case.causal)
    y, t = (x["q"], x["k"], x["v"], None, None), (x["tq"], x["tk"], x["tv"], None)
    o, L = forward(*y, **kw)
    dq = backward(*y, o, L, x["do"], **kw).q
    config = lambda op: tuning.lookup(op, x["q"], case.Dv, case.Lk, case.causal)
    kv = {} if hopper else dict(config_kv=config("tangent_kv"))  # a kernel for a special machine is asked only where no tile sizes are given
    def three():
        to, r = jvp(*y, o, L, *t, config=None if hopper else config("jvp"), **kw)
        g = tangent_backward(*y, o, L, x["do"], None, *t, None, None, to, r, config_q=None if hopper else config("tangent_q"), **kv, **kw)
        return g.q, g.k, g.v, to
    def two():
        g, to, _ = double_backward(*y, o, L, x["do"], None, dq, *t, config_q=config("double_q") or WIDE, **kv, **kw)
        return g.q, g.k, g.v, to
    return two if passes == 2 else three


def measure(case, device, ms):
    "A row for each form: times in ms, the rate for the products that it executes, and the largest relative error."
    x = inputs(case, device, True)
    exact, runs, rows = oracle(case, x), {}, {}
    for name, (passes, _, hopper) in FORMS.items():
        made, why = attempt(lambda: captured(partial(build, case, x, passes, hopper)), device)
        rows[name] = dict(p20=None, p50=None, p80=None, tflops=None, error=None, failure=why)
        if why: continue
        runs[name], out = made
        runs[name]()
        rows[name]["error"] = max(rel_err(last_heads(case, y, n), exact[n]) for n, y in zip(("gq", "gk", "gv", "to"), out))
    for name, times in interleave(runs, ms, Stopwatch(device)).items():
        q = quantiles(times)
        rows[name] |= dict(q, tflops=tflops(case, FORMS[name][1], q["p50"]))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/double-backward-forms.json", help="the result file")
    p.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    p.add_argument("--ms", type=float, default=20., help="time for each form and shape")
    a = p.parse_args()
    if not torch.cuda.is_available(): sys.exit("got a machine without a CUDA device; accepted is a GPU of compute capability 8.0 or newer: run it there.")
    record = Record(a.out, environment("double-backward-forms", torch.device("cuda"), a.ms, 0), device="cuda")
    for sizes in SHAPES:
        for causal in (False, True):
            case = Case(*sizes, a.dtype, causal)
            for name, row in measure(case, "cuda", a.ms).items():
                record.add(dict(case=str(case), form=name), row)
                print(f"{case!s:28} {name:22}" + (row["failure"] or f"{row['p50']:9.4f} ms {row['tflops']:7.0f} TFLOP/s, error {row['error']:.1e}"), flush=True)


if __name__ == "__main__": main()
