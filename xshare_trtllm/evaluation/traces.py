"""Router-logit traces of a model, and routers of any shape that behave like those of the traces.

    python -m xshare_trtllm.evaluation.traces    # fit the shipped model again, into its router_fit.json

A `LayerFit` says how a layer's logits vary, in three parts (a random-effects model): a bias of each expert,
a component of the document, and a component of the token that decays along the text. The spectra of the two
covariances are estimated from the traces; `SyntheticRouters` draws experts as random directions in the space
that they span, so any number of experts can be drawn. That Gaussian decides the order of a row's experts; how
far apart their logits are comes from the traces' mean sorted row, read as a function of the normal quantile
of the rank, for a Gaussian alone has lighter tails than a trained router.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.evaluation.model import MODEL_DIR
from xshare_trtllm.hf.attach import find_routers
from xshare_trtllm.report import write_json
from xshare_trtllm.routing import route

FIT = MODEL_DIR / "router_fit.json"
LENGTH = 256  # tokens of a document in the shipped fit


@torch.inference_mode()
def record(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Router logits of the model's own routing over token ids `[batch, 1 + length]`, the last token left out.

    Returns fp32 [layers, documents, length, E]. Raises ValueError for a model without known routers.
    """
    routers = find_routers(model)
    parts: list[list[Tensor]] = [[] for _ in routers]
    shape: list[int] = []

    def keep(part: list[Tensor], output: tuple[Tensor, ...]) -> None:
        part.append(output[0].float().view(*shape, -1))

    hooks = [
        router.register_forward_hook(lambda _module, _args, output, part=part: keep(part, output))
        for router, part in zip(routers, parts, strict=True)
    ]
    try:
        for tokens in batches:
            shape[:] = tokens[:, :-1].shape
            model(input_ids=tokens[:, :-1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(part) for part in parts])


def decode_steps(logits: Tensor, batch: int) -> Tensor:
    """Traces [layers, documents, length, E] as decode steps of `batch` documents: [layers, steps, batch, E].

    Documents that do not fill a batch are left out.
    """
    layers, documents, length, experts = logits.shape
    used = logits[:, : documents // batch * batch]
    rows = used.reshape(layers, -1, batch, length, experts)
    return rows.transpose(2, 3).reshape(layers, -1, batch, experts)


# ---- The fit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How the logits of one layer vary; rows are centred, since a constant added to a row changes nothing.

    bias_variance       of the experts' means, over experts
    document_variances  spectrum of the covariance of the document component, descending, at most E values
    token_variances     spectrum of the covariance of the token component, likewise
    lag_correlation     of the token component of a token and the next
    profile             mean of the sorted centred logits, ascending, E values
    """

    bias_variance: float
    document_variances: tuple[float, ...]
    token_variances: tuple[float, ...]
    lag_correlation: float
    profile: tuple[float, ...]


def fit_layer(logits: Tensor) -> LayerFit:
    """From the traces of one layer, [documents, length, E]: moment estimates, documents of equal length.

    Raises ValueError for fewer than 2 documents of 2 tokens.
    """
    documents, length, _ = logits.shape
    if documents < 2 or length < 2:
        raise ValueError(f"fit_layer: needs 2 documents of 2 tokens, got {documents} of {length}")
    centred = (logits - logits.mean(-1, keepdim=True)).double()
    bias = centred.mean((0, 1))
    document = (centred - bias).mean(1)
    token = centred - bias - document[:, None]
    carry = float(((token[:, 1:] * token[:, :-1]).mean() / token.square().mean()).clamp(0, 0.9))
    # The mean of a document's tokens varies by itself, the more the longer they resemble each other: as the
    # mean of so many fewer independent ones. That share is the tokens', not the document's.
    independent = length * (1 - carry) / (1 + carry)
    squares = torch.einsum("dte,dtf->ef", token, token) / (documents * length)
    token_covariance = squares / (1 - 1 / max(independent, 2))
    document_covariance = document.T @ document / (documents - 1) - token_covariance / independent
    return LayerFit(
        bias_variance=_rounded(bias.var()),
        document_variances=_spectrum(document_covariance),
        token_variances=_spectrum(token_covariance),
        lag_correlation=_rounded(carry),
        profile=tuple(_rounded(value) for value in centred.sort(-1).values.mean((0, 1))),
    )


def _spectrum(covariance: Tensor) -> tuple[float, ...]:
    return tuple(_rounded(value) for value in torch.linalg.eigvalsh(covariance).flip(0) if value > 1e-6)


def _rounded(value: Tensor | float) -> float:
    return float(f"{float(value):.5g}")


def fit(logits: Tensor) -> tuple[LayerFit, ...]:
    """The fit of every layer, from traces [layers, documents, length, E]."""
    return tuple(fit_layer(layer) for layer in logits)


def save_fit(path: Path, layers: tuple[LayerFit, ...]) -> None:
    """As JSON."""
    write_json(path, {"layers": [asdict(layer) for layer in layers]})


@cache
def load_fit(path: Path = FIT) -> tuple[LayerFit, ...]:
    """What `save_fit` wrote; by default the fit of the shipped model."""
    values = json.loads(path.read_text(encoding="utf-8"))["layers"]
    return tuple(_layer_fit(layer) for layer in values)


def _layer_fit(values: dict[str, Any]) -> LayerFit:
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return LayerFit(**fields)


# ---- Routers drawn from it --------------------------------------------------------------------------------


class SyntheticRouters:
    """One router of `spec` per fitted layer: experts drawn once, then as many documents as asked for.

    `spec` gives the number of experts and where the zero of the logits lies: the top_k-th expert of each row
    has logit 0. Only sigmoid routers feel that (their k-th expert has affinity 1/2); it is an assumption.
    """

    def __init__(self, layers: tuple[LayerFit, ...], spec: RouterSpec, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = [_Router(layer, spec, self._generator) for layer in layers]

    def logits(self, documents: int, length: int = 1) -> Tensor:
        """Router logits of `documents` new documents, fp32 [layers, documents, length, E]."""
        return torch.stack([layer.logits(documents, length, self._generator) for layer in self._layers])


class _Router:
    """Experts of one layer: their biases and their directions."""

    def __init__(self, layer: LayerFit, spec: RouterSpec, generator: torch.Generator) -> None:
        experts = spec.num_experts
        fitted = len(layer.profile)
        self.lag_correlation = layer.lag_correlation
        self.bias = layer.bias_variance**0.5 * torch.randn(experts, generator=generator)
        self.document = _directions(layer.document_variances, fitted, experts, generator)
        self.token = _directions(layer.token_variances, fitted, experts, generator)
        profile = _interpolate(_quantiles(experts), _quantiles(fitted), torch.tensor(layer.profile))
        self.profile = profile - profile[experts - spec.top_k]

    def logits(self, documents: int, length: int, generator: torch.Generator) -> Tensor:
        shared = torch.randn(documents, 1, self.document.shape[1], generator=generator) @ self.document.T
        noise = torch.randn(documents, length, self.token.shape[1], generator=generator)
        carry = self.lag_correlation
        for t in range(1, length):
            noise[:, t] = carry * noise[:, t - 1] + (1 - carry**2) ** 0.5 * noise[:, t]
        order = (self.bias + shared + noise @ self.token.T).argsort(-1)
        logits: Tensor = torch.empty(order.shape).scatter_(-1, order, self.profile.expand(order.shape))
        return logits


def _directions(
    variances: tuple[float, ...], fitted: int, experts: int, generator: torch.Generator
) -> Tensor:
    """[experts, components]: their products with standard normal vectors have the fit's mean variance per
    expert (the fit had `fitted` experts), equal for all: training balances the experts' loads."""
    directions = torch.randn(experts, len(variances), generator=generator) * torch.tensor(variances).sqrt()
    scaled: Tensor = nn.functional.normalize(directions) * (sum(variances) / fitted) ** 0.5
    return scaled


def _quantiles(experts: int) -> Tensor:
    """Standard normal quantiles of the ranks, ascending."""
    quantiles: Tensor = torch.special.ndtri((torch.arange(experts) + 0.5) / experts)
    return quantiles


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through (x, y), the outer pieces extended; one point is a constant."""
    if len(x) == 1:
        return y.expand(at.shape)
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + slope * (at - x[right - 1])


# ---- Routing them -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Means over layers and decode steps.

    experts        distinct experts that the rows use
    peak_experts   of them on the GPU that has most
    peak_rows      row-expert assignments on the GPU that has most of those
    kept_utility  share of the affinity to all experts that is to experts in use (1 for the own routing)
    kept_choice    affinity to the chosen experts over affinity to the model's own top-k choice
    """

    experts: float
    peak_experts: float
    peak_rows: float
    kept_utility: float
    kept_choice: float


def gpu_load(ids: Tensor, weights: Tensor, expert_gpu: Tensor, gpus: int) -> tuple[float, float, float]:
    """Distinct experts, peak experts and peak rows per GPU, means over steps.

    ids, weights [steps, rows, k] (a slot of weight 0 is unused); expert_gpu [E], from 0 to gpus - 1.
    """
    steps, experts = ids.shape[0], len(expert_gpu)
    rows = torch.zeros(steps, experts)
    rows.scatter_add_(1, ids.long().flatten(1), (weights > 0).float().flatten(1))
    on_gpu = nn.functional.one_hot(expert_gpu.long(), gpus).float()
    in_use = (rows > 0).float()
    peaks = (in_use @ on_gpu).amax(1).mean(), (rows @ on_gpu).amax(1).mean()
    return float(in_use.sum(1).mean()), float(peaks[0]), float(peaks[1])


def simulate(
    logits: Tensor, spec: RouterSpec, config: XShareConfig, expert_gpu: Tensor, gpus: int = 1
) -> ExpertLoad:
    """Routes decode steps [layers, steps, rows, E]; expert_gpu [layers, E], from 0 to gpus - 1."""
    parts = []
    for layer, (steps, placement) in enumerate(zip(logits, expert_gpu, strict=True)):
        routed = [route(step, spec, config.for_layer(layer), expert_gpu=placement) for step in steps]
        ids = torch.stack([routing.expert_ids for routing in routed])
        weights = torch.stack([routing.expert_weights for routing in routed])
        kept = sum(routing.stats.kept_utility for routing in routed) / len(routed)
        choice = kept_choice(steps, ids, weights, spec)
        parts.append((*gpu_load(ids, weights, placement, gpus), kept, choice))
    means = [sum(values) / len(parts) for values in zip(*parts, strict=True)]
    return ExpertLoad(*means)


def kept_choice(logits: Tensor, ids: Tensor, weights: Tensor, spec: RouterSpec) -> float:
    """Affinity to the chosen experts over that to each row's own top-k; logits [steps, rows, E]."""
    affinity = logits.sigmoid() if spec.scoring == "sigmoid_bias" else logits.softmax(-1)
    chosen = affinity.gather(-1, ids.long())[weights > 0].sum()
    own = route(logits.flatten(0, 1), spec, XShareConfig.off(spec)).expert_ids.view(ids.shape)
    return float(chosen / affinity.gather(-1, own.long()).sum())


# ---- What to compare --------------------------------------------------------------------------------------


def own_choice(logits: Tensor, top_k: int) -> Tensor:
    """Boolean [..., E]: the top_k largest logits of each row."""
    ids = logits.topk(top_k, dim=-1).indices
    chosen: Tensor = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, ids, True)
    return chosen


def statistics(logits: Tensor, top_k: int, batches: Iterable[int] = (4, 8, 16, 32)) -> dict[str, Any]:
    """What a fit is judged by, from traces [layers, documents, length, E] of a softmax router.

    distinct_experts  {batch: mean over layers and steps of the experts that a step activates}
    kept_utility     {batch: share of the softmax that the E * 3/8 best experts of a step keep}
    overlap           share of its top_k that a token has in common with one `lag` later in its document
                      ("1", "2", "4", "16") and with one of another document ("other")
    """
    experts = logits.shape[-1]
    budget = experts * 3 // 8
    distinct, kept = {}, {}
    for batch in batches:
        rows = decode_steps(logits, batch)
        distinct[batch] = float(own_choice(rows, top_k).any(2).sum(-1).float().mean())
        sums = rows.softmax(-1).sum(2)
        kept[batch] = float((sums.topk(budget, -1).values.sum(-1) / sums.sum(-1)).mean())
    chosen = own_choice(logits, top_k)
    pairs = {str(lag): (chosen[:, :, lag:], chosen[:, :, :-lag]) for lag in (1, 2, 4, 16)}
    pairs["other"] = chosen[:, 1:], chosen[:, :-1]
    overlap = {name: float((a & b).sum(-1).float().mean()) / top_k for name, (a, b) in pairs.items()}
    return {"distinct_experts": distinct, "kept_utility": kept, "overlap": overlap}


def record_shipped() -> Tensor:
    """Traces of the shipped model over its held-out text, [4, 112, LENGTH, 64]."""
    from xshare_trtllm.evaluation.model import held_out, load_model, token_batches

    model, tokenizer = load_model()
    return record(model, token_batches(held_out(), tokenizer, LENGTH))


if __name__ == "__main__":
    save_fit(FIT, fit(record_shipped()))
