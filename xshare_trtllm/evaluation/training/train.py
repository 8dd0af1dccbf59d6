"""Train a small MoE model of one of three router families on seven domains of text.

    python -m xshare_trtllm.evaluation.training.train --data DIR --out MODEL_DIR [--family deepseek_v3]

`DIR` is what `data.py` wrote. Writes a folder that `from_pretrained` loads (config, bf16 safetensors,
tokenizer) and `training.json` (arguments, versions, loss curve as [step, loss, balance, seconds]) with its
picture. The shipped model took 94 minutes on one CPU core; a GPU is used where torch finds one.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCAB_SIZE = 4096
SEQUENCE = 512
BATCH = 16
BALANCE = 0.01  # weight of the load-balancing loss, which is 1 for a uniform load
BIAS_STEP = 0.002  # of a correction bias towards a uniform load, per step


def read_documents(path: Path) -> dict[str, list[str]]:
    """The texts of one split by domain."""
    texts: dict[str, list[str]] = {}
    with path.open() as file:
        for line in file:
            document = json.loads(line)
            texts.setdefault(document["domain"], []).append(document["text"])
    return texts


def train_tokenizer(texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer on the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for part in texts.values() for text in part[::4]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def pack(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Per domain, the documents as rows of `SEQUENCE + 1` tokens in a fixed random order: int64 `[rows,
    SEQUENCE + 1]`."""
    packed = {}
    for domain, part in texts.items():
        ids: list[int] = []
        for encoding in tokenizer.backend_tokenizer.encode_batch(part):
            ids += [tokenizer.bos_token_id, *encoding.ids]
        rows = torch.tensor(ids[: len(ids) // (SEQUENCE + 1) * (SEQUENCE + 1)]).view(-1, SEQUENCE + 1)
        packed[domain] = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return packed


def batches(packed: dict[str, Tensor]) -> Iterator[Tensor]:
    """Endless batches `[BATCH, SEQUENCE + 1]`, every domain equally often."""
    order = np.random.default_rng(0)
    domains = sorted(packed)
    position = dict.fromkeys(domains, 0)
    queue: list[str] = []
    while True:
        rows = []
        for _ in range(BATCH):
            queue = queue or [domains[i] for i in order.permutation(len(domains))]
            domain = queue.pop()
            rows.append(packed[domain][position[domain] % len(packed[domain])])
            position[domain] += 1
        yield torch.stack(rows)


def new_model(family: str) -> Any:
    """A model of 64 experts per MoE layer, with random weights.

    qwen3_moe    softmax, renormalised; the shipped model: top-8, 14.5 million parameters, 3.5 million of
                 them active for a token
    olmoe        softmax, not renormalised: top-8, 5 million parameters
    deepseek_v3  sigmoid, correction bias, 8 groups of which a token uses 4, a shared expert and a dense first
                 layer: top-6, 5 million parameters
    """
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_COMMON | _SHAPES[family])))


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 256,
        "intermediate_size": 512,  # of dense layers: there are none
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {
        "hidden_size": 160,
        "intermediate_size": 32,  # of an expert
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "hidden_size": 192,
        "intermediate_size": 384,  # of the dense layer
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
}


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al., 2024) for matrices and stacks of matrices
    (experts).

    `torch.optim.Muon` takes single matrices only and orthogonalises in bf16, which CPUs do slowly.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                parameter.add_(orthogonalise(update), alpha=-group["lr"] * scale)


def orthogonalise(blocks: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix of each `[rows, columns]` block."""
    wide = blocks.mT if blocks.shape[-2] > blocks.shape[-1] else blocks
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    orthogonal: Tensor = x.mT if wide is not blocks else x
    return orthogonal


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for embedding, routers and norms."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and "embed" not in name and "mlp.gate." not in name
        (matrices if is_matrix else rest).append(parameter)
    return [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(rest, lr=lr * 0.15, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: 40 steps of warm-up, flat, linear to zero over the last half."""
    return min(1.0, (step + 1) / 40, (steps - step) / (0.5 * steps))


class Routers:
    """The routers of a model while it trains: how evenly they load their experts, and what evens it out."""

    def __init__(self, model: Any) -> None:
        self._gates = [
            module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")
        ]
        self._outputs: list[tuple[Tensor, Tensor]] = []
        for gate in self._gates:
            gate.register_forward_hook(self._note)
        self.has_bias = hasattr(self._gates[0], "e_score_correction_bias")

    def _note(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._outputs.append((output[0], output[2]))

    def clear(self) -> None:
        """Before a forward pass."""
        self._outputs.clear()

    def balance(self) -> Tensor:
        """Mean over layers of `E * sum_e load[e] * probability[e]` (Switch Transformer); 1 for a uniform
        load."""
        losses = []
        for logits, ids in self._outputs:
            affinity = logits.float().sigmoid() if self.has_bias else logits.float().softmax(-1)
            probability = affinity / affinity.sum(-1, keepdim=True)
            losses.append(logits.shape[-1] * (_load(logits, ids) * probability.mean(0)).sum())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def move_biases(self) -> None:
        """A step of each correction bias towards a uniform load (DeepSeek-V3, section 2.1.2)."""
        for gate, (logits, ids) in zip(self._gates, self._outputs, strict=True):
            excess = _load(logits, ids) - 1 / logits.shape[-1]
            gate.e_score_correction_bias.sub_(BIAS_STEP * excess.sign())


def _load(logits: Tensor, ids: Tensor) -> Tensor:
    """The share of all choices that fall to each expert: [E], sum 1."""
    return torch.bincount(ids.flatten(), minlength=logits.shape[-1]) / ids.numel()


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of mapping and faulting them anew; a third of a step's time
    otherwise."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_mmap_max, 0)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out: Path) -> None:
    """Write the model folder beside `out`, then swap it in."""
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    clone: Any = type(model)(model.config)
    clone.load_state_dict(model.state_dict())
    clone.to(torch.bfloat16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "training.json").write_text(json.dumps(record) + "\n")
    plot_curve(record, aside / "training.png")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)


def plot_curve(record: dict[str, Any], path: Path) -> None:
    """The loss and the balance over the steps as a picture."""
    from matplotlib import pyplot

    steps, losses, balances, _ = zip(*record["curve"], strict=True)
    figure, left = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    left.plot(steps, losses, color="tab:blue")
    left.set_xlabel(f"step of {record['batch']} x {record['sequence']} tokens")
    left.set_ylabel("loss, nats per token", color="tab:blue")
    right = left.twinx()
    right.plot(steps, balances, color="tab:orange", linewidth=1)
    right.set_ylabel("load balance (1 = uniform)", color="tab:orange")
    right.set_ylim(0.9, 2)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), required=True, help="folder that data.py wrote"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="model folder to write")
@click.option("--family", type=click.Choice(sorted(_SHAPES)), default="qwen3_moe", show_default=True)
@click.option("--steps", default=800, show_default=True, help=f"of {BATCH * SEQUENCE} tokens each")
@click.option("--lr", default=0.02, show_default=True, help="of Muon; AdamW takes 0.15 of it")
def main(data: Path, out: Path, family: str, steps: int, lr: float) -> None:
    """Train a small MoE model; the tokenizer is the same for every family."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_freed_memory()
    texts = read_documents(data / "train.jsonl")
    tokenizer = train_tokenizer(texts)
    packed = pack(texts, tokenizer)
    total = sum(rows.numel() for rows in packed.values())
    model: Any = new_model(family)
    model.to(device)
    click.echo(
        f"{total / 1e6:.1f} million tokens, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"
    )
    chosen = optimizers(model, lr)
    base = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    record: dict[str, Any] = {
        "family": family, "steps": steps, "batch": BATCH, "sequence": SEQUENCE, "lr": lr,
        "balance": BIAS_STEP if family == "deepseek_v3" else BALANCE, "device": device,
        "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine(),
        "curve": [],
    }  # fmt: skip
    routers = Routers(model)
    compiled: Any = torch.compile(model)
    started = time.monotonic()
    for step, batch in zip(range(steps), batches(packed), strict=False):
        factor = schedule(step, steps)
        for optimizer, rate in zip(chosen, base, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        batch = batch.to(device)
        routers.clear()
        logits = compiled(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        balance = routers.balance()
        (loss if routers.has_bias else loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if routers.has_bias:
            routers.move_biases()
        if step % 10 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            record["curve"].append([step, round(loss.item(), 4), round(balance.item(), 4), round(seconds)])
            speed = (step + 1) * BATCH * SEQUENCE / seconds
            seen = f"loss {loss.item():.3f}  balance {balance.item():.3f}"
            click.echo(f"step {step}/{steps}  {seen}  {speed:.0f} tokens/s")
        if (step + 1) % 200 == 0:
            save(model, tokenizer, record, out)
    save(model, tokenizer, record, out)


if __name__ == "__main__":
    main()
