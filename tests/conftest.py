import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # the scripts are flat files, not a package


def pytest_configure(config):
    config.addinivalue_line("markers", "long: the slow half of test_hard.py")


def pytest_collection_modifyitems(config, items):
    """The long tests run where they are asked for: by a marker expression or by name."""
    if not config.option.markexpr and not any("::" in a for a in config.args):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
