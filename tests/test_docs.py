"""The documentation: commands run, or name what exists; links resolve; numbers are the measured ones.

A fenced `sh` or `python` block is run. Where its first line is `# needs: ...` or `# takes: ...` it is not,
and its commands are checked as all others are, in indented lines, in other fences and in `code spans`: the
script, module, subcommand, option, make target, extra or file that a command names has to exist.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from xshare_trtllm import RouterSpec, XShareConfig, route
from xshare_trtllm.cli import main
from xshare_trtllm.trtllm import build_command

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "build_scripts", "docs", "engines", "plugins", "tests", "xshare_trtllm")
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "plugins/tensorrt/README.md",
    ROOT / "benchmarks/runtime_cpp/README.md",
]
MARK = re.compile(r"# (needs|takes): \S")
PLACEHOLDER = re.compile(r"\b(?!README\b)[A-Z]{3,}\b|[<{]")  # PATH, RECIPE, <model>
SECONDS = 60
OTHERS_FILES = {"docs/cli.md"}  # of perf_analyzer, named in benchmarks/runtime_cpp/README.md

# Unmarked Python that nothing here can run: (page, a piece of it): why. Its imports are checked.
NOT_RUN = {
    ("docs/serve.md", "start_http_server"): "needs an engine that serves, and opens a port",
    ("docs/pytorch_backend.md", "enable(llm"): "needs a model of TensorRT-LLM",
    ("docs/pytorch_backend.md", "LLM(model)"): "needs TensorRT-LLM",
}
# Programs of others, whose options are theirs.
EXTERNAL = {
    ".",
    "cd",
    "curl",
    "docker",
    "echo",
    "export",
    "git",
    "hf",
    "mpirun",
    "nvidia-smi",
    "perf_analyzer",
}
EXTERNAL |= {"tensorrt-edgellm-export", "llm_build", "llm_bench", "llm_inference"}
EXTERNAL |= {"tritonserver", "trtllm-bench", "trtllm-serve", "trtllm-llmapi-launch", "gptManagerBenchmark"}
BENCH = "xshare_bench"


@dataclass(frozen=True)
class Block:
    """A fenced block, with its language, or a line of indented code (`indented`)."""

    page: str
    line: int
    language: str
    text: str

    @property
    def is_marked(self) -> bool:
        return bool(MARK.match(self.text))

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def parse(page: str, text: str) -> tuple[list[Block], list[tuple[int, str]]]:
    """The blocks of a page, and its other lines, which are prose."""
    blocks, prose = [], []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            body = []
            for _, inner in lines:
                if inner.startswith("```"):
                    break
                body.append(inner)
            blocks.append(Block(page, number + 1, line[3:].strip(), "\n".join(body)))
        elif line.startswith("    "):
            blocks.append(Block(page, number, "indented", line))
        else:
            prose.append((number, line))
    return blocks, prose


PARSED = {str(page.relative_to(ROOT)): parse(str(page.relative_to(ROOT)), page.read_text()) for page in PAGES}
BLOCKS = [block for blocks, _ in PARSED.values() for block in blocks]


def python_not_run(block: Block) -> str | None:
    """Why a block of Python is not run, or None."""
    if block.is_marked:
        return block.text.splitlines()[0]
    return next(
        (why for (page, part), why in NOT_RUN.items() if page == block.page and part in block.text), None
    )


# ---- What a command names ----------------------------------------------------------------------------------


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell text; [this|that] in a synopsis is left out."""
    for line in re.sub(r"\[[^\]\n]*\|[^\]\n]*\]", "", text.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set(";&|"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def named_commands() -> Iterator[tuple[str, list[str]]]:
    """All commands of all pages: where, and the words. What is no command there is left out."""
    for block in BLOCKS:
        if block.language == "sh":
            yield from ((str(block), words) for words in simple_commands(block.text))
        elif block.language in ("", "indented"):
            for line in block.text.splitlines():
                if is_command(line):
                    yield from ((str(block), words) for words in simple_commands(line))
    for page, (_, prose) in PARSED.items():
        for number, line in prose:
            for span in re.findall(r"`([^`]+)`", line):
                if " " in span and is_command(span):
                    yield from ((f"{page}:{number}", words) for words in simple_commands(span))


def is_command(line: str) -> bool:
    first = re.sub(r"^(\s*\w+=\S*\s+)+", "", line).split()[:1]
    return bool(first) and (first[0] in CHECKS or first[0] in EXTERNAL or first[0].endswith((".sh", BENCH)))


def problems(words: list[str]) -> list[str]:
    """What of a command does not exist."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return []
    program, arguments = words[0], words[1:]
    found = [f"no file {word}" for word in words if is_missing(word)]
    if program.endswith(".sh"):
        found += shell_script([program, *arguments])
    elif program in CHECKS:
        found += CHECKS[program](arguments)
    elif program.endswith(BENCH):
        found += unknown_options(arguments, ROOT / "benchmarks/runtime_cpp/options.cpp")
    elif program not in EXTERNAL:
        found.append(f"no program {program}")
    return found


def is_missing(word: str) -> bool:
    """A path in the repository that is not there. Results and built libraries are there or not."""
    if word.split("/")[0] not in FOLDERS or "/" not in word or PLACEHOLDER.search(word):
        return False
    if word in OTHERS_FILES or word.startswith(("benchmarks/results/", "xshare_trtllm/lib/")):
        return False
    return not any(ROOT.glob(word.split("::")[0].rstrip("/")))


def options(arguments: list[str]) -> list[str]:
    return [word.split("=")[0] for word in arguments if re.match(r"--[a-z]", word)]


def unknown_options(arguments: list[str], script: Path) -> list[str]:
    """The options that the source of a script does not name in quotes."""
    source = script.read_text()
    return [
        f"{script.name} has no {option}"
        for option in options(arguments)
        if option != "--help" and not re.search(rf'["/]{option}(?![\w-])', source)
    ]


@cache
def help_of(command: str) -> str:
    result = CliRunner().invoke(main, [command, "--help"], env={"COLUMNS": "200"})
    return result.output if result.exit_code == 0 else ""


def xshare(arguments: list[str]) -> list[str]:
    if not arguments or arguments[0].startswith("-"):
        return []
    text = help_of(arguments[0])
    if not text:
        return [f"xshare has no command {arguments[0]}"]
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    return [f"xshare {arguments[0]} has no {option}" for option in options(arguments) if option not in known]


def python(arguments: list[str]) -> list[str]:
    if not arguments or PLACEHOLDER.search(arguments[-1] if arguments[0] == "-m" else arguments[0]):
        return []
    if arguments[0] == "-c":
        compile(arguments[1], "python -c", "exec")
        return []
    if arguments[0] != "-m":
        script = ROOT / arguments[0]
        return unknown_options(arguments[1:], script) if script.is_file() else [f"no file {arguments[0]}"]
    module, rest = arguments[1], arguments[2:]
    if module in CHECKS:
        return CHECKS[module](rest)
    if not module.startswith("xshare_trtllm"):
        return []
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return [f"no module {module}"]
    return unknown_options(rest, Path(spec.origin))


def shell_script(arguments: list[str]) -> list[str]:
    script = ROOT / arguments[0]
    if PLACEHOLDER.search(arguments[0]) or arguments[0].endswith(
        "launch.sh"
    ):  # `xshare triton` writes that one
        return []
    if not script.is_file():
        return [] if "/" not in arguments[0] else [f"no file {arguments[0]}"]
    text = script.read_text() + (help_of("build") if script.name == "build_engine.sh" else "")
    return [f"{script.name} has no {o}" for o in options(arguments) if not re.search(rf"{o}(?![\w-])", text)]


def make(arguments: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text()
    found = []
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{re.escape(name)}:"
        if not re.search(pattern, text, re.MULTILINE):
            found.append(f"Makefile has no {name}")
    return found


def pip(arguments: list[str]) -> list[str]:
    asked = [re.fullmatch(r"(?:\.|xshare-trtllm)\[([\w,]+)\]", word) for word in arguments]
    extras = [extra for match in asked if match for extra in match[1].split(",")]
    return [f"pyproject.toml has no extra {extra}" for extra in extras if extra not in known_extras()]


def known_extras() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0]
    return re.findall(r"^(\w+) = \[", section, re.MULTILINE)


def cmake(arguments: list[str]) -> list[str]:
    files = [*ROOT.glob("plugins/**/CMakeLists.txt"), *ROOT.glob("plugins/**/*.cmake")]
    text = "".join(path.read_text() for path in files)
    names = re.findall(r"-D(XSHARE_\w+)", " ".join(arguments))
    if "--target" in arguments:
        names.append(arguments[arguments.index("--target") + 1])
    return [f"CMake knows no {name}" for name in names if name not in text]


def trtllm_build(arguments: list[str]) -> list[str]:
    known = {option for action in build_command._options()._actions for option in action.option_strings}
    ours = [option for option in options(arguments) if option.startswith("--xshare") or option == "--plugin"]
    return [f"trtllm-build has no {option}" for option in ours if option not in known]


CHECKS: dict[str, Callable[[list[str]], list[str]]] = {
    "xshare": xshare,
    "python": python,
    "python3": python,
    "bash": lambda arguments: shell_script(arguments) if arguments else [],
    "make": make,
    "pip": pip,
    "cmake": cmake,
    "pytest": lambda arguments: [],  # its paths are checked as everybody's
    "trtllm-build": trtllm_build,
    "xshare-trtllm-build": trtllm_build,
}


def test_what_commands_name_exists() -> None:
    commands = [(where, words) for where, words in named_commands() if words]
    wrong = [f"{where}: {problem}" for where, words in commands for problem in problems(words)]
    assert not wrong, "\n".join(wrong)
    assert len(commands) > 100  # the pages are found, and read


def test_paths_in_prose_exist() -> None:
    spans = {
        f"{page}:{number}": span
        for page, (_, prose) in PARSED.items()
        for number, line in prose
        for span in re.findall(r"`([^`\s]+)`", line)
    }
    wrong = [f"{where}: no file {span}" for where, span in spans.items() if is_missing(span)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "xshare prophesy",
        "xshare predict --models x",
        "python benchmarks/none.py",
        "python benchmarks/overlap.py --fast",
        "python -m xshare_trtllm.none",
        "build_scripts/build_plugin.sh --everything",
        "build_scripts/none.sh",
        "make tea",
        "pip install -e '.[tea]'",
        "cmake -S plugins -DXSHARE_TEA=ON",
        "pytest tests/test_none.py",
        "trtllm-build --plugin xshare --xshare_budgets 3",
        "xshare_bench --tea",
        "tea --help",
    ],
)
def test_the_check_finds_what_does_not_exist(command: str) -> None:
    [words] = simple_commands(command)
    assert problems(words)


# ---- Blocks that run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, to run in; what a command writes stays there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*FOLDERS, "Makefile", "README.md", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@cache
def shell(text: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a block; one run for equal blocks."""
    commands = list(simple_commands(text))
    if all(
        words[:2] == ["xshare", "predict"] for words in commands
    ):  # spares the import of torch, the most of it
        results = [CliRunner().invoke(main, words[1:]) for words in commands]
        return max(result.exit_code for result in results), "".join(result.output for result in results)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh" and not b.is_marked], ids=str)
def test_shell_block_runs(block: Block, checkout: Path) -> None:
    code, output = shell(block.text, checkout)
    assert code == 0, f"{block}\n{output}"


@cache
def given_names() -> dict[str, Any]:
    """What the README's own example takes for granted."""
    pytest.importorskip("transformers", reason="needs: pip install -e '.[demo]'")
    from xshare_trtllm.evaluation import load_model

    model, tokenizer = load_model()
    inputs = tokenizer(["The history of the"] * 2, return_tensors="pt") | {"max_new_tokens": 4}
    return {"model": model, "inputs": inputs, "router_logits": torch.randn(16, 64)}


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", [b for b in PYTHON if python_not_run(b) is None], ids=str)
def test_python_block_runs(
    block: Block, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "evaluation" in block.text:
        pytest.importorskip("transformers", reason="needs: pip install -e '.[demo]'")
    monkeypatch.chdir(checkout)
    names = dict(given_names()) if block.page == "README.md" else {}
    exec(compile(block.text, str(block), "exec"), names | {"__name__": "__main__"})
    assert capsys.readouterr().out or "print(" not in block.text


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_imports_what_exists(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xshare_trtllm"):
            spec = find_spec(str(node.module))
            assert spec is not None and spec.origin is not None, f"{block}: no module {node.module}"
            source = Path(spec.origin).read_text()
            for alias in node.names:
                assert re.search(rf"\b{alias.name}\b", source), f"{block}: no {alias.name} in {node.module}"


def test_what_is_not_run_is_there() -> None:
    for page, part in NOT_RUN:
        assert any(block.page == page and part in block.text for block in PYTHON), f"{page}: no {part}"


def test_every_block_says_what_it_is() -> None:
    """Nothing is passed over because of its language; indented code is for command lines and plain text."""
    assert {block.language for block in BLOCKS} <= {"sh", "python", "yaml", "text", "indented", ""}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_block_is_a_configuration(block: Block) -> None:
    XShareConfig.from_yaml(block.text + "\n")


# ---- Links and lists ---------------------------------------------------------------------------------------


def markdown_files() -> list[Path]:
    return [
        path
        for path in [ROOT / "README.md", *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))]
        if "build" not in path.relative_to(ROOT).parts
    ]


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_resolve() -> None:
    wrong, count = [], 0
    for page in markdown_files():
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", target):
                continue
            count += 1
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target} is not there")
            elif anchor and anchor not in anchors(file.read_text()):
                wrong.append(f"{page.relative_to(ROOT)}: {name} has no heading #{anchor}")
    assert not wrong, "\n".join(wrong)
    assert count > 30


def test_every_page_is_in_the_order() -> None:
    order = (ROOT / "docs/README.md").read_text()
    missing = [
        p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in order
    ]
    assert not missing


def test_every_benchmark_is_listed() -> None:
    text = (ROOT / "docs/measure.md").read_text()
    files = [p.name for p in (ROOT / "benchmarks").iterdir() if p.name not in ("results", "__pycache__")]
    missing = [name for name in files if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)]
    assert not missing and len(files) > 10


def test_every_extra_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(known_extras())


def test_messages_are_the_projects_own() -> None:
    """The first column of troubleshooting.md, up to what others say."""
    text = (ROOT / "docs/troubleshooting.md").read_text().split("\nFrom TensorRT-LLM", 1)[0]
    sources = [
        p for f in FOLDERS for kind in ("*.py", "*.sh", "*.cmake", "*.h") for p in (ROOT / f).rglob(kind)
    ]
    sources = [path for path in sources if "tests" not in path.relative_to(ROOT).parts] + [ROOT / "setup.py"]
    code = "\n".join(path.read_text() for path in sources)
    code = re.sub(r'"\s*(\\\s*)?f?"', "", code)  # pieces of one message
    messages = re.findall(r"^\| `(.+?)`[^|]*\|", text, re.MULTILINE)
    pieces = [piece for message in messages for piece in re.split(r"\s*\.\.\.\s*", message) if len(piece) > 3]
    wrong = [piece for piece in pieces if piece not in code]
    assert not wrong, "\n".join(wrong)
    assert len(messages) > 20


# ---- Numbers -----------------------------------------------------------------------------------------------


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, without the line under the heading."""
    found: list[list[list[str]]] = [[]]
    for line in (ROOT / page).read_text().splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not line.startswith("| ---"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in found if table]


def test_the_step_by_hand_is_what_route_computes() -> None:
    given, worth, result = tables("docs/how_it_works.md")
    rows = given[1:]
    affinity = torch.tensor([[float(cell) for cell in row[1:-1]] for row in rows])
    assert (affinity.sum(1) == 100).all()
    spec, logits = RouterSpec(8, 2, "softmax_renorm"), (affinity / 100).log()

    own = route(logits, spec, XShareConfig.off(spec))
    assert [", ".join(map(str, ids)) for ids in own.expert_ids.tolist()] == [row[-1] for row in rows]
    squares = torch.zeros(4, 8).scatter_(1, own.expert_ids.long(), own.expert_weights**2)
    sums = squares.sum(0)
    for row, right in zip(worth[1:], [*squares, sums], strict=True):
        assert [float(cell) for cell in row[1:]] == (1000 * right).round().tolist()

    shared = route(logits, spec, XShareConfig(coverage=0.7, warmup=1))
    text = (ROOT / "docs/how_it_works.md").read_text().replace(" %", "%")

    def says_what_is_kept(experts: list[int]) -> bool:
        points = (1000 * sums).round()
        kept, total = points[experts].sum(), points.sum()
        share = f"It keeps {kept:.0f} of {total:.0f}, {sums[experts].sum() / sums.sum():.1%}"
        return f"The set is {', '.join(map(str, experts))}. {share}" in text

    warm = sorted(set(own.expert_ids[:, 0].tolist()))
    active = shared.active_experts.nonzero().flatten().tolist()
    [added] = set(active) - set(warm)
    assert says_what_is_kept(warm) and says_what_is_kept(active)
    assert f"largest sum joins: {added}, with {1000 * sums[added]:.0f}." in text
    before, after = shared.stats.experts_before, shared.stats.experts_after
    assert f"reads {before} experts" in text and f"{after} experts are read instead of {before}" in text
    for row, ids, weights in zip(
        result[1:], shared.expert_ids.tolist(), shared.expert_weights.tolist(), strict=True
    ):
        assert row[1:] == [", ".join(map(str, ids)), ", ".join(f"{weight:.3f}" for weight in weights)]
    paper = route(logits, spec, XShareConfig(3, utility="affinity")).active_experts.nonzero().flatten()
    assert f"would have taken {sorted(set(paper.tolist()) - set(warm))[0]}, which nobody" in text


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_the_coverage_table_is_what_was_measured() -> None:
    table = next(table for table in tables("docs/budget.md") if "batch 4" in table[0][1])
    rows = results("coverage.json")["models"]["xshare-moe-14m"]
    measured = {(row["setting"], row["batch"]): row for row in rows}

    def percent(value: float, digits: int) -> str:
        return f"{100 * value:+.{digits}f} %"

    for setting, *cells in table[1:]:
        for batch, cell in zip((4, 8, 16, 32), cells, strict=True):
            row = measured[setting, batch]
            change = row["change"]
            saved, bits, accuracy = cell.split(" / ")
            if row["active"] == row["own"]:
                assert cell == "0 / 0 / 0" and abs(change["bits_per_byte"]) < 1e-6
                continue
            assert saved == percent(row["active"] / row["own"] - 1, 1)
            assert (bits, accuracy) == (percent(change["bits_per_byte"], 2), percent(change["accuracy"], 2))
