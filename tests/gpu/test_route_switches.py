"""The correctness tests' subset under each switch of the launches: see switches.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parent))

from device_routing import library_path  # noqa: E402
from switches import SWITCHES, Outcome, run_all  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if not library_path().exists():
    pytest.skip(f"needs {library_path()}: run build_scripts/device_check.sh", allow_module_level=True)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Outcome]]:
    yield {outcome.name: outcome for outcome in run_all()}


@pytest.mark.parametrize("name", SWITCHES)
def test_subset_passes(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name].passed, "\n".join(map(str, outcomes.values()))
