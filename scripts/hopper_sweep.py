"""Every schedule of the Hopper kernels beside the Triton kernel of the same pass: `python scripts/hopper_sweep.py --out nbs/results/hopper-sweep-h200.json` (two minutes).

Each configuration is checked against float64 on a ragged problem before it is timed on B4 H16 N4096 in bfloat16; its registers are looked up, and what spills or waits says so in its row.
The winners are pinned by hand in theria/attention/configs.json, under "<pass> hopper".
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STREAMS = {"forward": [(128, 2, 2), (128, 2, 2, True), (128, 3, 2), (128, 3, 2, True), (128, 2, 3), (128, 2, 3, True), (64, 2, 4, True), (64, 3, 3)], "backward_q": [(64, 2, 2), (64, 2, 3), (128, 2, 2)], "backward_kv": [(64, 2, 2), (64, 2, 3), (64, 3, 4), (128, 2, 2)],
           "jvp": [(64, 2, 2), (64, 2, 3), (64, 3, 3), (128, 2, 2)], "tangent_q": [(64, 2, 2), (64, 2, 3)], "tangent_kv": [(64, 2, 2), (64, 2, 3), (32, 2, 2), (32, 2, 4)],
           "tangent_pair": [(64, 2, 2), (64, 1, 2), (64, 2, 3), (128, 1, 2)]}
JOBS = [(op, D, causal, s) for D in (64, 128) for causal in (False, True) for op, streams in STREAMS.items() for s in streams]
PRODUCTS = {"forward": 2, "backward_q": 3, "backward_kv": 4, "jvp": 5, "tangent_q": 7, "tangent_kv": 8, "tangent_pair": 8}
RAGGED, LARGE = (2, 4, 2, 1000, 777), (4, 16, 16, 4096, 4096)


def problem(D, shape, causal, exact): # tensors by name, and the outputs in float64 (None for the large problem)
    import torch
    from theria.attention import reference
    B, Hq, Hkv, Lq, Lk = shape
    g = torch.Generator("cuda").manual_seed(0)
    rand = lambda H, L: torch.randn(B, H, L, D, generator=g, device="cuda", dtype=torch.bfloat16)
    x = dict(q=rand(Hq, Lq), k=rand(Hkv, Lk), v=rand(Hkv, Lk), do=rand(Hq, Lq), tq=rand(Hq, Lq), tk=rand(Hkv, Lk), tv=rand(Hkv, Lk))
    rows = lambda: torch.randn(B, Hq, Lq, generator=g, device="cuda")
    x |= dict(L=rows() + 9, r=rows(), delta=rows(), tdelta=rows(), o=rand(Hq, Lq), to=rand(Hq, Lq)) # stand-ins: time does not depend on them
    if not exact: return x, None
    wide, kw = {n: y.double() for n, y in x.items()}, dict(scale=D**-.5, is_causal=causal)
    qkv = wide["q"], wide["k"], wide["v"], None
    o, L = reference.forward(*qkv, **kw)
    t = reference.tangent_backward(*qkv, o, L, wide["do"], None, wide["tq"], wide["tk"], wide["tv"], **kw)
    truth = dict(o=o, L=L, to=t.to, r=t.tL, dq=t.grads[0], dk=t.grads[1], dv=t.grads[2], g=t.tgrads[0], gk=t.tgrads[1], gv=t.tgrads[2],
                 delta=(wide["do"]*o).sum(-1), tdelta=(wide["do"]*t.to).sum(-1))
    return x | {n: truth[n].bfloat16() if n in ("o", "to") else truth[n].float() for n in ("o", "L", "to", "r", "delta", "tdelta")}, truth


def launch_of(op, D, causal, stream, x): # the launch, and the outputs it will fill
    import torch
    import triton
    from theria.attention.forward import scale_log2
    from theria.attention.hopper import SPECIALS, Stream, Streamed
    from theria.attention import hopper_backward, hopper_forward, hopper_tangent
    kernel, constants = SPECIALS[op]
    config = Stream(*stream)
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = x["q"].shape, x["k"].shape
    keys = op.endswith(("kv", "pair"))
    heads, length, wide = (Hkv, Lk, 1 if op == "tangent_pair" else config.consumers) if keys else (Hq, Lq, config.consumers)
    n_blocks = triton.cdiv(length, 64*wide)
    outs = {"forward": "o L", "backward_q": "dq delta", "backward_kv": "dk dv", "jvp": "to r", "tangent_q": "g delta tdelta", "tangent_kv": "gk gv", "tangent_pair": "gk gv"}[op].split()
    like = dict(o="q", to="q", dq="q", g="q", L="L", r="L", delta="L", tdelta="L", dk="k", dv="v", gk="k", gv="v")
    made = {n: torch.full_like(x[like[n]], float("nan")) for n in outs}
    names = [n for n in x if n not in made]
    scales = (scale_log2(D**-.5),) if op == "forward" else (D**-.5, scale_log2(D**-.5))
    blocks = n_blocks*B*heads
    programs = min(blocks, torch.cuda.get_device_properties(0).multi_processor_count) if config.persistent else blocks
    numbers = *scales, Lq, Lk, heads, Hq//Hkv, n_blocks, *[blocks]*(op == "forward")
    run = Streamed(kernel, programs, " ".join([*names, *made]), numbers, config, **constants(config), CAUSAL=causal)
    return (lambda: run(*(x[n] for n in names), *made.values())), made


def compile_only(n):
    from theria.attention import gate, hopper_backward, hopper_forward, hopper_tangent
    from theria.attention.hopper import Stream, assemble
    op, D, causal, stream = JOBS[n]
    try: print(json.dumps(gate.resources(assemble(op, "bfloat16", D, causal, Stream(*stream)), 90)._asdict()))
    except Exception as e: print(json.dumps(dict(failed=f"{type(e).__name__}: {str(e).splitlines()[-1][:120]}")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--D", type=int, choices=(64, 128), help="only this head dimension")
    parser.add_argument("--compile", type=int)
    args = parser.parse_args()
    if args.compile is not None: return compile_only(args.compile)
    import torch
    import triton
    from theria.attention.contract import rel_err
    from theria.records import Record
    if not torch.cuda.is_available(): parser.error("got a machine without a CUDA device; accepted is a Hopper GPU that PyTorch can see: run it there")
    start, running, said = time.time(), [], {}
    record, problems = Record(args.out, dict(kind="hopper-sweep", dtype="bfloat16", **dict(zip(("B", "Hq", "Hkv", "Lq", "Lk"), LARGE))), device="cuda"), {}
    key = lambda op, D, causal, stream: dict(op=op, D=D, causal=causal, stream=list(stream))
    todo = [n for n, job in enumerate(JOBS) if key(*job) not in record and args.D in (None, job[1])]
    for n in todo:
        running.append((n, subprocess.Popen([sys.executable, __file__, "--out", str(args.out), "--compile", str(n)], stdout=subprocess.PIPE, text=True)))
        if len(running) >= os.cpu_count() or n == todo[-1]:
            for m, p in running: said[m] = json.loads((p.communicate()[0].strip().splitlines() or ['{"failed": "the compiler died"}'])[-1])
            running = []
    print(f"compiled {len(todo)} in {time.time() - start:.0f} s", flush=True)
    for n in todo:
        (op, D, causal, stream), row = JOBS[n], dict(said[n])
        if "failed" not in row and row["shared"] <= 232_448:
            for shape in (RAGGED, LARGE):
                if (D, causal, shape) not in problems: problems[D, causal, shape] = problem(D, shape, causal, shape == RAGGED)
            x, truth = problems[D, causal, RAGGED]
            run, made = launch_of(op, D, causal, stream, x)
            run()
            torch.cuda.synchronize()
            row["error"] = max(rel_err(y, truth[name]) for name, y in made.items())
            run, made = launch_of(op, D, causal, stream, problems[D, causal, LARGE][0])
            row["p20"], row["p50"], row["p80"] = triton.testing.do_bench(run, warmup=4, rep=20, quantiles=[.2, .5, .8])
            row["tflops"] = PRODUCTS[op]*2*4*16*4096**2*D/(2 if causal else 1)/row["p50"]/1e9
            print(f"{op} D{D}{' causal' if causal else ''} {stream}: {row['p50']:.3f} ms, {row['tflops']:.0f} TFLOP/s, error {row['error']:.1e}, {row['spills']} bytes spilt {' '.join(row['waits'])}", flush=True)
        record.add(key(op, D, causal, stream), row)
    print(f"{len(record)} rows in {time.time() - start:.0f} s")


if __name__ == "__main__": main()
