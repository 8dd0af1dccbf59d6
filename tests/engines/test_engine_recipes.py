"""engines/*.yaml against the models' public configurations, the GPUs' memory and the reports they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from model_configs import CONFIGS, PARAMETERS, kv_bytes_per_token, weights_gb

from xshare_trtllm.config import RouterSpec
from xshare_trtllm.engines.recipe import USABLE_MEMORY, Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "engines").glob("*.yaml"))
MODELS = (
    *("gpt-oss-120b", "gpt-oss-20b", "Qwen3-30B-A3B", "Qwen3-235B-A22B"),
    *("DeepSeek-R1", "Kimi-K2", "Mixtral-8x7B", "OLMoE"),
)
# Without a file, and why: docs/engines.md.
MISSING = {
    *("gpt-oss-120b.sm_80", "gpt-oss-20b.sm_80", "DeepSeek-R1.sm_80", "Kimi-K2.sm_80"),
    *("OLMoE.sm_80", "OLMoE.sm_90"),
}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(request.param)


def test_every_model_and_generation_has_a_file_or_a_reason() -> None:
    wanted = {f"{model}.{gpu}" for model in MODELS for gpu in ("sm_80", "sm_90")}
    assert {path.stem for path in FILES} == wanted - MISSING
    reasons = (ROOT / "docs" / "engines.md").read_text().split("## Without a recipe")[1].split("## ")[0]
    for name in MISSING:
        assert f"`{name}`" in reasons, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docs_have_the_recipes_numbers(path: Path) -> None:
    recipe = load_recipe(path)
    lines = (ROOT / "docs" / "engines.md").read_text().splitlines()
    [row] = [line for line in lines if line.startswith(f"| `{path.stem}` | ")]
    limit = f"{recipe.config.budget} of {recipe.router.num_experts}"
    if recipe.config.coverage is not None:
        limit = f"coverage {recipe.config.coverage}"
    for cell in (
        f"| {recipe.hardware.gpus} x ",
        f"| {recipe.path} | {recipe.weights} |",
        f"| {recipe.weights_gb_per_gpu:.1f} | {limit}",
    ):
        assert cell in row
    assert recipe.xshare["coverage" if recipe.config.coverage else "budget"].origin in row


def test_router_is_the_models_own(recipe: Recipe) -> None:
    assert recipe.router == RouterSpec.from_hf_config(CONFIGS[recipe.model])


@pytest.mark.parametrize(("model", "billions"), PARAMETERS.items())
def test_configurations_add_up_to_the_published_parameters(model: str, billions: float) -> None:
    assert weights_gb(CONFIGS[model], "bfloat16") / 2 == pytest.approx(billions, rel=0.03)


def test_weights_are_what_the_configuration_adds_up_to(recipe: Recipe) -> None:
    assert recipe.weights_gb == pytest.approx(weights_gb(CONFIGS[recipe.model], recipe.weights), rel=0.003)


def test_weights_and_kv_cache_fit(recipe: Recipe) -> None:
    """Every request at its full length, in 16 bits: the most that the limits allow."""
    limits, tensor = recipe.limits, recipe.parallel.tensor
    tokens = limits.max_batch_size * limits.max_seq_len
    cache = tokens * kv_bytes_per_token(CONFIGS[recipe.model], tensor) / 1e9
    need = recipe.weights_gb_per_gpu + cache
    print(f"{recipe.model}, {recipe.gpu}: {recipe.weights_gb_per_gpu:.1f} + {cache:.1f} GB of cache per GPU")
    assert need < USABLE_MEMORY * recipe.hardware.memory_gb


def test_blocks_of_fp8_weights_are_not_cut(recipe: Recipe) -> None:
    """These checkpoints have a scale per 128 x 128: a slice of an expert must be a multiple of it."""
    config = CONFIGS[recipe.model]
    if recipe.weights != "fp8" or recipe.path == "engine":  # quantised while it is converted
        return
    slices = recipe.parallel.tensor // recipe.parallel.expert
    assert config["moe_intermediate_size"] % (128 * slices) == 0


def test_a_limit_was_measured_on_this_model_or_is_a_coverage(recipe: Recipe) -> None:
    """A number of experts says nothing about another model; a share of what its rows ask for does."""
    budget, coverage = recipe.xshare.get("budget"), recipe.xshare.get("coverage")
    assert (budget is None) != (coverage is None)
    if budget is not None:
        assert budget.origin in ("public report", "own calibration")
    if coverage is not None:
        assert coverage.value == 0.97 and "not this one: calibrate" in coverage.reference


def test_gpu_budgets_are_the_papers(recipe: Recipe) -> None:
    per_gpu = recipe.config.gpu_budget
    if per_gpu is None:
        return
    assert per_gpu == -(-8.6 * recipe.router.num_experts // (32 * recipe.parallel.expert))  # rounded up
    assert per_gpu * recipe.parallel.expert >= (recipe.config.budget or recipe.router.top_k)


def test_origins_say_where_to_look(recipe: Recipe) -> None:
    for name, setting in recipe.xshare.items():
        if setting.origin == "public report":
            assert "https://" in setting.reference, name
        if setting.origin == "paper":
            assert "2602.07265" in setting.reference, name
        if setting.origin == "own calibration":
            assert any(path.name in setting.reference for path in (ROOT / "benchmarks/results").iterdir())


# ---- What the schema refuses ------------------------------------------------------------------------------


def refusal(folder: Path, name: str = "gpt-oss-120b.sm_90", **changes: object) -> str:
    """What is said of a recipe with some fields changed (`a__b` is field b of a; None removes it)."""
    values = yaml.safe_load((ROOT / "engines" / f"{name}.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        part = values
        for parent in parents:
            part = part[parent]
        part.pop(last, None) if value is None else part.update({last: value})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "triton"}, "path='triton': must be 'engine' or 'pytorch'"),
        ({"gpus": 1}, "gpus: is not known"),
        ({"model": None}, "model: is missing"),
        ({"limits__max_batch_size": 0}, "limits.max_batch_size=0: must be greater than or equal to 1"),
        ({"router__top_k": 17}, "router: RouterSpec(top_k=17): top_k must be less than or equal to 16"),
        ({"router__scoring": None}, "router: lacks scoring; known are num_experts, top_k, scoring"),
        ({"router__expert": 3}, "router: unknown key 'expert'; known are"),
        ({"router": 3}, "router=3: must be num_experts, top_k, scoring and the rest of RouterSpec"),
        ({"xshare__budget__value": 3}, "XShareConfig(budget=3): budget must be at least top_k=4"),
        ({"xshare__budget": None}, "XShareConfig: nothing is limited; set coverage"),
        (
            {"xshare__bugdet": {"value": 1, "origin": "paper", "reference": "arXiv 2602"}},
            "XShareConfig: unknown",
        ),
        (
            {"xshare__budget__origin": "guess"},
            "xshare.budget.origin='guess': must be 'paper', 'public report'",
        ),
        ({"xshare__budget__reference": ""}, "xshare.budget.reference='': String should have at least 8"),
        ({"hardware__gpus": 2}, "parallel: tensor x pipeline must be hardware.gpus=2"),
        ({"parallel__expert": 3}, "parallel.expert=3: must divide parallel.tensor=1"),
        (
            {"hardware__memory_gb": 72},
            "weights_gb=65.2: 65.2 GB on each of 1 GPUs, of which 64.8 GB are usable",
        ),
        ({"gpu": "sm_80"}, "weights='mxfp4': sm_80 computes with bfloat16, float16, int8"),
        ({"gpu": "sm_80", "weights": "int8"}, "gpu='sm_80': the file's name must end in .sm_80.yaml"),
        ({"path": "engine"}, "convert: is missing, the engine path needs it"),
        ({"convert": {"script": "examples/a.py"}}, "convert, build: are for path engine"),
        (
            {"xshare__gpu_budget": {"value": 9, "origin": "paper", "reference": "arXiv 2602.07265"}},
            "xshare.gpu_budget: needs parallel.expert above 1",
        ),
    ],
)
def test_refusals_name_file_and_field(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **changes).startswith(message)


def test_an_engine_recipe_has_no_options_of_the_other_path(tmp_path: Path) -> None:
    message = refusal(tmp_path, "Mixtral-8x7B.sm_80", options={"moe_config": {}})
    assert message == "options: are for path pytorch, the engine path has build"
    message = refusal(tmp_path, "Mixtral-8x7B.sm_80", convert__script="/convert.py")
    assert message.startswith("convert.script='/convert.py'")


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.sm_80.yaml"
    for text, message in (("a: [", "not valid YAML: "), ("- 1", "expected keys and values, got list")):
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(f"{path}: {message}")
