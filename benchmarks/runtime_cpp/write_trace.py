"""Writes router logits of the shipped model for xshare_bench.

    python benchmarks/runtime_cpp/write_trace.py PATH.npy

The model reads its held-out text with its own routing. The file is fp32 [layers, documents, positions, E]:
every 16th of 256 positions, so that a decode step of any batch is as many documents at one position.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from xshare_trtllm.evaluation.model import held_out, load_model, token_batches
from xshare_trtllm.evaluation.traces import record
from xshare_trtllm.report import write_aside

LENGTH, STRIDE = 256, 16


def write(path: Path, length: int = LENGTH, stride: int = STRIDE) -> tuple[int, ...]:
    """The last position of each `stride` of `length`; gives the array's shape."""
    model, tokenizer = load_model()
    logits = record(model, token_batches(held_out(), tokenizer, length))
    array = np.ascontiguousarray(logits[:, :, stride - 1 :: stride].numpy(), dtype="<f4")
    with write_aside(path) as aside:
        np.save(aside, array)
    return array.shape


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the file to write, ending in .npy")
    path = parser.parse_args().path
    if path.suffix != ".npy":
        parser.error(f"{path}: must end in .npy")
    print(f"{path}: {list(write(path))}")


if __name__ == "__main__":
    main()
