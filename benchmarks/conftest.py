"""Run files say which machine they are from."""

import pytest

from benchmarks.rows import machine


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["opcd"] = machine()
