"""Which coverage a model can take: quality and active experts on a user's own text, over batch sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.evaluation.measure import Quality, compare, teacher_forced
from xshare_trtllm.hf.attach import attach
from xshare_trtllm.report import machine, write_aside, write_json

COVERAGES = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9)
FEWEST_PIECES = 24  # below this a bootstrap interval is not to be trusted
MOST_PIECES = 512


@dataclass(frozen=True, slots=True)
class Point:
    """One coverage at one batch size, against the model's own routing on the same pieces of text.

    active, own        distinct experts per layer and step, with XShare and with the own routing
    loss, interval     relative change of the cross-entropy loss, and its 95 % interval
    accuracy           relative change of the next-token accuracy
    accuracy_interval  and its 95 % interval
    """

    coverage: float
    batch: int
    active: float
    own: float
    loss: float
    interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """The smallest coverage whose loss stays below the limit at every batch size: `coverage` is None where
    there is none, and `reason` then says what would be needed."""

    coverage: float | None
    reason: str


def read_pieces(paths: Iterable[Path], tokenizer: Any, length: int) -> Tensor:
    """Texts as pieces of begin-of-text and `length` tokens, in a fixed random order, so that a batch mixes
    documents: int64 [pieces, 1 + length]. At most `MOST_PIECES`.

    A `.jsonl` file has a document a line, in its `text`; any other file is one document. What does not fill a
    piece is left out. Raises ValueError for a file that is no text, or where nothing fills a piece.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pieces: list[list[int]] = []
    tokens = 0
    for path in paths:
        for text in _texts(path):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += len(ids)
            for start in range(0, len(ids) - length + 1, length):
                pieces.append([first, *ids[start : start + length]])
    if not pieces:
        raise ValueError(f"the text has {tokens} tokens and no piece of {length}: give longer documents")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:MOST_PIECES]
    return torch.tensor(pieces)[order]


def _texts(path: Path) -> Iterable[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".jsonl":
            return [content]
        return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be UTF-8 text, or JSON lines with a `text` each ({error})") from error


def calibrate(
    model: Any,
    pieces: Tensor,
    batches: tuple[int, ...],
    coverages: tuple[float, ...] = COVERAGES,
    *,
    advance: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Measures every coverage at every batch size, each position routed as the decode step that it would be.

    pieces   int64 [pieces, 1 + length]; those that do not fill a batch are left out
    advance  called after each of the `(1 + coverages) * batches` measurements

    Raises ValueError where the model has no routers that `attach` knows, or the text does not fill a batch.
    """
    if len(pieces) < max(batches):
        raise ValueError(
            f"batch {max(batches)} needs as many pieces of text, there are {len(pieces)}: "
            f"{max(batches) - len(pieces)} are missing"
        )
    spec = RouterSpec.from_hf_config(model.config)
    pieces = pieces.to(model.device)
    sizes = torch.ones(int(pieces.max()) + 1, dtype=torch.int64)
    points = []
    for batch in batches:
        steps = list(pieces[: len(pieces) // batch * batch].split(batch))

        def measure(config: XShareConfig, steps: list[Tensor] = steps) -> tuple[Quality, float]:
            with attach(model, config, prefill="stepwise") as attached:
                quality = teacher_forced(model, steps, sizes)
                active = mean(layer.experts_after for layer in attached.stats)
            advance()
            return quality, active

        base, own = measure(XShareConfig.off(spec))
        for coverage in coverages:
            quality, active = measure(XShareConfig(coverage=coverage))
            change = compare(quality, base)
            points.append(
                Point(
                    coverage, batch, active, own, change.bits_per_byte, change.bits_interval,
                    change.accuracy, change.accuracy_interval,
                )
            )  # fmt: skip
    return points


def choose(points: list[Point], pieces: int, max_loss: float) -> Choice:
    """The smallest coverage whose 95 % interval stays within `max_loss` at every batch size.

    pieces  of text that the points were measured on. Where there are too few, nothing is chosen and the
            reason says how many more would be needed: intervals shrink with the square root of their number.
    """
    if pieces < FEWEST_PIECES:
        return Choice(
            None,
            f"{pieces} pieces of text are too few to tell: at least {FEWEST_PIECES - pieces} more are needed",
        )
    worst = {
        coverage: max((p for p in points if p.coverage == coverage), key=lambda p: p.interval[1])
        for coverage in {p.coverage for p in points}
    }
    inside = [coverage for coverage, point in worst.items() if point.interval[1] <= max_loss]
    if inside:
        coverage = min(inside)
        point = worst[coverage]
        return Choice(
            coverage,
            f"coverage {coverage}: loss at most {point.interval[1]:+.2%} (95 %) at every batch size",
        )
    promising = [point for point in worst.values() if point.loss < max_loss]
    if not promising:
        least = min(worst.values(), key=lambda p: p.loss)
        return Choice(
            None,
            f"no coverage of the sweep keeps within {max_loss:.2%}: the least loss is {least.loss:+.2%}, "
            f"of coverage {least.coverage} at batch {least.batch}",
        )
    best = min(promising, key=lambda p: (p.interval[1] - p.loss) / (max_loss - p.loss))
    needed = math.ceil(pieces * ((best.interval[1] - best.loss) / (max_loss - best.loss)) ** 2)
    return Choice(
        None,
        f"{pieces} pieces of text are too few for {max_loss:.2%}: coverage {best.coverage} is at "
        f"{best.loss:+.2%}, but its interval ends at {best.interval[1]:+.2%}; about {needed - pieces} more "
        "would tell",
    )


def write_report(
    json_path: Path, model: str, pieces: Tensor, points: list[Point], choice: Choice, max_loss: float
) -> None:
    """The numbers as JSON, and their picture beside it."""
    report = {
        "model": model,
        "machine": machine(),
        "pieces": len(pieces),
        "tokens_per_piece": pieces.shape[1] - 1,
        "max_loss": max_loss,
        "coverage": choice.coverage,
        "reason": choice.reason,
        "points": [asdict(point) for point in points],
    }
    write_json(json_path, report)
    plot(points, model, max_loss, json_path.with_suffix(".png"))


def write_config(path: Path, model: str, pieces: Tensor, points: list[Point], coverage: float) -> None:
    """The chosen configuration as YAML that every command takes, with what it was measured on."""
    rows = [point for point in points if point.coverage == coverage]
    lines = [f"# {model}: calibrated on {len(pieces)} pieces of {pieces.shape[1] - 1} tokens"]
    for point in rows:
        low, high = point.interval
        lines.append(
            f"# batch {point.batch}: {point.own:.1f} -> {point.active:.1f} active experts, "
            f"loss {point.loss:+.2%} (95 %: {low:+.2%} to {high:+.2%})"
        )
    with write_aside(path) as aside:
        aside.write_text("\n".join([*lines, XShareConfig(coverage=coverage).to_yaml()]), encoding="utf-8")


def plot(points: list[Point], model: str, max_loss: float, path: Path) -> None:
    """Loss with its interval, and experts saved, over the coverage; a line for each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for index, batch in enumerate(dict.fromkeys(point.batch for point in points)):
        line = [point for point in points if point.batch == batch]
        x = [point.coverage for point in line]
        loss = [100 * point.loss for point in line]
        spread = [
            [100 * (point.loss - point.interval[0]) for point in line],
            [100 * (point.interval[1] - point.loss) for point in line],
        ]
        colour = f"C{index}"
        left.errorbar(
            x, loss, spread, fmt="o-", capsize=3, color=colour, markersize=4, label=f"batch {batch}"
        )
        saved = [100 * (1 - point.active / point.own) for point in line]
        right.plot(
            x, saved, "o-", color=colour, markersize=4, label=f"batch {batch} (own: {line[0].own:.1f})"
        )
    left.axhline(100 * max_loss, color="grey", linestyle="--", linewidth=1)
    left.set_ylabel("loss, change in %")
    right.set_ylabel("fewer active experts, %")
    for axis in (left, right):
        axis.set_xlabel("coverage")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(model)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)
