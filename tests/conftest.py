import os
import pathlib
import sys

# Before torch is imported: these models are too small to gain from threads, which others on the machine slow down a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # the scripts are flat files, not a package


def pytest_configure(config):
    config.option.reportchars += "s"        # why tests were skipped is told at the end
    config.addinivalue_line("markers", "long: slow tests, of kills and of many processes; run by -m long")


def pytest_collection_modifyitems(config, items):
    """The long tests run where they are asked for: by a marker expression or by name."""
    if not config.option.markexpr and not any("::" in a for a in config.args):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
