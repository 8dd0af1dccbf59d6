"""Serving speed, end to end: output tokens/s, time per output token and to the first, at growing concurrency.

A closed loop of clients sends prompts of held-out text, each client its next request when the last has ended.
Without `--url` the serving engine runs in this process; with `--url` and `--baseline_url` two running Triton
servers are driven over gRPC, for instance `xshare triton --backend cpu` with a coverage and without. Every
setting serves the same requests in turn, and changes are medians of such pairs.

Options are named as in `trtllm-bench` (concurrency, num_requests, warmup, max_batch_size, report_json).
"""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from rich.progress import Progress
from rich.table import Table

from xshare_trtllm import XShareConfig
from xshare_trtllm.evaluation import MODEL_DIR, held_out, load_model
from xshare_trtllm.hf import Decoder
from xshare_trtllm.report import console, machine, write_aside, write_json
from xshare_trtllm.serving.engine import Engine
from xshare_trtllm.serving.generation import Chunk, Limits, Request
from xshare_trtllm.serving.text import load_tokenizer, token_texts
from xshare_trtllm.trtllm.setting import Setting

OWN = "own routing"


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was sent, when each of its tokens came; seconds of a monotonic clock."""

    sent: float
    tokens: tuple[float, ...]

    @property
    def first_token(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def per_token(self) -> float:
        """Mean time of the tokens after the first."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Round:
    """One setting at one concurrency, once; seconds."""

    output_tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    per_token_p50: float
    per_token_p99: float


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds; `change` is of the output tokens per second, against the first setting."""

    setting: str
    concurrency: int
    output_tokens_per_second: float
    change: float
    changes: list[float]
    first_token_ms: tuple[float, float]
    per_token_ms: tuple[float, float]
    experts_per_layer: float | None


class Server(Protocol):
    """What answers requests: `send` calls `on_tokens(n)` for each piece and `on_end(error)` once."""

    def send(self, number: int, on_tokens: Callable[[int], None], on_end: Callable[[str], None]) -> None: ...

    def experts(self) -> tuple[int, int]:
        """Active experts, summed over layers and steps since the start, and the number of these."""

    def close(self) -> None: ...


class InProcess:
    """The serving engine of the `cpu` back end, in this process."""

    def __init__(self, config: XShareConfig | None, prompts: list[str], options: argparse.Namespace) -> None:
        model, _ = load_model()
        tokenizer = load_tokenizer(MODEL_DIR)
        self._prompts = [tuple(tokenizer.encode(prompt).ids[: options.input_len]) for prompt in prompts]
        self._output_len = options.output_len
        limits = Limits(options.max_batch_size, 1024, options.input_len, options.output_len)
        decoder = Decoder(model, options.input_len + options.output_len)
        setting = None if config is None else Setting(config)
        self._engine = Engine(decoder, token_texts(tokenizer), setting, limits)

    def send(self, number: int, on_tokens: Callable[[int], None], on_end: Callable[[str], None]) -> None:
        def on_chunk(chunk: Chunk) -> None:
            on_tokens(len(chunk.token_ids))
            if chunk.finish is not None:
                on_end(chunk.error)

        prompt = self._prompts[number % len(self._prompts)]
        self._engine.submit(Request(prompt, self._output_len), on_chunk)

    def experts(self) -> tuple[int, int]:
        layers = self._engine.statistics.layers
        return sum(layer[1] for layer in layers), sum(layer[9] for layer in layers)

    def close(self) -> None:
        self._engine.close()


class Triton:
    """A running Triton server, over one gRPC stream; every response is counted as one token."""

    def __init__(self, url: str, prompts: list[str], options: argparse.Namespace) -> None:
        import tritonclient.grpc as client

        self._client, self._make = client.InferenceServerClient(url), client.InferInput
        self._prompts, self._output_len = prompts, options.output_len
        self._waiting: dict[str, tuple[Callable[[int], None], Callable[[str], None]]] = {}
        self._client.start_stream(self._arrived)

    def send(self, number: int, on_tokens: Callable[[int], None], on_end: Callable[[str], None]) -> None:
        import numpy as np

        prompt = self._prompts[number % len(self._prompts)].encode()
        inputs = []
        for name, value, kind in (
            ("text_input", np.array([prompt], object), "BYTES"),
            ("sampling_param_max_tokens", np.array([self._output_len], np.int32), "INT32"),
            ("sampling_param_end_id", np.array([-1], np.int32), "INT32"),
            ("streaming", np.array([True]), "BOOL"),
        ):
            tensor = self._make(name, list(value.shape), kind)
            tensor.set_data_from_numpy(value)
            inputs.append(tensor)
        self._waiting[str(number)] = on_tokens, on_end
        self._client.async_stream_infer(
            "tensorrt_llm", inputs, request_id=str(number), enable_empty_final_response=True
        )

    def _arrived(self, result: Any, error: Any) -> None:
        if error is not None:
            for _, on_end in self._waiting.values():
                on_end(str(error))
            return
        response = result.get_response()
        on_tokens, on_end = self._waiting[response.id]
        if len(response.outputs):
            on_tokens(1)
        if response.parameters["triton_final_response"].bool_param:
            del self._waiting[response.id]
            on_end("")

    def experts(self) -> tuple[int, int]:
        return 0, 0  # they are on the server's metrics endpoint

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def serve(server: Server, numbers: range, concurrency: int) -> Round:
    """Send the requests `numbers`, at most `concurrency` at a time, and wait for all."""
    sent: dict[int, float] = {}
    tokens: dict[int, list[float]] = {number: [] for number in numbers}
    ended: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def send(number: int) -> None:
        def on_tokens(count: int) -> None:
            tokens[number].extend([time.perf_counter()] * count)

        sent[number] = time.perf_counter()
        server.send(number, on_tokens, lambda error: ended.put((number, error)))

    started = time.perf_counter()
    waiting = iter(numbers)
    for _, number in zip(range(concurrency), waiting, strict=False):
        send(number)
    for _ in numbers:
        number, error = ended.get(timeout=120)
        if error:
            raise RuntimeError(f"request {number} failed: {error}")
        following = next(waiting, None)
        if following is not None:
            send(following)
    seconds = time.perf_counter() - started
    answers = [Answer(sent[number], tuple(tokens[number])) for number in numbers]
    first = torch.tensor([answer.first_token for answer in answers])
    each = torch.tensor([answer.per_token for answer in answers])
    levels = torch.tensor([0.5, 0.99])
    return Round(
        sum(len(answer.tokens) for answer in answers) / seconds,
        *first.quantile(levels).tolist(),
        *each.quantile(levels).tolist(),
    )


def measure(servers: dict[str, Server], options: argparse.Namespace) -> list[Result]:
    """Every concurrency, in rounds; within a round every setting serves the same requests, in turn."""
    results = []
    names = list(servers)
    total = len(options.concurrency) * options.rounds * len(names)
    with Progress(console=console()) as progress:
        task = progress.add_task("serving", total=total)
        for concurrency in options.concurrency:
            rounds: dict[str, list[Round]] = {name: [] for name in names}
            for server in servers.values():
                serve(server, range(options.warmup), concurrency)
            before = {name: server.experts() for name, server in servers.items()}
            for turn in range(options.rounds):
                first = turn * options.num_requests
                for name in names[:: 1 if turn % 2 else -1]:
                    numbers = range(first, first + options.num_requests)
                    rounds[name].append(serve(servers[name], numbers, concurrency))
                    progress.advance(task)
            base = [each.output_tokens_per_second for each in rounds[names[0]]]
            for name, made in rounds.items():
                experts, steps = (b - a for a, b in zip(before[name], servers[name].experts(), strict=True))
                results.append(_result(name, concurrency, made, base, experts / steps if steps else None))
    return results


def _result(
    name: str, concurrency: int, made: list[Round], base: list[float], experts: float | None
) -> Result:
    changes = [each.output_tokens_per_second / own - 1 for each, own in zip(made, base, strict=True)]

    def milliseconds(field: str) -> float:
        return 1000 * median(getattr(each, field) for each in made)

    return Result(
        name,
        concurrency,
        median(each.output_tokens_per_second for each in made),
        median(changes),
        changes,
        (milliseconds("first_token_p50"), milliseconds("first_token_p99")),
        (milliseconds("per_token_p50"), milliseconds("per_token_p99")),
        experts,
    )


def table(results: list[Result]) -> Table:
    made = Table(
        title="Serving", caption="p50 / p99; changes are medians of pairs, worst and best in brackets"
    )
    for name in (
        "concurrency",
        "setting",
        "output tokens/s",
        "change",
        "first token, ms",
        "per output token, ms",
        "active experts",
    ):
        made.add_column(name, justify="left" if name == "setting" else "right")
    for result in results:
        spread = f"{result.change:+.1%} ({min(result.changes):+.1%} {max(result.changes):+.1%})"
        made.add_row(
            str(result.concurrency),
            result.setting,
            f"{result.output_tokens_per_second:.0f}",
            "" if result.setting == OWN else spread,
            "{:.1f} / {:.1f}".format(*result.first_token_ms),
            "{:.2f} / {:.2f}".format(*result.per_token_ms),
            "" if result.experts_per_layer is None else f"{result.experts_per_layer:.1f}",
        )
    return made


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name in dict.fromkeys(result.setting for result in results):
        mine = [result for result in results if result.setting == name]
        x = [result.concurrency for result in mine]
        left.plot(x, [result.output_tokens_per_second for result in mine], "o-", label=name)
        right.plot(x, [result.per_token_ms[0] for result in mine], "o-", label=name)
    for axis, title in ((left, "output tokens per second"), (right, "time per output token, ms (median)")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(concurrency) for concurrency in x])
        axis.set_xlabel("concurrent requests")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--num_requests", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=8, help="requests before the first round")
    parser.add_argument("--max_batch_size", type=int, default=64, help="in process only")
    parser.add_argument("--input_len", type=int, default=64, help="tokens of a prompt, at most")
    parser.add_argument("--output_len", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--coverage", type=float, nargs="+", default=[0.95], help="in process only")
    parser.add_argument("--url", help="host:port of a Triton server with XShare, gRPC")
    parser.add_argument("--baseline_url", help="host:port of one without")
    parser.add_argument("--report_json", type=Path, help="the picture goes beside it as .png")
    options = parser.parse_args()
    if (options.url is None) != (options.baseline_url is None):
        parser.error("--url and --baseline_url go together: changes are measured in pairs")
    if min(options.concurrency) < 1 or options.num_requests < max(options.concurrency):
        parser.error("--concurrency must be at least 1, and --num_requests at least as much")
    if options.output_len < 2:
        parser.error("--output_len must be at least 2: a time per output token needs two tokens")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(MODEL_DIR)
    prompts = [tokenizer.decode(tokenizer.encode(d.text).ids[: options.input_len - 1]) for d in held_out()]
    servers: dict[str, Server] = {}
    try:
        if options.url is not None:
            servers[OWN] = Triton(options.baseline_url, prompts, options)
            servers["XShare"] = Triton(options.url, prompts, options)
        else:
            servers[OWN] = InProcess(None, prompts, options)
            for coverage in options.coverage:
                config = XShareConfig(coverage=coverage)
                servers[f"coverage {coverage}"] = InProcess(config, prompts, options)
        results = measure(servers, options)
    finally:
        for server in servers.values():
            server.close()
    console().print(table(results))
    if options.report_json:
        settings = {name: value for name, value in vars(options).items() if name != "report_json"}
        report = {
            "machine": machine(),
            "model": MODEL_DIR.name,
            "options": settings,
            "results": [asdict(result) for result in results],
        }
        write_json(options.report_json, report)
        plot(results, options.report_json.with_suffix(".png"))


if __name__ == "__main__":
    main()
