"""The ONNX form in ONNX Runtime against the reference: every output bit, every scoring, every stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from xshare_trtllm import RouterSpec, XShareConfig, reference
from xshare_trtllm.cli import main
from xshare_trtllm.config import RULES, SCORINGS, UTILITIES
from xshare_trtllm.graph import GraphInputs, routing

onnx = pytest.importorskip("onnx", reason="needs onnx")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from xshare_trtllm.graph.onnx_model import OnnxOps, make_model, save_model  # noqa: E402


class Session:
    """A model in ONNX Runtime on one thread, with or without its graph optimisations."""

    def __init__(self, model: Any, optimised: bool = True) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)

    def run(self, logits: torch.Tensor, optional: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        feed = {name: tensor.numpy() for name, tensor in {"router_logits": logits, **optional}.items()}
        return [torch.from_numpy(output) for output in self.session.run(None, feed)]


def compare(
    spec: RouterSpec, config: XShareConfig, inputs: GraphInputs, batches: list[tuple[Any, Any]]
) -> None:
    """Every bit of every batch, optimised by ONNX Runtime or not."""
    model = make_model(spec, config, inputs)
    onnx.checker.check_model(model, full_check=True)
    sessions = [Session(model, optimised) for optimised in (True, False)]
    for logits, optional in batches:
        expected = reference.route(logits, spec, config, **optional)[:3]
        for session in sessions:
            for right, found in zip(expected, session.run(logits, optional), strict=True):
                assert right.dtype == found.dtype and torch.equal(right, found), (spec, config, len(logits))


def batch(
    spec: RouterSpec, rows: int, seed: int, inputs: GraphInputs, coarse: bool = False, banned: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, spec.num_experts, generator=random) * 3
    if coarse:  # ties everywhere, zeros of both signs
        logits = logits.round() * torch.tensor([1.0, -0.0])[torch.arange(spec.num_experts) % 2]
    logits[torch.rand(logits.shape, generator=random) < banned] = -torch.inf
    if rows > 2:
        logits[1, 0] = (torch.nan, torch.inf, -torch.inf, 3e38)[seed % 4]
    optional = {
        "correction_bias": torch.randn(spec.num_experts, generator=random) * 0.2,
        "request_ids": torch.randint(-1, max(1, rows // 3), (rows,), generator=random, dtype=torch.int32),
        "exempt": torch.rand(rows, generator=random) < 0.15,
        "expert_gpu": torch.randint(
            0, min(8, spec.num_experts), (spec.num_experts,), generator=random, dtype=torch.int32
        ),
    }
    return logits, {name: optional[name] for name in inputs.names()}


def specs() -> list[RouterSpec]:
    return [RouterSpec(16, 3, scoring) for scoring in SCORINGS] + [
        RouterSpec(24, 4, "softmax", 6, 2, 16.0),
        RouterSpec(24, 4, "sigmoid_bias", 4, 2, 2.5),
    ]


CONFIGS = {  # each stage alone, then all of them
    "off": XShareConfig(24),
    "budget": XShareConfig(6),
    "no warm-up": XShareConfig(6, warmup=0),
    "all warm-up": XShareConfig(5, warmup=3),
    "requests": XShareConfig(8, request_budget=3),
    "GPUs": XShareConfig(8, gpu_budget=2),
    "coverage": XShareConfig(coverage=0.875),
    "cap by coverage": XShareConfig(coverage=0.75, warmup=1),
    "rows": XShareConfig(6, max_rows=4),
    "all": XShareConfig(9, 1, 5, 3, 0.75, 12),
    "all, affinity": XShareConfig(9, 1, 5, 3, 0.75, 12, "affinity"),
}


CASES = [
    pytest.param(spec, config, id=f"{spec.scoring}-{spec.num_groups}-{name}")
    for spec in specs()
    for name, config in CONFIGS.items()
    if config.warmup > 0 or spec.num_groups == 1  # groups need a warm-up
    if config.utility == "squared_weight" or spec.rule.is_bounded
]


@pytest.mark.parametrize(("spec", "config"), CASES)
def test_scorings_and_stages(spec: RouterSpec, config: XShareConfig) -> None:
    on_gpus = config is not CONFIGS["coverage"]  # which limits the fullest where they are given
    inputs = GraphInputs(spec.rule.has_bias, True, True, on_gpus)
    batches = [
        batch(spec, rows, seed, inputs, coarse, banned)
        for seed, (rows, banned) in enumerate(((1, 0.0), (2, 0.3), (5, 0.0), (17, 0.5), (17, 0.9)))
        for coarse in (False, True)
    ]
    compare(spec, config, inputs, batches)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random(data: st.DataObject) -> None:
    draw = data.draw
    scoring = draw(st.sampled_from(SCORINGS))
    rule = RULES[scoring]
    groups = draw(st.sampled_from((1, 1, 2, 4))) if rule.group_best_of else 1
    experts = groups * draw(st.integers(2, 12))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(8, top_groups * (experts // groups))))
    spec = RouterSpec(experts, top_k, scoring, groups, top_groups, draw(st.sampled_from((1.0, 2.5))))
    off = st.none()
    coverage = draw(off | st.sampled_from((0.25, 0.5, 0.875, 1.0, float(np.float32(0.97)))))
    budget = st.integers(top_k, experts + 1)
    config = XShareConfig(
        draw(budget if coverage is None else off | budget),
        draw(st.integers(int(groups > 1), top_k)),
        draw(off | st.integers(1, experts + 2)),
        draw(off | st.integers(1, 6)),
        coverage,
        draw(off | st.integers(1, 20)),
        draw(st.sampled_from(UTILITIES if rule.is_bounded else ("squared_weight",))),
    )
    has_bias = rule.has_bias and draw(st.booleans())
    on_gpus = config.gpu_budget is not None or draw(st.booleans())
    inputs = GraphInputs(has_bias, True, draw(st.booleans()), on_gpus)
    rows, seed = draw(st.integers(1, 24)), draw(st.integers(0, 2**31))
    banned = draw(st.sampled_from((0.0, 0.0, 0.2, 0.8)))
    compare(spec, config, inputs, [batch(spec, rows, seed, inputs, draw(st.booleans()), banned)])


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(2**-16, 1, width=32) | st.sampled_from((0.5, 0.97, 1.0)),
    totals=st.lists(st.integers(0, 2**50 - 1), min_size=1, max_size=20),
    rests=st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 2**25)), min_size=1, max_size=20),
)
def test_a_share_is_rounded_as_float64_does(
    share: float, totals: list[int], rests: list[tuple[int, int]]
) -> None:
    share = float(np.float32(share))
    mantissa, denominator = share.as_integer_ratio()
    inverse = pow(mantissa, -1, denominator) if denominator > 1 else 0
    near = [(rest * inverse) % denominator + high * denominator for rest, high in rests]  # of little rest
    totals = totals + [total for total in near if total < 2**50]
    ops = OnnxOps()
    wanted = routing.least_share(ops, "total", share)
    types = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [len(totals), 1])
        for name in ("total", wanted)
    ]
    graph = onnx.helper.make_graph(ops.nodes, "share", types[:1], types[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"total": np.array(totals, np.int64)[:, None]})
    assert found[:, 0].tolist() == [math.ceil(share * float(total)) for total in totals]


@pytest.mark.parametrize(
    "spec",
    (RouterSpec(512, 16, "softmax_renorm"), RouterSpec(256, 8, "sigmoid_bias", 8, 4, 2.5)),
    ids=("512", "256 grouped"),
)
def test_full_size(spec: RouterSpec) -> None:
    inputs = GraphInputs(spec.rule.has_bias, True, True, True)
    for config in (XShareConfig(64, 1, 24, 12, 0.5, None), XShareConfig(coverage=0.9375)):
        compare(spec, config, inputs, [batch(spec, rows, rows, inputs) for rows in (32, 200)])


def test_only_padding_and_no_rows() -> None:
    spec, config = RouterSpec(16, 3, "softmax"), XShareConfig(6)
    inputs = GraphInputs(request_ids=True)
    padding = {"request_ids": torch.full((4,), -1, dtype=torch.int32)}
    empty = {"request_ids": torch.empty(0, dtype=torch.int32)}
    compare(spec, config, inputs, [(torch.randn(4, 16), padding), (torch.empty(0, 16), empty)])


def test_half_precision_logits() -> None:
    spec, config = RouterSpec(32, 4, "topk_softmax"), XShareConfig(8)
    logits = torch.randn(9, 32).half()
    found = Session(make_model(spec, config, dtype="float16")).run(logits, {})
    for right, output in zip(reference.route(logits, spec, config)[:3], found, strict=True):
        assert torch.equal(right, output)
    model = make_model(spec, config, dtype="bfloat16")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_one_node_with_the_fields_of_the_plugin() -> None:
    spec = RouterSpec(64, 4, "sigmoid_bias", 8, 4, 2.5)
    config = XShareConfig(16, 1, 8, 5, 0.9, 48, "affinity")
    inputs = GraphInputs(True, True, True, True)
    model = make_model(spec, config, inputs)
    (node,) = model.graph.node
    assert (node.domain, node.op_type, list(node.input)) == ("xshare", "XShareRouting", _all_names())
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes.pop("coverage") == np.float32(0.9)
    assert attributes == {
        "plugin_version": b"2",
        "plugin_namespace": b"xshare",
        "num_experts": 64,
        "top_k": 4,
        "scoring": b"sigmoid_bias",
        "utility": b"affinity",
        "budget": 16,
        "num_groups": 8,
        "top_k_groups": 4,
        "routed_scaling_factor": 2.5,
        "warmup": 1,
        "request_budget": 8,
        "gpu_budget": 5,
        "max_rows": 48,
        "has_correction_bias": 1,
        "has_request_ids": 1,
        "has_exempt": 1,
        "has_expert_gpu": 1,
        "has_active_experts": 1,
    }
    (function,) = model.functions
    assert set(function.attribute) == {attribute.name for attribute in node.attribute}
    assert {node.domain for node in function.node} == {""}
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 18), ("xshare", 2)}
    assert not make_model(spec, config, inputs, body=False).functions


def test_the_node_names_the_limits_that_there_are() -> None:
    (node,) = make_model(RouterSpec(64, 4, "softmax"), XShareConfig(coverage=0.97)).graph.node
    limits = {a.name for a in node.attribute} & {"budget", "coverage", "gpu_budget", "request_budget"}
    assert limits == {"coverage"}


def _all_names() -> list[str]:
    return ["router_logits", *GraphInputs(True, True, True, True).names()]


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    (
        (XShareConfig((8, 9)), None, "a graph routes one layer"),
        (XShareConfig(2), None, "budget must be at least top_k=4"),
        (XShareConfig(8, request_budget=3), GraphInputs(), "the graph needs request_ids"),
        (XShareConfig(8, gpu_budget=3), GraphInputs(), "the graph needs expert_gpu"),
        (XShareConfig(8), GraphInputs(correction_bias=True), "correction_bias: softmax scoring has none"),
        (XShareConfig(coverage=1e-6), None, "a graph takes coverages from 1.52587890625e-05 on"),
    ),
)
def test_refused(config: XShareConfig, inputs: GraphInputs | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(RouterSpec(32, 4, "softmax"), config, inputs)


def test_save_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = make_model(RouterSpec(8, 2, "softmax"), XShareConfig(4))
    save_model(path, model)
    whole = path.read_bytes()
    del model.graph.output[:]
    model.graph.node[0].ClearField("output")
    model.graph.node[0].op_type = ""
    with pytest.raises(onnx.checker.ValidationError):
        save_model(path, model)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


ROUTER = ["--experts", "32", "--top-k", "4", "--scoring", "topk_softmax"]


CONFIG_FILE = "xshare.yaml"  # in the test's folder


def export(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["export", *arguments])


def test_export_command(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "router.onnx"
    done = export("--onnx", str(path), *ROUTER, "--budget", "8", "--request-budget", "5", "--exempt")
    assert done.exit_code == 0, done.output
    assert "inputs router_logits, request_ids, exempt" in done.output
    spec, config = RouterSpec(32, 4, "topk_softmax"), XShareConfig(8, request_budget=5)
    logits, optional = batch(spec, 11, 1, GraphInputs(request_ids=True, exempt=True))
    found = Session(onnx.load(path)).run(logits, optional)
    for right, output in zip(reference.route(logits, spec, config, **optional)[:3], found, strict=True):
        assert torch.equal(right, output)


def test_export_by_coverage_for_gpus(tmp_path: Path) -> None:
    path = tmp_path / "router.onnx"
    done = export("--onnx", str(path), *ROUTER, "--coverage", "0.9375", "--expert-gpu")
    assert done.exit_code == 0, done.output
    spec, config = RouterSpec(32, 4, "topk_softmax"), XShareConfig(coverage=0.9375)
    logits, optional = batch(spec, 16, 1, GraphInputs(expert_gpu=True))
    found = Session(onnx.load(path)).run(logits, optional)
    for right, output in zip(reference.route(logits, spec, config, **optional)[:3], found, strict=True):
        assert torch.equal(right, output)


def test_export_from_files(tmp_path: Path) -> None:
    path, hf, budgets = tmp_path / "a.onnx", tmp_path / "config.json", tmp_path / "xshare.yaml"
    hf.write_text(json.dumps({"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4}))
    XShareConfig((8, 10), max_rows=48).to_yaml(budgets)
    done = export("--onnx", str(path), "--hf-config", str(hf), "--config", str(budgets), "--layer", "1")
    assert done.exit_code == 0, done.output
    attributes = {a.name: a for a in onnx.load(path).graph.node[0].attribute}
    assert attributes["budget"].i == 10 and attributes["scoring"].s == b"topk_softmax"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--budget", "8"], "give --experts, --top-k and --scoring, or --hf-config"),
        (ROUTER, "give --coverage, --budget or --gpu-budget, or --config"),
        ([*ROUTER, "--warmup", "2"], "nothing is limited; set coverage"),
        ([*ROUTER, "--coverage", "97"], "coverage must be less than or equal to 1"),
        ([*ROUTER, "--coverage", "0.97", "--utility", "frequency"], "'squared_weight', 'affinity'"),
        ([*ROUTER, "--config", CONFIG_FILE, "--warmup", "2"], "leave --warmup out"),
        ([*ROUTER, "--budget", "3"], "budget must be at least top_k=4"),
        ([*ROUTER, "--budget", "8", "--dtype", "int8"], "dtype='int8'"),
        ([*ROUTER, "--budget", "8", "--num-groups", "2"], "topk_softmax has no expert groups"),
    ),
)
def test_export_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    path, config = tmp_path / "model.onnx", tmp_path / CONFIG_FILE
    XShareConfig(8).to_yaml(config)
    done = export("--onnx", str(path), *(str(config) if a == CONFIG_FILE else a for a in arguments))
    assert done.exit_code != 0 and message in done.output and not path.exists()
