"""Measure attention forward and backward on a GPU: `python scripts/bench_sdpa.py --preset medium --dtype float16`.

The same as `theria bench sdpa`, whose `--help` lists the options; it runs from a checkout without being installed. What it does is
explained on the page "Measuring" (nbs/bench.ipynb). Which GPU is used is chosen as for every CUDA program, by CUDA_VISIBLE_DEVICES.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from theria.cli import main

if __name__ == "__main__":
    main(["bench", "sdpa", *sys.argv[1:]])
