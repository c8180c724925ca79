import os
import pathlib
import sys

# Before torch is imported: these models are too small to gain from threads, which others on the machine slow down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # the scripts are flat files, no package


def pytest_configure(config):
    config.option.reportchars += "s"        # why tests were skipped is said at the end
