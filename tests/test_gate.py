"""Every configuration that a lookup can return compiles for its GPU, fits its shared memory and registers, lets its products overlap, and is free of two known faults of the compilers.

Rows that are not aligned make other kernels of the same source. Each choice of tiles for half precision and up to 128 features on Hopper is compiled with one pair of such sizes, in turn;
with THERIA_GATE=all, some two thousand kernels and about an hour on two cores, with all of them, in every type, and with masks and dropout.
"""
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor


def look(job):
    from theria.attention import gate
    arch, (candidate, pinned) = job
    return gate.problems(candidate, pinned, arch)


SWITCHES = [dict(BIAS=2, DROP=True, present=dict(p_bias="fp32", p_seed="i64", p_dL="fp32")), dict(BIAS=1, present=dict(p_bias="i1")), dict(B=1, Hq=1, G=1, Lq=1, Lk=1)]
FORMS = [("backward_q", dict(SPLIT=True)), ("backward_kv", dict(SPLIT=True)), ("backward_atomic", {}), ("backward_once", {})]


def switch(job):
    "Compile what the interpreter is too lenient about: absent and present pointers, and sizes that are 1 at compile time."
    from theria.attention import gate
    (op, form), flags, causal = job
    k = gate.compile(op, "bfloat16", 64, causal, gate.Config(32, 32, 4, 1), 90, DV=24, BDV=32, **form, **flags)
    return [] if "wgmma" in k.asm["ptx"] or "mma.sync" in k.asm["ptx"] else [f"{job} has no matrix products"]


# features of q and of v as they come, by the power of two that the larger is padded to
SIZES = {16: [(13, 13), (15, 3)], 32: [(30, 30), (20, 7), (9, 29)], 64: [(60, 60), (33, 8), (50, 20), (8, 61)], 128: [(100, 100), (100, 20), (33, 97), (70, 60)], 256: [(200, 200), (130, 60)]}
ALL = os.environ.get("THERIA_GATE") == "all"


def unaligned():
    "Kernels for rows that are not aligned, with the padding of a real call: (candidate, form)."
    import torch

    from theria.attention import forward, gate
    small = [((op, dtype, D, True, c), False) for D in (16, 32) for dtype, itemsize in (("bfloat16", 2), ("float32", 4)) for op in gate.KERNELS
             if (c := gate.tuning.bias_tile(D, itemsize) if op.endswith("bias") else gate.tuning.safe(op, D, itemsize))]
    seen = set()
    for n, (candidate, _) in enumerate([*gate.candidates(90), *small]):
        op, dtype, D, causal, c = candidate
        if not ALL and (dtype == "float32" or D > 128 or (op, D, c) in seen): continue
        seen.add((op, D, c))
        sizes = SIZES[D] if ALL else [SIZES[D][n % len(SIZES[D])]]
        for features in sizes:
            q, v = (torch.empty(1, 1, 1, d, dtype=getattr(torch, dtype), device="meta") for d in features)
            padding = {name: size for name, size in forward.shapes_of(q, v, 0., "bf16x3" if " " in op else "ieee").items() if name in ("BD", "BDV")}
            form = dict(aligned=False, features=features, **padding)
            yield candidate, form
            if not ALL: continue
            yield candidate, form | dict(aligned=True)
            tables = {name: "i32" for name in ("p_hull", "p_rows", "p_cols") if name in gate.KERNELS[op.split()[0]].arg_names}
            for present in (dict(p_bias="fp32", p_seed="i64"), dict(p_bias="i1", **tables)):
                if "BIAS" in gate.KERNELS[op.split()[0]].arg_names: yield candidate, form | dict(BIAS=1 + ("p_seed" in present), DROP="p_seed" in present, present=present)
            if dtype == "bfloat16": yield (op, "float16", *candidate[2:]), form


def search(job):
    from theria.attention import gate
    candidate, form = job
    return gate.miscompiled(gate.compile(*candidate, 90, **form), f"{candidate} {form}")


def streams():
    "Kernels written for Hopper: one entry of the table each, or all of them."
    from theria.attention import gate, hopper_backward, hopper_forward, hopper_tangent  # noqa: F401, the imports file the kernels
    from theria.attention.hopper import SPECIALS
    for op in SPECIALS:
        entries = gate.tuning.table()["sm_90"][op + " hopper"]
        for name in [n for n in entries if ALL or n.startswith("bfloat16")][:None if ALL else 1]: yield op, name, entries[name]


def search_stream(job):
    from theria.attention import gate, hopper_backward, hopper_forward, hopper_tangent  # noqa: F401
    from theria.attention.hopper import Stream, assemble
    op, name, entry = job
    dtype, D, *causal = name.split()
    return gate.miscompiled(assemble(op, dtype, int(D[1:]), bool(causal), Stream(*entry)), f"{op} {name} {entry}", rings=True)


def main():
    from theria.attention import gate
    jobs = [(arch, c) for arch in gate.SHARED for c in gate.candidates(arch)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        switches = [(f, s, causal) for f in FORMS for s in SWITCHES for causal in (False, True)]
        forms = list(unaligned())
        for found in (*pool.map(look, jobs), *pool.map(switch, switches), *pool.map(search, forms), *pool.map(search_stream, streams())): print(*found, sep="\n", end="\n" if found else "")
    print(f"compiled {len(jobs)} {len(forms)}")


def test_configurations_compile_and_fit(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("compiled ") and all(int(n) > 50 for n in lines[-1].split()[1:])
    assert lines[:-1] == []


if __name__ == "__main__": main()
