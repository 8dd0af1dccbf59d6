"""One step of verify_trtllm.sh:  verify_trtllm.py STEP MODEL FOLDER

Names of TensorRT-LLM: for engines those of 1.0 to 1.2 (models/*, runtime/ModelRunner*), else LLM, of 1.0 on.
The line `RESULT: ` that a step prints is its result; an exception is its failure. Both sides of a comparison
have the same prompts, and none of them finds the other's in a cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

EXPERTS, TOP_K, LAYERS, BATCH, NEW_TOKENS = 16, 2, 2, 8, 16
RESULT = "RESULT: "
BUDGET = BATCH  # never exceeded by the warm-up, which keeps the best expert of every row


class Step:
    """The folders of one model: hf, checkpoint, and an engine per kind."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder / model
        self.hf, self.checkpoint_dir = self.folder / "hf", self.folder / "checkpoint"

    # ---- A checkpoint made on the spot ----

    def checkpoint(self) -> str:
        """Random weights through transformers, converted by TensorRT-LLM's own classes."""
        import torch
        import transformers

        shape = {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "num_experts_per_tok": TOP_K,
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        }
        if self.model == "mixtral":
            config: Any = transformers.MixtralConfig(num_local_experts=EXPERTS, **shape)
            hf_class, own_class = transformers.MixtralForCausalLM, "LLaMAForCausalLM"
        else:
            more = {
                "num_experts": EXPERTS,
                "moe_intermediate_size": 256,
                "head_dim": 64,
                "norm_topk_prob": True,
            }
            config = transformers.Qwen3MoeConfig(**more, **shape)
            hf_class, own_class = transformers.Qwen3MoeForCausalLM, "QWenForCausalLM"
        torch.manual_seed(0)
        model = hf_class(config).to(torch.bfloat16)
        for name, weight in model.named_parameters():
            if "gate.weight" in name:  # logits that differ: a router of random weights is nearly indifferent
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(self.hf)
        if self._has_engines():
            import tensorrt_llm.models as models

            own = getattr(models, own_class).from_hugging_face(str(self.hf), dtype="bfloat16")
            own.save_checkpoint(str(self.checkpoint_dir), save_config=True)
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights, {EXPERTS} experts"

    @staticmethod
    def _has_engines() -> bool:
        import tensorrt_llm

        return tuple(map(int, tensorrt_llm.__version__.split(".")[:2])) <= (1, 2)

    # ---- Engines ----

    def _build(self, kind: str, *options: str) -> Path:
        """By the command, in this process; of kind `ids_*` with the expert ids of MoE layers as outputs."""
        from xshare_trtllm.trtllm.build_command import main

        engine = self.folder / kind
        if kind.startswith("ids_"):
            _mark_expert_ids()
        sizes = ("--max_batch_size", str(BATCH), "--max_seq_len", "128", "--max_num_tokens", "512")
        main(["--checkpoint_dir", str(self.checkpoint_dir), "--output_dir", str(engine), *sizes, *options])
        return engine

    def build_plain(self) -> str:
        return _size(self._build("plain"))

    def build_full(self) -> str:
        return _size(self._build("full", *_budget(EXPERTS)))

    def build_small(self) -> str:
        engine = self._build("small", *_budget(BUDGET))
        noted = json.loads((engine / "config.json").read_text())["xshare"]
        assert noted["config"]["budget"] == BUDGET and len(noted["library_sha256"]) == 64, noted
        return _size(engine)

    def dry_run(self) -> str:
        picture = self.folder / "network.onnx"
        engine = self._build("dry", "--dry_run", "--visualize_network", str(picture), *_budget(BUDGET))
        assert not (engine / "rank0.engine").exists() and "xshare" in (engine / "config.json").read_text()
        assert b"xshare/0" in picture.read_bytes()
        return "no engine, a picture of the network with XShare's layers"

    def identical_tokens(self) -> str:
        plain, full, small = (_generate_cpp(self.folder / kind)[0] for kind in ("plain", "full", "small"))
        assert plain == full, f"budget = experts changed tokens: {plain} {full}"
        assert all(len(tokens) == NEW_TOKENS for tokens in small)
        same = sum(a == b for x, y in zip(plain, small, strict=True) for a, b in zip(x, y, strict=True))
        return f"budget {EXPERTS}: identical; budget {BUDGET}: {same} of {BATCH * NEW_TOKENS} tokens the same"

    def fewer_experts(self) -> str:
        """Distinct experts of the last generation step, which all requests share."""
        self._in_child("_build", "ids_plain")
        self._in_child("_build", "ids_small", *_budget(BUDGET))
        plain, small = (_active_experts(self.folder / kind) for kind in ("ids_plain", "ids_small"))
        assert sum(small) < sum(plain) and max(small) <= BUDGET, (plain, small)
        return f"experts per layer {plain} without XShare, {small} with budget {BUDGET}"

    def _in_child(self, method: str, *arguments: str) -> str:
        """The result of a method, in a process of its own: it may leave TensorRT-LLM changed."""
        call = [sys.executable, __file__, method, self.model, str(self.folder.parent), *arguments]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        return next(line for line in done.stdout.splitlines() if line.startswith(RESULT)).removeprefix(RESULT)

    def time(self) -> str:
        kinds = ("plain", "full", "small")
        spent = {kind: _generate_cpp(self.folder / kind, repeats=5)[1] for kind in kinds}
        return ", ".join(f"{kind} {1000 * seconds:.1f} ms" for kind, seconds in spent.items())

    # ---- The PyTorch backend ----

    def torch_inspect(self) -> str:
        """The version has what XShare takes hold of."""
        from xshare_trtllm.trtllm.inspection import check_names, inspect

        check_names()
        refused = [f.name for f in inspect() if f.group in ("routing method", "MoE back end") and not f.ok]
        return f"all names are there; refused by name: {', '.join(refused) or 'nothing'}"

    def _llm(self, in_process: bool = True, **options: Any) -> Any:
        """`enable` needs the model in this process. Without block reuse, or a second run of the same prompts
        would have other rows than the first."""
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        os.environ.pop("TLLM_WORKER_USE_SINGLE_PROCESS", None)
        if in_process:
            os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"
        sizes = {"max_batch_size": BATCH, "max_seq_len": 128}
        cache = KvCacheConfig(enable_block_reuse=False)
        return LLM(str(self.hf), skip_tokenizer_init=True, kv_cache_config=cache, **sizes, **options)

    def torch_identical_tokens(self) -> str:
        """A coverage of 1 routes by XShare, and leaves out nothing that a row asks for."""
        from xshare_trtllm import XShareConfig
        from xshare_trtllm.trtllm import enable

        with self._llm() as llm:
            plain = [_generate_llm(llm) for _ in range(3)]
            with enable(llm, XShareConfig(coverage=1.0)) as enabled:
                assert len(enabled) == LAYERS
                ours = _generate_llm(llm)
                counted = _counted(enabled)
            after = _generate_llm(llm)
        assert counted["rows"] > 0, "the layers never counted a row"
        said = _same_tokens(ours, plain, "coverage 1"), _same_tokens(after, plain, "after disable()")
        return f"{'; '.join(said)}; {counted['rows']} rows routed by XShare"

    def torch_fewer_experts(self) -> str:
        """With CUDA graphs, as they are by default: counted on the device."""
        from xshare_trtllm import XShareConfig
        from xshare_trtllm.trtllm import enable

        means = []
        with self._llm() as llm:
            for config in (XShareConfig(coverage=1.0), XShareConfig(BUDGET)):
                with enable(llm, config) as enabled:
                    _generate_llm(llm)
                    counted = _counted(enabled)
                means.append((counted["experts_before"], counted["experts_after"]))
        (own, same), (before, after) = means
        assert own == same > 0, f"coverage 1: {same} experts instead of {own}"
        assert 0 < after < before, f"budget {BUDGET}: {after} experts instead of {before}"
        saved = 100 * (1 - after / before)
        return f"coverage 1 leaves all, budget {BUDGET} leaves out {saved:.0f} % of the experts"

    def torch_dial(self) -> str:
        """Turned between two runs; a graph that has been captured follows it."""
        import torch

        from xshare_trtllm import XShareConfig
        from xshare_trtllm.trtllm.setting import Setting
        from xshare_trtllm.trtllm.torch_backend import Enabled

        counts, tokens = {}, {}
        with self._llm() as llm:
            plain = [_generate_llm(llm) for _ in range(3)]
            with Enabled(llm, XShareConfig(coverage=1.0), has_dial=True) as enabled:
                assert enabled.dial is not None
                for mode in ("shadow", "on", "off"):
                    enabled.dial.turn(Setting(XShareConfig(BUDGET), mode))
                    enabled.counters.zero_()
                    torch.cuda.synchronize()
                    tokens[mode] = _generate_llm(llm)
                    counts[mode] = _counted(enabled)
        shadow, on, off = (counts[mode] for mode in ("shadow", "on", "off"))
        assert on["experts_after"] < on["experts_before"], on
        assert shadow["experts_after"] < shadow["experts_before"], shadow
        assert off["experts_after"] == off["experts_before"] and off["stood_aside"] > 0, off
        said = [_same_tokens(tokens[mode], plain, mode) for mode in ("shadow", "off")]
        return f"on, shadow and off count as they should; {'; '.join(said)}"

    def torch_counted_in_python(self) -> str:
        """Without CUDA graphs every step calls `apply`, and what it returns can be looked at: with a coverage
        of 1 the experts of the method that it wraps, and their weights up to rounding."""
        from xshare_trtllm import XShareConfig
        from xshare_trtllm.trtllm import XShareMoeRoutingMethod, enable

        seen: list[int] = []
        own_apply = XShareMoeRoutingMethod.apply

        def apply(method: Any, router_logits: Any, *rest: Any, **options: Any) -> Any:
            made = own_apply(method, router_logits, *rest, **options)
            if router_logits.shape[0] != BATCH:
                return made
            seen.append(int(made[0].unique().numel()))
            if method.layer.config.coverage == 1.0:
                wrapped = method.wrapped.apply(router_logits, *rest, **options)
                (ids, order), (own_ids, own_order) = made[0].sort(), wrapped[0].sort()
                assert ids.equal(own_ids.to(ids.dtype)), "coverage 1: other experts than the method's own"
                weights, own_weights = made[1].gather(1, order), wrapped[1].gather(1, own_order)
                assert (weights - own_weights).abs().max() < 1e-5, "coverage 1: other weights"
            return made

        XShareMoeRoutingMethod.apply = apply  # type: ignore[method-assign]
        counts = []
        with self._llm(cuda_graph_config=None) as llm:
            for config in (XShareConfig(coverage=1.0), XShareConfig(BUDGET)):
                with enable(llm, config):
                    seen.clear()
                    _generate_llm(llm)
                    assert seen, "no step of the whole batch called apply"
                    counts.append((sum(seen) / len(seen), max(seen)))
        (full, _), (small, most) = counts
        assert small < full and most <= BUDGET, counts
        return f"mean experts {full:.1f} with coverage 1, {small:.1f} with budget {BUDGET}, at most {most}"

    def torch_workers(self) -> str:
        """An LLM with worker processes: all ranks acknowledge, and its tokens are those without XShare."""
        plain = [json.loads(self._in_child("_tokens_of_workers")) for _ in range(2)]
        ours = json.loads(self._in_child("_tokens_of_workers", "1.0"))
        assert ours["ranks"] == 1, f"{ours['ranks']} ranks acknowledged"
        return (
            f"1 rank acknowledged, {_same_tokens(ours['tokens'], [p['tokens'] for p in plain], 'coverage 1')}"
        )

    def _tokens_of_workers(self, coverage: str = "") -> str:
        from xshare_trtllm import XShareConfig
        from xshare_trtllm.trtllm import use
        from xshare_trtllm.trtllm.run_folder import RunFolder

        path, ranks = self.folder / "xshare.yaml", 0
        if coverage:
            XShareConfig(coverage=float(coverage)).to_yaml(path)
            use(path)
        with self._llm(in_process=False) as llm:
            tokens = _generate_llm(llm)
            if coverage:
                ranks = len(RunFolder(path.resolve()).status()["ranks"])
        return json.dumps({"tokens": tokens, "ranks": ranks})


def _same_tokens(ours: list[list[int]], plain: list[list[list[int]]], what: str) -> str:
    """Fails where `ours` differs from `plain`, runs without XShare that agree among themselves. Where these
    do not, batches were put together differently and rounded differently, and tokens prove nothing."""
    total = len(ours) * NEW_TOKENS
    same = max(_agreement(ours, each) for each in plain)
    if same == total:
        return f"{what}: identical tokens"
    control = min(_agreement(plain[0], each) for each in plain)
    assert control < total, f"{what}: {same} of {total} tokens the same, without XShare all of them"
    return f"{what}: {same} of {total} tokens the same, two runs without XShare {control}"


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def _counted(enabled: Any) -> dict[str, int]:
    """What the layers counted on their device."""
    from xshare_trtllm.trtllm.torch_statistics import SUMS

    sums = enabled.counters.cpu()
    counted = {name: int(sums[:, place].sum()) for name, place in SUMS.items()}
    return counted | {
        "rows": int((sums[:, 7] & 0xFFFFFFFF).sum()),
        "stood_aside": int((sums[:, 7] >> 32).sum()),
    }


def _budget(budget: int) -> tuple[str, ...]:
    return "--plugin", "xshare", "--xshare_budget", str(budget)


def _size(engine: Path) -> str:
    return f"{(engine / 'rank0.engine').stat().st_size / 1e6:.1f} MB"


def _prompts() -> list[list[int]]:
    """Each longer than BATCH: a step of BATCH rows is then one of generation."""
    lengths = [BATCH + 1 + request for request in range(BATCH)]
    return [[(7 * i + 13 * place + 5) % 500 for place in range(n)] for i, n in enumerate(lengths)]


def _load_plugin() -> None:
    """Before an engine is read."""
    import ctypes

    import tensorrt_llm  # noqa: F401  (brings its TensorRT)

    from xshare_trtllm.engines.environment import PLUGIN, find_library

    library = find_library(PLUGIN)
    assert library is not None, "run build_scripts/build_plugin.sh"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _generate_cpp(engine: Path, repeats: int = 1) -> tuple[list[list[int]], float]:
    """Greedy tokens of each prompt, and the median time of `repeats` further calls, by the C++ executor."""
    import torch
    from tensorrt_llm.runtime import ModelRunnerCpp

    _load_plugin()
    runner = ModelRunnerCpp.from_dir(engine_dir=str(engine), rank=0, max_output_len=NEW_TOKENS)
    return _generate(runner, torch, repeats)


def _generate(runner: Any, torch: Any, repeats: int) -> tuple[list[list[int]], float]:
    inputs = [torch.tensor(prompt, dtype=torch.int32) for prompt in _prompts()]
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = runner.generate(inputs, max_new_tokens=NEW_TOKENS, end_id=-1, pad_id=0, top_k=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    tokens = [
        output[i, 0, len(prompt) : len(prompt) + NEW_TOKENS].tolist() for i, prompt in enumerate(inputs)
    ]
    return tokens, median(times[1:])


def _mark_expert_ids() -> None:
    """Makes the expert ids of every MoE layer an output of the engine."""
    from tensorrt_llm.layers.moe import MixtureOfExperts

    own, made = MixtureOfExperts.forward_experts, []

    def forward_experts(moe: Any, hidden_states: Any, token_selected_experts: Any, *rest: Any) -> Any:
        token_selected_experts.mark_output(f"expert_ids_{len(made)}", token_selected_experts.dtype)
        made.append(token_selected_experts)
        return own(moe, hidden_states, token_selected_experts, *rest)

    MixtureOfExperts.forward_experts = forward_experts


def _active_experts(engine: Path) -> list[int]:
    """Per layer, in the last generation step, from what TensorRT-LLM's Python session dumps in debug mode."""
    import numpy as np
    import torch
    from tensorrt_llm.runtime import ModelRunner

    _load_plugin()
    os.chdir(engine)  # tllm_debug/ goes to the current folder
    _generate(ModelRunner.from_dir(engine_dir=str(engine), rank=0, debug_mode=True), torch, 0)
    counts = []
    for layer in range(LAYERS):
        dumped = sorted(
            Path("tllm_debug").rglob(f"expert_ids_{layer}*.npy"), key=lambda path: path.stat().st_mtime
        )
        counts.append(len(np.unique(np.load(dumped[-1]))))
    return counts


def _generate_llm(llm: Any) -> list[list[int]]:
    from tensorrt_llm import SamplingParams

    sampling = SamplingParams(max_tokens=NEW_TOKENS, end_id=-1, pad_id=0, detokenize=False, top_k=1)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in _prompts()], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(name: str, model: str, folder: str, *arguments: str) -> None:
    step: Callable[..., Any] = getattr(Step(model, Path(folder)), name)
    print(f"\n{RESULT}{step(*arguments)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
