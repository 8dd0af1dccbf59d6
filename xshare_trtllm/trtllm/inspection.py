"""What an installed TensorRT-LLM is to XShare, from importing it: no model, no GPU.

`xshare doctor` runs this module in a process of its own; `xshare trtllm` asks `check_names` before it serves.
What it says of classes is what `enable` says of a loaded model's (torch_support.py). Model files are read,
not imported, since main imports a model when its architecture is looked up.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from xshare_trtllm.trtllm.torch_support import RENORMALIZING, backend_kind, method_problem

# What the hook takes hold of, `module:attribute`, the newest home first.
NAMES = {
    "model engine": ("tensorrt_llm._torch.pyexecutor.model_engine:PyTorchModelEngine.__init__",),
    "attention metadata": (
        "tensorrt_llm._torch.attention.backends.interface:AttentionMetadata.prepare",
        "tensorrt_llm._torch.attention_backend.interface:AttentionMetadata.prepare",
    ),
    "model call": ("tensorrt_llm._torch.utils:get_model_extra_attrs",),
    "executor": ("tensorrt_llm.executor.executor:GenerationExecutor.create",),
    "routing methods": (
        "tensorrt_llm._torch.moe.fused_moe.routing:BaseMoeRoutingMethod.apply",
        "tensorrt_llm._torch.modules.fused_moe.routing:BaseMoeRoutingMethod.apply",
    ),
    "logger": ("tensorrt_llm.logger:logger.info",),
}
_FUSED_MOE = ("tensorrt_llm._torch.moe.fused_moe", "tensorrt_llm._torch.modules.fused_moe")
_NO_BACKENDS = ("MoE", "MoEImplBase", "ConfigurableMoE")
# Gates of a model file that other model files take over, by the method that they route with.
_GATES = {"DeepseekV3Gate": "DeepSeekV3MoeRoutingMethod", "DeepseekV4Gate": "DeepSeekV4MoeRoutingMethod"}


@dataclass(frozen=True)
class Finding:
    """One line. group: `name`, `routing method`, `MoE back end` or `model`."""

    group: str
    name: str
    ok: bool
    found: str


def inspect() -> list[Finding]:
    """Everything, of the TensorRT-LLM of this Python environment. Raises ImportError where it cannot be
    imported."""
    import_module("tensorrt_llm")
    names = list(_names())
    package = _first(_FUSED_MOE)
    if package is None:
        return names
    return [*names, *_methods(package), *_backends(package), *_models()]


def check_names() -> None:
    """Raises RuntimeError where this version lacks something that XShare takes hold of, by name."""
    missing = [f"{finding.name} ({finding.found})" for finding in _names() if not finding.ok]
    if missing:
        raise RuntimeError(
            f"XShare does not know this version of TensorRT-LLM: it has no {'; no '.join(missing)}"
        )


def _names() -> Iterator[Finding]:
    for name, homes in NAMES.items():
        found = next((home for home in homes if _has(home)), None)
        yield Finding("name", name, found is not None, found or f"not in {', '.join(homes)}")


def _has(home: str) -> bool:
    module, _, path = home.partition(":")
    try:
        value: Any = import_module(module)
    except ModuleNotFoundError:
        return False
    for part in path.split("."):
        value = getattr(value, part, None)
    return value is not None


def _first(names: tuple[str, ...]) -> ModuleType | None:
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return None


def _family(base: type) -> list[type]:
    """The classes that derive from `base`, each once."""
    family: list[Any] = [base]
    for member in family:
        family += [child for child in member.__subclasses__() if child not in family]
    return family[1:]


def _methods(package: ModuleType) -> Iterator[Finding]:
    base = import_module(f"{package.__name__}.routing").BaseMoeRoutingMethod
    for name in sorted({cls.__name__ for cls in _family(base)}):
        problem = method_problem(name)
        reason = problem.partition(": ")[2].partition("; supported")[0] if problem else "supported"
        yield Finding("routing method", name, problem is None, reason)


def _backends(package: ModuleType) -> Iterator[Finding]:
    roots = [getattr(package, name, None) for name in ("MoE", "MoEImplBase", "VanillaMoE")]
    classes = {cls for root in roots if root is not None for cls in [root, *_family(root)]}
    routing = import_module(f"{package.__name__}.routing").BaseMoeRoutingMethod
    is_scheduled = hasattr(package, "ConfigurableMoE") and hasattr(routing, "requires_separated_routing")
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        if cls.__name__ not in _NO_BACKENDS and not (cls.__name__.endswith("Base") and cls.__subclasses__()):
            yield _backend(cls, is_scheduled)


def _backend(cls: type, is_scheduled: bool) -> Finding:
    try:
        kind = backend_kind(cls)
    except ValueError as error:
        return Finding("MoE back end", cls.__name__, False, str(error).partition("not supported, ")[2])
    methods = " and ".join(name.removesuffix("MoeRoutingMethod") for name in RENORMALIZING)
    masked = f"masked logits, for {methods}; other methods refused"
    if kind == "applies" or (kind != "triton" and is_scheduled):
        return Finding("MoE back end", cls.__name__, True, "applies")
    if kind == "scheduled":
        return Finding(
            "MoE back end", cls.__name__, False, "refused: no scheduler of this version calls apply"
        )
    return Finding("MoE back end", cls.__name__, True, masked)


# ---- Models ------------------------------------------------------------------------------------------------


def _models() -> Iterator[Finding]:
    folder = Path(str(import_module("tensorrt_llm").__path__[0]), "_torch", "models")
    paths = sorted(folder.rglob("modeling_*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    own: dict[str, set[str]] = {}
    for tree in trees:
        for block in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            own.setdefault(block.name, set()).update(_methods_named(block))
        for model, _ in _architectures(tree):
            own.setdefault(model, set()).update(_methods_named(tree))
    for tree in trees:
        # A model may be another's (Qwen3.5), behind a vision tower (Kimi-K2.5), or have its block (K-EXAONE).
        taken_over = [own[name] for name in _imported(tree) if name in own]
        methods = sorted(_methods_named(tree).union(*taken_over))
        for _, architecture in _architectures(tree):
            if methods:
                yield _model(architecture, methods)


def _architectures(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Classes of a model file, and the architectures that they are registered for."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "register_auto_model":
                continue
            names = (name for name in call.args[:1] if isinstance(name, ast.Constant))
            yield from ((node.name, str(name.value)) for name in names)


def _imported(tree: ast.AST) -> set[str]:
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


def _methods_named(tree: ast.Module | ast.ClassDef) -> set[str]:
    """Routing methods that a model file or a class names, or takes over with another's gate."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    taken_over = {_GATES[name] for name in names | _imported(tree) if name in _GATES}
    base = {"BaseMoeRoutingMethod"}  # of any method
    return {name for name in names if name.endswith("MoeRoutingMethod")} - base | taken_over


def _model(architecture: str, methods: list[str]) -> Finding:
    supported = [name.removesuffix("MoeRoutingMethod") for name in methods if method_problem(name) is None]
    refused = [problem.partition("; supported")[0] for name in methods if (problem := method_problem(name))]
    words = [*([f"applies: {', '.join(supported)}"] if supported else []), *refused]
    return Finding("model", architecture, bool(supported), "; ".join(words))


def main() -> None:
    print(json.dumps([asdict(finding) for finding in inspect()]), file=sys.stdout)


if __name__ == "__main__":
    main()
