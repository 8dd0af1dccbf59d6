"""Which rows a forward pass has: their requests, what is padding, what keeps its own routing."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Prefill = Literal["exempt", "shared", "stepwise"]


class Choice(NamedTuple):
    """What a router decided: logits [T, E], weights [T, k], ids [T, k] int."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


class Step(NamedTuple):
    """Rows that are routed together.

    request_ids  [T] int32, -1 = padding
    exempt       [T] bool, None = no row
    real_rows    rows that are not padding
    """

    request_ids: Tensor
    exempt: Tensor | None
    real_rows: int


@dataclass(slots=True)
class Pass:
    """A forward pass under way.

    opener  the module that was called
    batch   sequences; `length` positions of each; row `b * length + l` is position `l` of sequence `b`
    width   positions of one step
    steps   what is routed together, in the positions' order; None: rows that keep their own routing
    calls   routers that were called so far
    """

    opener: nn.Module
    batch: int
    length: int
    width: int = 0
    steps: list[Step | None] | None = None
    calls: int = 0

    def split(self, choice: Choice) -> list[Choice]:
        """The choices of the rows of each step."""
        if self.width >= self.length:
            return [choice]
        parts = (part.unflatten(0, (self.batch, self.length)).split(self.width, dim=1) for part in choice)
        return [Choice(*(part.flatten(0, 1) for part in step)) for step in zip(*parts, strict=True)]

    def join(self, choices: list[Choice]) -> Choice:
        """One choice of the rows of all steps, the reverse of `split`."""
        if len(choices) == 1:
            return choices[0]
        by_sequence = (
            [p.unflatten(0, (self.batch, -1)) for p in parts] for parts in zip(*choices, strict=True)
        )
        return Choice(*(torch.cat(parts, dim=1).flatten(0, 1) for parts in by_sequence))


class _Thread(threading.local):
    """What belongs to one thread, since several may call one model at the same time."""

    current: Pass | None = None
    finished: Tensor | None = None


class Passes:
    """The passes of one attachment, seen by hooks on the modules that a user may call.

    prefill   as for `attach`; counts for the passes that begin from now on
    """

    def __init__(self, prefill: Prefill, step_tokens: int, routers: int) -> None:
        if step_tokens < 1:
            raise ValueError(f"step_tokens={step_tokens}: a step has at least one position")
        self.prefill, self.step_tokens, self._routers = checked(prefill), step_tokens, routers
        self._thread = _Thread()

    @property
    def current(self) -> Pass | None:
        """The pass that this thread is in."""
        return self._thread.current

    @property
    def finished(self) -> Tensor | None:
        """[batch] bool, the sequences of this thread's `generate` that have reached their end."""
        return self._thread.finished

    @finished.setter
    def finished(self, finished: Tensor | None) -> None:
        self._thread.finished = finished

    def watch(self, module: nn.Module) -> list[Any]:
        """Hooks on `module`, by their handles. Of nested modules the outermost opens the pass."""
        names = tuple(inspect.signature(module.forward).parameters)

        def open_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current = self._thread.current
            if current is None or current.opener is module:
                self._thread.current = self._seen(module, dict(zip(names, args, strict=False)) | kwargs)

        def close_pass(module: nn.Module, _args: Any, output: Any) -> None:
            current = self._thread.current
            if current is None or current.opener is not module:
                return
            self._thread.current = None
            if output is not None and current.calls < self._routers:
                raise RuntimeError(
                    f"attach: {current.calls} of {self._routers} routers were called: something replaces "
                    "the MoE layers, such as kernels that route themselves (load gpt-oss dequantised, and "
                    "without use_kernels)"
                )

        return [
            module.register_forward_pre_hook(open_pass, with_kwargs=True),
            module.register_forward_hook(close_pass, always_call=True),
        ]

    def _seen(self, module: nn.Module, inputs: dict[str, Any]) -> Pass:
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs.get("inputs_embeds")
        if tokens is None:
            raise ValueError(f"attach: {type(module).__name__} got neither input_ids nor inputs_embeds")
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attach: a pass cannot be captured in a CUDA graph: the host reads its rows")
        batch, length = tokens.shape[:2]
        starts = inputs.get("cu_seq_lens_q")
        if starts is not None:
            return Pass(module, batch, length, length, self._packed(starts.tolist(), tokens.numel()))
        if length > 1 and self.prefill == "exempt":
            return Pass(module, batch, length)
        requests = self._requests(inputs, batch, length)
        width = self.step_tokens if length > 1 and self.prefill == "stepwise" else length
        steps: list[Step | None] = [
            Step(rows.flatten().to(tokens.device), None, int((rows >= 0).sum()))
            for rows in requests.split(width, dim=1)
        ]
        if length > 1 and self.prefill == "stepwise":
            steps[0] = None  # the prompt
        return Pass(module, batch, length, width, steps)

    def _requests(self, inputs: dict[str, Any], batch: int, length: int) -> Tensor:
        """[batch, length] int32 on the host: the sequence of each position, -1 = padding."""
        requests = torch.arange(batch, dtype=torch.int32)[:, None].repeat(1, length)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            requests[_own_columns(mask, length, inputs.get("cache")).cpu() == 0] = -1
        finished = self.finished
        if finished is not None and length == 1 and len(finished) == batch:
            requests[finished.cpu()] = -1
        return requests

    def _packed(self, starts: list[int], rows: int) -> list[Step | None] | None:
        """One step of sequences behind each other, as in continuous batching: those of one token decode."""
        if self.prefill == "stepwise":
            raise ValueError("attach(prefill='stepwise'): packed sequences (cu_seq_lens_q) have no steps")
        lengths = torch.tensor(starts).diff()
        requests = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        exempt = lengths.repeat_interleave(lengths) > 1
        padding = rows - len(requests)
        requests = torch.cat([requests, torch.full((padding,), -1, dtype=torch.int32)])
        exempt = torch.cat([exempt, torch.zeros(padding, dtype=torch.bool)])
        if self.prefill == "shared":
            return [Step(requests, None, rows - padding)]
        if bool(exempt[: rows - padding].all()):
            return None
        return [Step(requests, exempt, rows - padding)]


def callable_modules(model: nn.Module, routers: list[nn.Module]) -> list[nn.Module]:
    """The modules that a user may call with tokens: `model`, and the transformers models in it that have all
    routers."""
    from transformers import PreTrainedModel

    wanted = set(routers)
    inner = [
        module
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and wanted <= set(module.modules())
    ]
    return [model, *inner]


def checked(prefill: Prefill) -> Prefill:
    if prefill not in get_args(Prefill):
        raise ValueError(f"prefill={prefill!r}: must be one of {', '.join(get_args(Prefill))}")
    return prefill


def _own_columns(mask: Tensor, length: int, cache: Any) -> Tensor:
    """The columns of `mask` [batch, all] that stand for this pass's positions: its last, unless the cache
    says that it goes on behind them."""
    if mask.shape[1] > length and hasattr(cache, "get_seq_length"):
        start = int(cache.get_seq_length())
        if start + length <= mask.shape[1]:
            return mask[:, start : start + length]
    return mask[:, -length:]
