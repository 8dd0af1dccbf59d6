"""How many experts do two tokens share? Two drafts of one request, two texts of a domain, two domains.

The paper's reason for budgets per request (its overlap figure), on the shipped model: the overlap of the
top-k experts of two tokens, k = 1, 2, 4, 8, as the mean over layers and pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from xshare_trtllm.evaluation import held_out, load_model, token_batches
from xshare_trtllm.hf.routers import find_routers
from xshare_trtllm.report import console, machine, write_aside, write_json

LENGTH, TOP_K = 256, (1, 2, 4, 8)
PAIRS = 20_000
PAIR_NAMES = {
    "draft, next": "neighbouring tokens of one request",
    "draft, 3 apart": "tokens of one request, 3 apart",
    "one text": "any two tokens of one request",
    "one domain": "tokens of two texts of a domain",
    "two domains": "tokens of texts of two domains",
}


def ranked_experts(batches: list[Tensor]) -> Tensor:
    """Every token's experts of the model's own routing, best first: [layers, texts, length, 8]."""
    model, _ = load_model()
    seen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, output: seen.append(output[2]))
        for router in find_routers(model)
    ]
    batch = len(batches[0])
    with torch.inference_mode():
        for tokens in batches:
            model(input_ids=tokens[:, 1:], use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = len(hooks)
    by_layer = [
        torch.cat(seen[layer::layers]).view(len(batches) * batch, LENGTH, -1) for layer in range(layers)
    ]
    return torch.stack(by_layer)


def overlap(first: Tensor, second: Tensor) -> dict[int, float]:
    """Mean share of the top k of one that is in the top k of the other; [layers, pairs, 8] each."""
    shared = {}
    for k in TOP_K:
        equal = first[..., :k, None] == second[..., None, :k]
        shared[k] = float(equal.any(-1).float().mean())
    return shared


def pairs(domains: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Texts and positions of both tokens of the pairs of each kind."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (PAIRS,), generator=generator)

    text, place, other_text, other_place = (
        draw(len(domains)),
        draw(LENGTH - 3),
        draw(len(domains)),
        draw(LENGTH),
    )
    same = domains[text] == domains[other_text]
    related = same & (text != other_text)
    return {
        "draft, next": (text, place, text, place + 1),
        "draft, 3 apart": (text, place, text, place + 3),
        "one text": (text, place, text, (place + 4 + other_place % (LENGTH - 7)) % LENGTH),
        "one domain": (text[related], place[related], other_text[related], other_place[related]),
        "two domains": (text[~same], place[~same], other_text[~same], other_place[~same]),
    }


def plot(results: dict[str, dict[int, float]], num_experts: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, shared in results.items():
        axis.plot(TOP_K, [100 * shared[k] for k in TOP_K], "o-", label=PAIR_NAMES[name])
    axis.plot(TOP_K, [100 * k / num_experts for k in TOP_K], "--", color="grey", label="random choice")
    axis.set_xscale("log", base=2)
    axis.set_xticks(TOP_K, [str(k) for k in TOP_K])
    axis.set_xlabel("k: experts of each token that are compared")
    axis.set_ylabel("shared experts, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title("Overlap of the top-k experts of two tokens, mean of the layers")
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the numbers; the picture goes beside it")
    arguments = parser.parse_args()
    model, tokenizer = load_model()
    documents = held_out()
    names = sorted({document.domain for document in documents})
    domains = torch.tensor([names.index(document.domain) for document in documents])
    ranked = ranked_experts(token_batches(documents, tokenizer, LENGTH, 16))
    results = {
        name: overlap(ranked[:, text, place], ranked[:, other_text, other_place])
        for name, (text, place, other_text, other_place) in pairs(domains).items()
    }
    table = Table(title="Shared experts of two tokens, mean of the layers")
    table.add_column("pair")
    for k in TOP_K:
        table.add_column(f"top-{k}", justify="right")
    for name, shared in results.items():
        table.add_row(PAIR_NAMES[name], *(f"{shared[k]:.1%}" for k in TOP_K))
    num_experts = model.config.num_experts
    table.add_row("random choice", *(f"{k / num_experts:.1%}" for k in TOP_K))
    console().print(table)
    if arguments.json:
        shares = {name: {str(k): share for k, share in shared.items()} for name, shared in results.items()}
        write_json(
            arguments.json,
            {"machine": machine(), "texts": len(documents), "pairs_drawn": PAIRS, "overlap": shares},
        )
        plot(results, num_experts, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
