"""Run every kernel once under compute-sanitizer: `python scripts/sanitize.py` (memcheck and racecheck, one process a problem, as many at once as there are cores).

The problems are small and ragged, as far as a kernel is for small problems, in half and single precision, with and without causality, mask, dropout and grouped heads, and pass through
the public calls. compute-sanitizer comes with the CUDA toolkit; it is looked for on PATH and below CUDA_HOME.
"""
import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
# What racecheck is not asked: kernels whose warps meet at mbarriers. It takes no notice of those and reports every number that one warp stores in shared memory for another,
# even where Triton's own code hands the arguments to the warps.
UNSEEN = {"racecheck": "Hopper"}


def find():
    "The sanitizer, or one sentence."
    places = [os.environ.get("PATH", "")] + [f"{home}/{folder}" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home
                                             for folder in ("bin", "compute-sanitizer")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    return found or sys.exit("got no compute-sanitizer on PATH or below CUDA_HOME; accepted is the one of the CUDA toolkit: install it, or set CUDA_HOME.")


def problems():
    "Calls of every operator, by name."
    import torch

    from theria import sdpa_custom
    from theria.attention.backward import arrangement

    def derivatives(dtype, D=40, Dv=24, Lq=77, Lk=50, mask=None, backend="triton_full_fused", form=None, parts=None, **kw):
        g = torch.Generator("cuda").manual_seed(0)
        rand = lambda *s: torch.randn(*s, generator=g, device="cuda", dtype=dtype)
        leaves = [rand(2, 4, Lq, D), rand(2, 2, Lk, D), rand(2, 2, Lk, Dv), rand(2, 4, Lq, Dv)]
        bias = dict(bool=lambda: rand(2, 1, Lq, Lk) > 0, additive=lambda: rand(1, 4, 1, Lk)).get(mask, lambda: None)()
        if mask == "additive": leaves.append(bias)
        leaves = [x.requires_grad_() for x in leaves]
        call = lambda q, k, v, *b: sdpa_custom(q, k, v, b[0] if b else bias, enable_gqa=True, backend=backend, **kw)
        wrt = [*leaves[:3], *leaves[4:]]
        with arrangement(form, parts):
            first = torch.autograd.grad(call(*wrt), wrt, leaves[3], create_graph=True)
            torch.autograd.grad(first, leaves, [rand(*x.shape) for x in first])
            torch.func.jvp(call, tuple(wrt), tuple(rand(*x.shape) for x in wrt))
        torch.cuda.synchronize()

    half, single = torch.float16, torch.float32
    ways = dict(two=("two", None), once=("once", None), parts=("two", (2, 3)), atomic=("atomic", None))
    for dtype in (half, torch.bfloat16, single):
        name = str(dtype).removeprefix("torch.")
        for how, (form, parts) in ways.items(): yield f"{name} {how}", lambda d=dtype, f=form, s=parts: derivatives(d, form=f, parts=s, is_causal=True)
        for mask in ("bool", "additive"): yield f"{name} {mask}", lambda d=dtype, m=mask: derivatives(d, mask=m, dropout_p=.3)
    for D in (64, 128, 256): yield f"float16 D{D}", lambda D=D: derivatives(half, D, D, 130, 130)
    for backend in ("triton_ref", "triton_fast", "triton_fused"): yield backend, lambda b=backend: derivatives(half, backend=b, dropout_p=.3)
    yield "tables of a mask", lambda: derivatives(half, 64, 64, 600, 600, mask="bool")
    for D, N in ((64, 2050), (128, 1030)): yield f"Hopper D{D}", lambda D=D, N=N: derivatives(torch.bfloat16, D, D, N, N)

    def terms():
        torch.set_float32_matmul_precision("high")
        derivatives(single, Lq=600, Lk=600)
    yield "float32 high", terms

    def fp8():
        from theria.attention.fp8 import sdpa_fp8
        q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (77, 150, 150))
        torch.autograd.grad(sdpa_fp8(q, k, v).sum(), (q, k, v))
        torch.cuda.synchronize()
    yield "float8", fp8

    def neural_process():
        from theria.neural_process import gmm, heads, mlp
        from theria.neural_process.adamw import AdamW
        rand = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        x, w1, w2, u1, u2 = rand(77, 64), rand(88, 64), rand(64, 88), rand(5, 88, 64), rand(5, 3, 88)
        for form in mlp.FORMS: mlp.mlp(x, w1, w2, backend="fused", form=form).sum().backward()
        z = heads.HEADS["fused"](x, u1, u2)
        (gmm.nll(z, torch.randn(77, device="cuda"), backend="fused") + gmm.log_prob(z, torch.randn(77, device="cuda"), backend="fused").sum()).backward()
        params = [torch.nn.Parameter(y.detach()) for y in (w1, w2)]
        for y in params: y.grad = torch.ones_like(y)
        AdamW(params, torch.tensor(1e-2, device="cuda"), .1).step()
        torch.cuda.synchronize()
    yield "neural process", neural_process


def check(name, command, env, limit):
    "What one process says: nothing, or why it failed."
    try: done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired: return f"{name}: not finished after {limit} s"
    lines = (done.stdout + done.stderr).splitlines()
    said, errors = [line for line in lines if line.startswith("=========")], [line for line in lines if "rror" in line]
    return "" if done.returncode == 0 else "\n".join([f"{name}: exit {done.returncode}", *(said[:60] or errors[-20:] or lines[-20:])])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tool", action="append", choices=TOOLS, help="only this tool; may be repeated")
    p.add_argument("--only", default="", metavar="TEXT", help="only the problems whose name contains this")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    p.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for one process")
    p.add_argument("--run", metavar="NAME", help="run one problem without a sanitizer")
    a = p.parse_args()
    sys.path.insert(0, str(ROOT))
    if a.run: return dict(problems())[a.run]()
    sanitizer, names = find(), [name for name, _ in problems() if a.only in name]
    # Triton's kernels are compiled by a plain run first: under the tool, compiling would be traced too. Without PyTorch's cache of memory, every tensor is an allocation the tool knows.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    plain = lambda name: [sys.executable, __file__, "--run", name]
    under = {tool: [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"] for tool in a.tool or TOOLS}
    def one(name):
        alone = check(name, plain(name), env, a.limit)
        judge = lambda tool: None if alone or name.startswith(UNSEEN.get(tool, "-")) else check(name, under[tool] + plain(name), env, a.limit)
        return [alone, *map(judge, under)]
    with ThreadPoolExecutor(a.jobs) as pool: found = list(pool.map(one, names))
    for way, bad in zip(("no tool", *under), zip(*found)):
        asked, bad = sum(b is not None for b in bad), [b for b in bad if b]
        print(f"{way}: {asked - len(bad)} of {asked} problems clean", *bad, sep="\n", flush=True)
    sys.exit(any(map(any, found)))


if __name__ == "__main__": main()
