"""tensorrt_llm/_utils.py of 1.x: MPI, here from Open MPI's variables (the real one asks mpi4py)."""

from __future__ import annotations

import os


def mpi_world_size() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def mpi_rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


local_mpi_size, local_mpi_rank = mpi_world_size, mpi_rank


def mpi_barrier() -> None: ...
