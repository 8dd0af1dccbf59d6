"""What the ranks of a TensorRT-LLM server report of their routing, as the metrics of one model.

Every rank writes a report beside XShare's configuration every few seconds while it makes steps
(trtllm/workers.py, trtllm/torch_statistics.py). The ranks of one pipeline stage count the same rows, since
tensor and expert parallelism route all of them everywhere and attention data parallelism counts the whole
batch: one rank of each stage is read, for the stage's layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from xshare_trtllm.trtllm.run_folder import RunFolder, is_alive
from xshare_trtllm.trtllm.serving import rank_problem
from xshare_trtllm.trtllm.setting import Setting

_COUNTS = 10  # per layer, as in `metrics.read_layers`


class Routing(NamedTuple):
    """How a server routes.

    layers      as in `Statistics`; a step is one of the rank's engine, prefill and warm-up included
    setting     of all ranks; None where one of them is missing, or routes without XShare
    is_refused  a rank refuses what its file says
    dead        ranks whose process has ended
    """

    layers: tuple[tuple[int, ...], ...] = ()
    setting: Setting | None = None
    is_refused: bool = False
    dead: tuple[int, ...] = ()


def read_routing(folder: RunFolder) -> Routing:
    """What the reports say now."""
    try:
        status = folder.status()
    except RuntimeError:  # no server has run with this file
        return Routing()
    reports: list[dict[str, Any]] = status["ranks"]
    first: dict[int, dict[str, Any]] = {}  # rank of each stage
    for report in reports:
        first.setdefault(report["stage"], report)
    layers = [counts for stage in sorted(first) for counts in _layers(first[stage])]
    settings = [report["setting"] for report in reports]
    is_whole = not status["missing"] and not any(rank_problem(report) for report in reports)
    agrees = bool(settings) and all(setting == settings[0] for setting in settings)
    return Routing(
        tuple(layers),
        Setting.from_dict(settings[0]) if is_whole and agrees else None,
        any(report["refused"] is not None for report in reports),
        tuple(report["rank"] for report in reports if not is_alive(report)),
    )


def _layers(report: dict[str, Any]) -> list[tuple[int, ...]]:
    """Of all MoE layers of the rank; zeros for those whose configuration limits nothing."""
    statistics = report["statistics"]
    counted = dict(zip(report["counted"], statistics["by_layer"], strict=True))
    steps = statistics["steps"]
    return [
        (*counted[layer], steps) if layer in counted else (0,) * _COUNTS for layer in range(report["layers"])
    ]
