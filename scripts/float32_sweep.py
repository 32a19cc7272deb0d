"""How float32 is multiplied, in every pass: `python scripts/float32_sweep.py --out nbs/results/float32-h200.json` (two minutes on an H200).

Each pass runs at B4 H16 N4096 with each way to make its products, in tiles that were thought worth trying. What it gives for the last head is compared with float64, every number is checked to be
finite and the same in two runs, and the time is the device's. The kernels are compiled first, on all processors at once. The page "float32 on tensor cores" (nbs/attention/terms.ipynb) shows the table;
the winners are pinned by hand in theria/attention/configs.json.
"""
import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton

from theria.attention import reference, terms
from theria.attention.backward import backward
from theria.attention.contract import rel_err
from theria.attention.forward import forward
from theria.attention.jvp import jvp
from theria.attention.launch import listening
from theria.attention.tangent_backward import double_backward, tangent_backward
from theria.attention.tuning import Config
from theria.records import Record

PRECISIONS = ("bf16x6", "bf16x3", "tf32", "tf32x3", "ieee")
PRODUCTS = dict(forward=2, backward_q=3, backward_kv=4, jvp=5, double_q=10, tangent_q=7, tangent_kv=8)
KERNELS = dict(forward="_forward_kernel", backward_q="_backward_q", backward_kv="_backward_kv", jvp="_jvp_kernel", double_q="_double_q", tangent_q="_tangent_q", tangent_kv="_tangent_kv")
OUTPUTS = dict(forward=dict(o="p_o", L="p_L"), backward_q=dict(dq="p_dq"), backward_kv=dict(dk="p_dk", dv="p_dv"), jvp=dict(to="p_to", r="p_r"),
               double_q=dict(gq="p_g", to="p_to"), tangent_q=dict(gq="p_g"), tangent_kv=dict(gk="p_gk", gv="p_gv"))
TILES = {
    ("forward", 64): [(128, 64, 8, 1), (64, 32, 4, 2), (64, 64, 4, 1)], ("forward", 128): [(128, 64, 8, 1), (64, 32, 4, 1), (128, 32, 8, 1)],
    ("backward_q", 64): [(64, 32, 4, 2), (64, 32, 4, 1), (128, 32, 8, 2)], ("backward_q", 128): [(128, 32, 8, 1), (64, 32, 4, 1), (64, 16, 4, 1)],
    ("backward_kv", 64): [(32, 64, 4, 1), (32, 128, 8, 1), (16, 64, 4, 2)], ("backward_kv", 128): [(16, 64, 4, 1), (32, 64, 4, 1), (32, 128, 8, 1), (16, 128, 8, 1)],
    ("jvp", 64): [(64, 32, 4, 1), (128, 32, 8, 1)], ("jvp", 128): [(64, 32, 4, 1), (64, 16, 4, 1), (64, 32, 8, 1)],
    ("double_q", 64): [(64, 32, 4, 1)],
    ("tangent_q", 64): [(64, 32, 4, 1), (128, 32, 8, 1)], ("tangent_q", 128): [(64, 16, 4, 1), (64, 32, 8, 1)],
    ("tangent_kv", 64): [(32, 64, 4, 1), (16, 64, 4, 1)], ("tangent_kv", 128): [(16, 64, 4, 1), (32, 64, 8, 1)]}
JOBS = [(op, D, False, precision, tile) for precision in PRECISIONS for (op, D), tiles in TILES.items() for tile in (tiles if precision.startswith("bf16") else tiles[:1])]
JOBS += [(op, D, True, precision, TILES[op, D][0]) for precision in PRECISIONS[:2] for op in ("forward", "backward_q", "backward_kv") for D in (64, 128)]
SHAPE = B, H, N = 4, 16, 4096


def inputs(D, N=N):
    g = torch.Generator("cuda").manual_seed(0)
    return dict(zip("q k v do tq tk tv".split(), (torch.randn(B, H, N, D, generator=g, device="cuda") for _ in range(7))))


def truth(x, causal): # of all passes, in float64, of the heads in x
    y, kw = {n: t.double() for n, t in x.items()}, dict(scale=x["q"].shape[3]**-.5, is_causal=causal)
    qkv = y["q"], y["k"], y["v"], None
    o, L = reference.forward(*qkv, **kw)
    t = reference.tangent_backward(*qkv, o, L, y["do"], None, y["tq"], y["tk"], y["tv"], **kw)
    return dict(o=o, L=L, to=t.to, r=t.tL, delta=(y["do"]*o).sum(-1), tdelta=(y["do"]*t.to).sum(-1), dq=t.grads.q, dk=t.grads.k, dv=t.grads.v, gq=t.tgrads.q, gk=t.tgrads.k, gv=t.tgrads.v)


def given(x, causal): # what kernels read of each other's results, rounded to float32
    heads = [truth({n: t[b:b + 1, h:h + 1] for n, t in x.items()}, causal) for b in range(B) for h in range(H)]
    join = lambda n: torch.cat([t[n] for t in heads]).float().view(B, H, *heads[0][n].shape[2:])
    return x | {n: join(n) for n in ("o", "L", "to", "r", "delta", "tdelta", "dq")}


def launched(op, x, causal, precision, tile): # the launch of one kernel, caught on its way: kernel, programs, arguments by name, config, constants
    terms.PRECISIONS["high"], c, caught = precision, Config(*tile), []
    torch.set_float32_matmul_precision("high")
    qkv, kw = (x["q"], x["k"], x["v"], None, None), dict(scale=x["q"].shape[3]**-.5, is_causal=causal)
    done, t, both = (*qkv, x["o"], x["L"]), (x["tq"], x["tk"], x["tv"], None), dict(config_q=c, config_kv=c)
    with listening(lambda kernel, *launch, **constants: caught.append((kernel, *launch, constants))):
        if op == "forward": forward(*qkv, config=c, **kw)
        elif op.startswith("backward"): backward(*done, x["do"], form="two", parts=(1, 1), **both, **kw)
        elif op == "jvp": jvp(*done, *t, config=c, **kw)
        elif op == "double_q": double_backward(*done, x["do"], None, x["dq"], *t, **both, **kw)
        else: tangent_backward(*done, x["do"], None, *t, None, None, x["to"], x["r"], **both, **kw)
    kernel, programs, args, config, constants = next(c for c in caught if c[0].fn.__name__ == KERNELS[op])
    args = dict(zip(kernel.arg_names, args))
    if op.endswith("kv"): args |= {name: x[name[2:]] for name in ("p_r", "p_delta", "p_tdelta") if name in args}
    return kernel, programs, args, config, constants


def compiled(job): # what the compiler says of a job, in a process of its own; the machine code stays in Triton's cache
    op, D, causal, precision, tile = job
    try:
        x = inputs(D, 256)
        x |= dict(o=x["q"], to=x["q"], dq=x["q"]) | dict.fromkeys(("L", "r", "delta", "tdelta"), torch.zeros(B, H, 256, device="cuda"))
        kernel, programs, args, config, constants = launched(op, x, causal, precision, tile)
        k = kernel.warmup(**args, grid=(programs,), **constants, num_warps=config.warps, num_stages=config.stages)
        k._init_handles()
        return dict(shared=k.metadata.shared, registers=k.n_regs, spills=k.n_spills)
    except Exception as e: return dict(failed=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}")


def measured(job, x, exact): # errors of the last head by output, and times in ms
    op, D, causal, precision, tile = job
    kernel, programs, args, config, constants = launched(op, x, causal, precision, tile)
    def run(): kernel[(programs,)](**args, **constants, num_warps=config.warps, num_stages=config.stages)
    outputs = {n: args[p].fill_(torch.nan) for n, p in OUTPUTS[op].items()}
    run()
    errors, first = {n: rel_err(y[-1:, -1:], exact[n]) for n, y in outputs.items()}, {n: y.clone() for n, y in outputs.items()}
    run()
    if not all(y.isfinite().all() and y.equal(first[n]) for n, y in outputs.items()): return dict(failed="an output is not finite, or not the same in two runs", errors=errors)
    p20, p50, p80 = triton.testing.do_bench(run, warmup=4, rep=16, quantiles=[.2, .5, .8])
    return dict(errors=errors, p20=p20, p50=p50, p80=p80, tflops=PRODUCTS[op]*2*B*H*N*N*D/(2 if causal else 1)/p50/1e9)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="the result file")
    p.add_argument("--seconds", type=float, default=180., help="no kernel is begun after this time")
    a = p.parse_args()
    if not torch.cuda.is_available(): sys.exit("got a machine without a CUDA device; accepted is a GPU of compute capability 8.0 or newer: run it there.")
    start, record = time.time(), Record(a.out, dict(kind="float32-sweep", dtype="float32", B=B, H=H, N=N), device="cuda")
    key = lambda job: dict(zip(("op", "D", "causal", "precision", "tile"), (*job[:4], list(job[4]))))
    todo = [job for job in JOBS if key(job) not in record]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool: said = dict(zip(todo, pool.map(compiled, todo)))
    print(f"compiled {len(todo)} in {time.time() - start:.0f} s", flush=True)
    for D, causal in sorted({job[1:3] for job in todo}):
        x = given(inputs(D), causal)
        exact = truth({n: x[n][-1:, -1:] for n in "q k v do tq tk tv".split()}, causal)
        for job in todo:
            if job[1:3] != (D, causal) or time.time() - start > a.seconds: continue
            row = said[job] if "failed" in said[job] else said[job] | measured(job, x, exact)
            record.add(key(job), row)
            print(*job, row.get("failed") or f"{row['p50']:.2f} ms, {row['tflops']:.0f} TFLOP/s, errors {' '.join(f'{n} {e:.1e}' for n, e in row['errors'].items())}, {row['spills']} spills", flush=True)
    print(f"{len(record)} rows in {time.time() - start:.0f} s")


if __name__ == "__main__": main()
