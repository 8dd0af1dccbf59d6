"""tensorrt_llm/_utils.py: `mpi_comm()`, here with `bcast` alone, through the file TENSORRT_LLM_BCAST."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class _Comm:
    def bcast(self, obj: Any, root: int = 0) -> Any:
        path = Path(os.environ["TENSORRT_LLM_BCAST"])
        if obj is not None:
            aside = path.with_suffix(".aside")
            aside.write_text(obj)
            aside.rename(path)
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline, "rank 0 sent nothing"
            time.sleep(0.01)
        return path.read_text()


def mpi_comm() -> _Comm:
    return _Comm()
