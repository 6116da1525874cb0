"""The kernels of the isometric map take the interpreter many times as long as the others: most of their cases are slow."""

import pytest

QUICK = ("test_kernel_for_every_number_of_streams[isometric-3]", "test_kernel_for_every_number_of_streams[hybrid-3]")
LONG = ("test_kernel_keeps_the_isometry_for_bad_conditions", "test_kernel_is_as_exact_as_the_condition_allows")


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "kernels" and item.path.parent.parent.name == "tests" and item.name not in QUICK:
            costly = any(name in item.name for name in ("isometric", "hybrid")) and item.path.stem != "test_shapes"
            if costly or item.name.startswith(LONG):
                item.add_marker(pytest.mark.slow)
