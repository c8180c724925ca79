import os
import pathlib
import signal
import sys

import pytest

# Before torch is imported: these models are too small to gain from threads, which others on the machine slow down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # the scripts are flat files, no package


def pytest_configure(config):
    config.option.reportchars += "s"        # why tests were skipped is said at the end


@pytest.fixture(autouse=True, scope="module")
def alike_on_every_machine(request):
    """All but test_cuda.py runs on the CPU, its subprocesses too; Ctrl-C works, which a background job ignores."""
    import torch
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_cuda.py":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.backends.mps, "is_available", lambda: False)
        yield
    signal.signal(signal.SIGINT, handler)
