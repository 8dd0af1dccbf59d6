"""Router-logit traces of a model, and routers of any shape that behave like those of the traces.

    python -m xshare_trtllm.evaluation.traces                 # fit the shipped model again
    python -m xshare_trtllm.evaluation.traces --trace FILE    # the moments of gpt-oss-20b's choices again

A `LayerFit` says how a layer's logits vary, in three parts (a random-effects model): a bias of each expert,
a component of the document, and a component of the token that decays along the text. The spectra of the two
covariances are estimated from the traces; `SyntheticRouters` draws experts as random directions in the space
that they span, so any number of experts can be drawn. That Gaussian decides the order of a row's experts; how
far apart their logits are comes from the traces' mean sorted row, read as a function of the normal quantile
of the rank, for a Gaussian alone has lighter tails than a trained router.

Of a large model often only the choices are known, not the logits. `ChoiceMoments` keeps two things of them,
and routers drawn with it have both: how unequally popular the experts are (which alone decides how many
experts a batch of independent requests activates), and how unequal the weights of a row are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from xshare_trtllm.config import RouterSpec, XShareConfig
from xshare_trtllm.evaluation.model import MODEL_DIR
from xshare_trtllm.hf.routers import find_routers
from xshare_trtllm.report import write_json
from xshare_trtllm.routing import route

FIT = MODEL_DIR / "router_fit.json"
CHOICES = MODEL_DIR.parent / "gpt-oss-20b.choices.json"
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


# ---- What choices alone tell ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChoiceMoments:
    """How a router chooses, means over its layers, from the ids and weights of its own top-k.

    origin           model, text and source
    top_k            experts per row
    popularity       share of the rows that choose each expert, ascending: E values with the sum top_k
    squared_weights  sum of the squares of a row's weights, these divided by their sum: 1 / top_k where all
                     are equal, 1 where one has everything
    """

    origin: str
    top_k: int
    popularity: tuple[float, ...]
    squared_weights: float


def choice_moments(ids: Tensor, weights: Tensor, experts: int, origin: str) -> ChoiceMoments:
    """From ids and weights [rows, layers, k] of a router's own choice among `experts`."""
    rows, layers, top_k = ids.shape
    by_layer = ids.long().transpose(0, 1).flatten(1)
    counts = torch.zeros(layers, experts, dtype=torch.int64)
    counts.scatter_add_(1, by_layer, torch.ones_like(by_layer))
    popularity = (counts.double() / rows).sort(-1).values.mean(0)
    shares = weights.double() / weights.double().sum(-1, keepdim=True)
    return ChoiceMoments(
        origin=origin,
        top_k=top_k,
        popularity=tuple(_rounded(value) for value in popularity),
        squared_weights=_rounded(shares.square().sum(-1).mean()),
    )


@cache
def load_choices(path: Path = CHOICES) -> ChoiceMoments:
    """What the JSON at `path` holds; by default those of gpt-oss-20b."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return ChoiceMoments(**values | {"popularity": tuple(values["popularity"])})


def load_trace(path: Path) -> tuple[Tensor, Tensor]:
    """Ids and weights of a trace of choices, `expert_ids` and `expert_weights` of an .npz file: int64 and
    fp32 [requests, tokens, layers, k].

    Raises OSError where there is no such file and ValueError where it is of another form.
    """
    import numpy

    with numpy.load(path) as file:
        if not {"expert_ids", "expert_weights"} <= set(file):
            raise ValueError(f"{path}: has {', '.join(file)}; expert_ids and expert_weights are needed")
        ids = torch.from_numpy(file["expert_ids"].astype("int64"))
        weights = torch.from_numpy(file["expert_weights"].astype("float32"))
    if ids.dim() != 4 or ids.shape != weights.shape:
        raise ValueError(
            f"{path}: ids {list(ids.shape)}, weights {list(weights.shape)}; both must be "
            "[requests, tokens, layers, k]"
        )
    return ids, weights


# ---- Routers drawn from it --------------------------------------------------------------------------------


class SyntheticRouters:
    """One router of `spec` per fitted layer: experts drawn once, then as many documents as asked for.

    `spec` gives the number of experts and where the zero of the logits lies: the top_k-th expert of each row
    has logit 0. Only sigmoid routers feel that (their k-th expert has affinity 1/2); it is an assumption.
    `moments`: the experts' popularity and the rows' squared weights are as there, not as in the fit. With
    another number of experts the popularity relative to the mean is what carries over.
    """

    def __init__(
        self,
        layers: tuple[LayerFit, ...],
        spec: RouterSpec,
        seed: int = 0,
        moments: ChoiceMoments | None = None,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = [_Router(layer, spec, self._generator) for layer in layers]
        if moments is not None:
            scale = _logit_scale(layers, moments)
            for router in self._layers:
                router.profile *= scale
                router.make_popular(_popularity(moments, spec), spec.top_k, self._generator)

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
        profile = _profile(layer, experts)
        self.profile = profile - profile[experts - spec.top_k]

    def logits(self, documents: int, length: int, generator: torch.Generator) -> Tensor:
        order = (self.bias + self._varying(documents, length, generator)).argsort(-1)
        logits: Tensor = torch.empty(order.shape).scatter_(-1, order, self.profile.expand(order.shape))
        return logits

    def _varying(self, documents: int, length: int, generator: torch.Generator) -> Tensor:
        """What documents and tokens add to the biases, [documents, length, E]."""
        shared = torch.randn(documents, 1, self.document.shape[1], generator=generator) @ self.document.T
        noise = torch.randn(documents, length, self.token.shape[1], generator=generator)
        carry = self.lag_correlation
        for t in range(1, length):
            noise[:, t] = carry * noise[:, t - 1] + (1 - carry**2) ** 0.5 * noise[:, t]
        return shared + noise @ self.token.T

    def make_popular(self, popularity: Tensor, top_k: int, generator: torch.Generator) -> None:
        """Sets the biases so that the experts, in random order, are chosen by these shares of the rows [E].

        An expert is chosen about where its logit exceeds a threshold, so probits of the shares differ as the
        biases do; a few corrections by what the drawn rows choose make it exact to the noise of the sample.
        """
        wanted = torch.special.ndtri(popularity[torch.randperm(len(popularity), generator=generator)])
        rows = self._varying(2048, 1, generator)[:, 0]
        self.bias = rows.std() * wanted
        for _ in range(5):
            chosen = own_choice(rows + self.bias, top_k).sum(0)
            shares = (chosen + 0.5) / (len(rows) + 1)  # never 0 or 1, which have no probit
            self.bias += rows.std() * (wanted - torch.special.ndtri(shares))


def _profile(layer: LayerFit, experts: int) -> Tensor:
    """The mean sorted row, ascending, with that many experts."""
    return _interpolate(_quantiles(experts), _quantiles(len(layer.profile)), torch.tensor(layer.profile))


def _popularity(moments: ChoiceMoments, spec: RouterSpec) -> Tensor:
    """[E] fp32, ascending: share of the rows that choose each of the experts of `spec`."""
    relative = torch.tensor(moments.popularity) * len(moments.popularity) / moments.top_k
    at, known = ((torch.arange(n) + 0.5) / n for n in (spec.num_experts, len(relative)))
    shares = _interpolate(at, known, relative).clamp(min=1e-3) * spec.top_k / spec.num_experts
    return (shares * spec.top_k / shares.sum()).clamp(max=0.99)


def _logit_scale(layers: tuple[LayerFit, ...], moments: ChoiceMoments) -> float:
    """What to multiply the fit's logits by for rows with the squared weights of `moments`; by bisection."""
    best = torch.stack([_profile(layer, len(moments.popularity))[-moments.top_k :] for layer in layers])
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        is_flat = float((middle * best).softmax(-1).square().sum(-1).mean()) < moments.squared_weights
        low, high = (middle, high) if is_flat else (low, middle)
    return (low + high) / 2


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

    experts       distinct experts that the rows use
    peak_experts  of them on the GPU that has most
    peak_rows     row-expert assignments on the GPU that has most of those
    kept_utility  share of the rows' utility that is to experts in use (1 for the own routing)
    """

    experts: float
    peak_experts: float
    peak_rows: float
    kept_utility: float


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
    """Routes decode steps [layers, steps, rows, E]; expert_gpu [layers, E], from 0 to gpus - 1. With one GPU
    a coverage limits the layer, not the GPU."""
    parts = []
    for layer, (steps, placement) in enumerate(zip(logits, expert_gpu, strict=True)):
        given = placement if gpus > 1 else None
        routed = [route(step, spec, config.for_layer(layer), expert_gpu=given) for step in steps]
        ids = torch.stack([routing.expert_ids for routing in routed])
        weights = torch.stack([routing.expert_weights for routing in routed])
        kept = sum(routing.stats.kept_utility for routing in routed) / len(routed)
        parts.append((*gpu_load(ids, weights, placement, gpus), kept))
    means = [sum(values) / len(parts) for values in zip(*parts, strict=True)]
    return ExpertLoad(*means)


# ---- What to compare --------------------------------------------------------------------------------------


def own_choice(logits: Tensor, top_k: int) -> Tensor:
    """Boolean [..., E]: the top_k largest logits of each row."""
    ids = logits.topk(top_k, dim=-1).indices
    chosen: Tensor = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, ids, True)
    return chosen


def statistics(logits: Tensor, top_k: int, batches: Iterable[int] = (4, 8, 16, 32)) -> dict[str, Any]:
    """What a fit is judged by, from traces [layers, documents, length, E] of a softmax router.

    distinct_experts  {batch: mean over layers and steps of the experts that a step activates}
    kept_affinity     {batch: share of the softmax that the E * 3/8 best experts of a step keep}
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
    return {"distinct_experts": distinct, "kept_affinity": kept, "overlap": overlap}


def record_shipped() -> Tensor:
    """Traces of the shipped model over its held-out text, [4, 112, LENGTH, 64]."""
    from xshare_trtllm.evaluation.model import held_out, load_model, token_batches

    model, tokenizer = load_model()
    return record(model, token_batches(held_out(), tokenizer, LENGTH))


def record_choices(path: Path) -> ChoiceMoments:
    """Of the trace of gpt-oss-20b: 96 requests, 160 decode tokens each."""
    ids, weights = load_trace(path)
    return choice_moments(
        ids.flatten(0, 1),
        weights.flatten(0, 1),
        experts=32,
        origin="openai/gpt-oss-20b, 96 requests of public test sets (MMLU, GPQA, ...), 160 decode tokens "
        "each, 24 layers; from AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting (Apache-2.0)",
    )


@click.command()
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of gpt-oss-20b.")
def main(trace: Path | None) -> None:
    """Fit the shipped model's routers, or with --trace the moments of gpt-oss-20b's choices."""
    if trace is None:
        save_fit(FIT, fit(record_shipped()))
    else:
        write_json(CHOICES, asdict(record_choices(trace)))


if __name__ == "__main__":
    main()
