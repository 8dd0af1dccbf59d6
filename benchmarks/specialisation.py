"""Does a model's router specialise, and is the model better than a trivial one?

    python benchmarks/specialisation.py [--model FOLDER] [--json PATH]

Per layer: the distinct experts that 16 rows of one domain pick in a decode step, those of 16 rows of mixed
domains, and the law of uniformly random choice, E * (1 - (1 - k/E)^16). And bits per byte of the held-out
text against gzip and xz on the same bytes.
"""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from statistics import mean

import click
import torch
from rich.table import Table

from xshare_trtllm import RouterSpec, XShareConfig
from xshare_trtllm.evaluation import (
    MODEL_DIR,
    held_out,
    load_model,
    teacher_forced,
    token_batches,
    token_bytes,
)
from xshare_trtllm.hf import attach
from xshare_trtllm.report import console, machine, write_json

LENGTH, BATCH = 400, 16


@click.command()
@click.option(
    "--model",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=MODEL_DIR,
    help="model folder; default: the shipped one",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="where to write the numbers"
)
def main(folder: Path, json_path: Path | None) -> None:
    """Measure the specialisation and the compression of a model."""
    out = console()
    model, tokenizer = load_model(folder)
    spec = RouterSpec.from_hf_config(model.config)
    sizes = token_bytes(tokenizer)
    documents = held_out()
    domains = sorted({document.domain for document in documents})

    def measure(batches: list[torch.Tensor]) -> tuple[float, float, list[float]]:
        with attach(model, XShareConfig.off(spec), prefill="stepwise") as attached:
            quality = teacher_forced(model, batches, sizes)
        return quality.bits_per_byte, quality.accuracy, [layer.experts_before for layer in attached.stats]

    mixed_batches = token_batches(documents, tokenizer, LENGTH, BATCH)
    bits, accuracy, mixed = measure(mixed_batches)
    by_domain = {}
    for domain in domains:
        own = tuple(document for document in documents if document.domain == domain)
        by_domain[domain] = measure(token_batches(own, tokenizer, LENGTH, BATCH))
    uniform = spec.num_experts * (1 - (1 - spec.top_k / spec.num_experts) ** BATCH)
    text = b"".join(tokenizer.decode(row[1:]).encode() for batch in mixed_batches for row in batch)
    gzip_bits = 8 * len(gzip.compress(text, 9)) / len(text)
    xz_bits = 8 * len(lzma.compress(text, preset=9)) / len(text)

    table = Table(
        title=f"Distinct experts of {spec.num_experts} that 16 rows pick in a decode step (top-{spec.top_k})"
    )
    for name in ("layer", "random", "mixed", "one domain", *domains):
        table.add_column(name, justify="right")
    layers = []
    for layer, count in enumerate(mixed):
        single = {domain: values[2][layer] for domain, values in by_domain.items()}
        layers.append(
            {"uniform": uniform, "mixed": count, "one_domain": mean(single.values()), "domains": single}
        )
        cells = [uniform, count, mean(single.values()), *single.values()]
        table.add_row(str(layer), *(f"{cell:.1f}" for cell in cells))
    out.print(table)
    out.print(
        f"Held-out text, {len(text)} bytes, bits per byte: "
        f"model {bits:.3f}, gzip -9 {gzip_bits:.3f}, xz -9 {xz_bits:.3f}; "
        f"next-token accuracy {accuracy:.1%}"
    )
    for domain, (domain_bits, domain_accuracy, _) in by_domain.items():
        out.print(f"  {domain:8} {domain_bits:.3f} bits per byte, accuracy {domain_accuracy:.1%}")
    if json_path:
        report = {
            "model": folder.name,
            "machine": machine(),
            "rows": BATCH,
            "layers": layers,
            "bits_per_byte": {"model": bits, "gzip -9": gzip_bits, "xz -9": xz_bits},
            "accuracy": accuracy,
            "domains": {d: {"bits_per_byte": v[0], "accuracy": v[1]} for d, v in by_domain.items()},
        }
        write_json(json_path, report)


if __name__ == "__main__":
    main()
