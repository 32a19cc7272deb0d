"Every configuration that a lookup can return compiles for its GPU and fits its shared memory."
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor


def compiled(job):
    from theria.attention import gate
    arch, candidate = job
    return job, gate.compile(*candidate, arch).metadata.shared


def main():
    from theria.attention import gate
    jobs = [(arch, c) for arch in gate.SHARED for c in gate.candidates(arch)]
    with ProcessPoolExecutor(2) as pool:
        for (arch, candidate), shared in pool.map(compiled, jobs):
            if shared > gate.SHARED[arch]: print(f"sm_{arch} {candidate} needs {shared} bytes of shared memory, more than {gate.SHARED[arch]}")
    print(f"compiled {len(jobs)}")


def test_configurations_compile_and_fit(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("compiled ") and int(lines[-1].split()[1]) > 50
    assert lines[:-1] == []


if __name__ == "__main__": main()
