"""Coverage, budget and mode of a server that runs: an operator edits the file that it was started with, and
all of its ranks take the values over before the same step.

The values are in device memory (`xshare_dial` in xshare.h), so a captured CUDA graph reads them and nothing
is captured again. Ranks that compute parts of the same rows must never differ in them for a step, so rank 0
alone reads the operator's file, and writes what it has checked to `xshare.run/dial.json` with the number of a
step that all ranks will look at before they make it. Every rank looks once in LOOK_STEPS steps, at steps
whose number is the same on all of them; opening a file sees what was renamed into place before, on NFS too.

Under attention data parallelism steps have no common number, since ranks without requests make steps of
padding. There the values of the group's first rank travel with the all-reduce that every layer needs anyway
(`xshare_trtllm.distributed`), so it does not matter when a rank takes them over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xshare_trtllm import ops
from xshare_trtllm.report import write_json
from xshare_trtllm.trtllm.run_folder import RunFolder
from xshare_trtllm.trtllm.setting import Setting

LOOK_STEPS = 32
SECONDS = 1.0  # between two looks of rank 0 at the operator's file
_TURNABLE = ("coverage", "budget")


class Dial:
    """The device memory that the layers of a model read."""

    def __init__(self, layers: list[Any], device: torch.device) -> None:
        """layers  a `LayerRouting` each"""
        self._layers = layers
        self.travels = layers[0].group is not None  # the first rank's values, with every layer's all-reduce
        with torch.inference_mode(False):  # or they could only be written to in inference mode
            self._values = torch.empty(len(layers), ops.DIAL_BYTES, dtype=torch.uint8, device=device)
        for layer, row in zip(layers, self._values, strict=True):
            layer.dial, layer.is_off = row, False

    def check(self, setting: Setting) -> None:
        """Raises ValueError where a layer's router does not take the setting, naming the layer."""
        budget = setting.config.budget
        if isinstance(budget, tuple) and len(budget) != len(self._layers):
            raise ValueError(f"budget: names {len(budget)} layers, the model has {len(self._layers)}")
        for index, layer in enumerate(self._layers):
            try:
                setting.config.for_layer(index).check(layer.spec)
            except ValueError as error:
                raise ValueError(f"MoE layer {index}: {error}") from error

    def turn(self, setting: Setting) -> None:
        """From the next call or replay on. Enqueues one copy and waits for nothing."""
        self.check(setting)
        values = b"".join(
            ops.pack_dial(setting.config.for_layer(index), setting.mode) for index in range(len(self._layers))
        )
        on_host = torch.frombuffer(bytearray(values), dtype=torch.uint8).view_as(self._values)
        if self._values.is_cuda:
            on_host = on_host.pin_memory()
        self._values.copy_(on_host, non_blocking=True)


class DialWatch:
    """Follows the operator's file in one rank: `step` before every step.

    say  is told what was taken over, or refused and why
    """

    def __init__(
        self, dial: Dial, setting: Setting, folder: RunFolder, rank: int, say: Callable[[str], None]
    ) -> None:
        self._dial, self._folder, self._rank, self._say = dial, folder, rank, say
        self.setting = setting
        self.generation = self.step_number = 0
        self.refused: str | None = None  # what is wrong with the operator's file
        self._seen: object = None  # the first look compares
        self._proposed = 0
        self._due = 0.0
        self._dial_path = folder.path / "dial.json"
        self._run = (folder.server() or {}).get("run")
        dial.turn(setting)

    def step(self, has_real_rows: bool) -> None:
        if not has_real_rows and not self._dial.travels:  # a warm-up
            return
        if self._rank == 0 and time.monotonic() >= self._due:
            self._due = time.monotonic() + SECONDS
            self._look_at_file()
        if self.step_number % LOOK_STEPS == 0:
            self._look_at_proposal()
        self.step_number += 1

    def _look_at_file(self) -> None:
        stamp = _stamp(self._folder.config_path)
        if stamp == self._seen or self._proposed > self.generation:
            return
        self._seen = stamp
        try:
            wanted = Setting.from_yaml(self._folder.config_path)
            _check_turnable(self.setting, wanted)
            self._dial.check(wanted)
        except (OSError, ValueError) as error:
            self.refused = str(error)
            self._say(f"XShare: {self._folder.config_path} is refused, the old values stay: {error}")
            return
        self.refused = None
        if wanted == self.setting:
            return
        self._proposed = self.generation + 1
        # Two looks ahead: the next one of another rank may be under way.
        at_step = (self.step_number // LOOK_STEPS + 2) * LOOK_STEPS
        proposal = {"run": self._run, "generation": self._proposed, "at_step": at_step}
        write_json(self._dial_path, proposal | {"setting": wanted.to_dict()})

    def _look_at_proposal(self) -> None:
        try:
            proposal = json.loads(self._dial_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if proposal["run"] != self._run or proposal["generation"] <= self.generation:
            return
        if not self._dial.travels and not self._is_due(proposal["at_step"]):
            return
        self.setting = Setting.from_dict(proposal["setting"])
        self.generation = proposal["generation"]
        self._dial.turn(self.setting)
        since = f"from step {self.step_number} on"
        if self._dial.travels:
            since = "with the first rank of its group"
        self._say(f"XShare: rank {self._rank} {since}: {self.setting.to_dict()}")

    def _is_due(self, at_step: int) -> bool:
        if at_step < self.step_number:
            raise RuntimeError(
                f"XShare: rank {self._rank} saw at step {self.step_number} that it should have turned the "
                f"dial at step {at_step}, as other ranks have; {self._folder.path} is not on a "
                "file system that shows a file once it has been renamed"
            )
        return at_step == self.step_number


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _check_turnable(now: Setting, wanted: Setting) -> None:
    """Raises ValueError for a change that needs a new start, by name."""
    before, after = now.config.model_dump(), wanted.config.model_dump()
    fixed = [name for name in before if name not in _TURNABLE and before[name] != after[name]]
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: can only be changed by starting the server anew")
