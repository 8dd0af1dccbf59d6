"""`generate` of an attached transformers model: sequences that have reached their end are padding.

Its loop goes on feeding them, and its attention mask says nothing of them; its stopping criteria do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from xshare_trtllm.hf.passes import Passes

_PATCHED = ("generate", "_get_stopping_criteria")


def watch_generate(model: nn.Module, passes: Passes, *, is_off: bool) -> Callable[[], None]:
    """Notes in `passes` which sequences of a `generate` of `model` have ended; returns what undoes it."""
    if not all(hasattr(model, name) for name in _PATCHED):
        return lambda: None
    patched: Any = model
    before = {name: vars(model).get(name) for name in _PATCHED}
    own_generate, own_criteria = patched.generate, patched._get_stopping_criteria

    @functools.wraps(own_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("assistant_model") is not None and not is_off:
            _refuse(passes, "assistant_model=")
        outer, passes.finished = passes.finished, None
        try:
            return own_generate(*args, **kwargs)
        finally:
            passes.finished = outer

    @functools.wraps(own_criteria)
    def get_stopping_criteria(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_off:
            _check(passes, generation_config)
        criteria = own_criteria(generation_config, *args, **kwargs)
        return _noting(criteria, passes) if generation_config.num_beams == 1 else criteria

    patched.generate, patched._get_stopping_criteria = generate, get_stopping_criteria

    def undo() -> None:
        for name, value in before.items():
            vars(model).pop(name, None)
            if value is not None:
                setattr(model, name, value)

    return undo


def _check(passes: Passes, generation_config: Any) -> None:
    if generation_config.use_cache is False:
        _refuse(passes, "use_cache=False")
    if generation_config.prompt_lookup_num_tokens is not None:
        _refuse(passes, "prompt_lookup_num_tokens=")


def _refuse(passes: Passes, argument: str) -> None:
    if passes.prefill == "exempt":
        raise ValueError(
            f"attach(prefill='exempt'): generate({argument}) feeds several tokens per sequence in every "
            "pass, all of them exempt; attach with prefill='shared'"
        )


def _noting(criteria: Any, passes: Passes) -> Any:
    """The same criteria, whose verdicts are noted; each call has one verdict per sequence."""

    class Noting(type(criteria)):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            done = super().__call__(input_ids, scores, **kwargs)
            before = passes.finished
            passes.finished = done if before is None else before | done
            return done

    return Noting(criteria)
