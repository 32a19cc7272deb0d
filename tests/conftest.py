"""What every test starts from: one thread, no display, the same random numbers, Triton's interpreter where there is no GPU."""
import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
hypothesis.settings.register_profile("theria", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("theria")


@pytest.fixture(autouse=True)
def seeded():
    "The same random numbers in every test, whichever tests run before it."
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("gpu"): item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
