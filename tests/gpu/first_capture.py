"""The first call of this process is captured into a graph: python first_capture.py ROWS

Says "captured" where the graph does what the host does, or "refused: ..." where the call said that it cannot
be captured yet and a call outside, then another capture, work. Anything else is an error.
"""

from __future__ import annotations

import sys

import torch
from device_routing import Call, Inputs, Outputs, Settings

SETTINGS = Settings(4, "topk_softmax", budget=48)


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, str]:
    """The graph, and what the call said where it refused: torch may put an error of its own behind that."""
    graph, refusal = torch.cuda.CUDAGraph(), ""
    try:
        with torch.cuda.graph(graph):
            try:
                call.enqueue()
            except RuntimeError as error:
                refusal = str(error)
                raise
    except RuntimeError:
        if "captur" not in refusal:
            raise
    return graph, refusal


def main(num_tokens: int) -> None:
    logits = torch.randn(num_tokens, 128)
    host = Call(SETTINGS, Inputs(logits), Outputs(logits, 4))
    host.run_on_host()
    on_device = Inputs(logits.cuda())
    call = Call(SETTINGS, on_device, Outputs(on_device.router_logits, 4))
    torch.cuda.synchronize()
    graph, refusal = capture(call)
    outcome = f"refused: {refusal}" if refusal else "captured"
    if refusal:
        torch.cuda.synchronize()
        call.enqueue()
        graph, _ = capture(call)
    for _ in range(3):
        call.outputs.poison()
        graph.replay()
        torch.cuda.synchronize()
        differences = call.outputs.differences(host.outputs)
        if differences:
            raise SystemExit(f"{outcome}, but {', '.join(differences)} differ from the host's")
    print(outcome)


if __name__ == "__main__":
    main(int(sys.argv[1]))
