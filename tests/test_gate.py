"Every configuration that a lookup can return compiles for its GPU, fits its shared memory and registers, and lets its products overlap."
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


def main():
    from theria.attention import gate
    jobs = [(arch, c) for arch in gate.SHARED for c in gate.candidates(arch)]
    with ProcessPoolExecutor(2) as pool:
        switches = [(f, s, causal) for f in FORMS for s in SWITCHES for causal in (False, True)]
        for found in (*pool.map(look, jobs), *pool.map(switch, switches)): print(*found, sep="\n", end="\n" if found else "")
    print(f"compiled {len(jobs)}")


def test_configurations_compile_and_fit(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("compiled ") and int(lines[-1].split()[1]) > 50
    assert lines[:-1] == []


if __name__ == "__main__": main()
