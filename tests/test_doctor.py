"""`xshare doctor` as a user runs it: on this machine, and on machines put together from stand-ins.

TensorRT-LLM, NVIDIA's driver and their commands cannot be installed here: the stand-ins of tests/trtllm/
under that name, an nvidia-smi that prints what the real one prints for the same query (contract tests)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xshare_trtllm.doctor import find_image
from xshare_trtllm.engines.environment import PACKAGE
from xshare_trtllm.trtllm.build_command import OUR_IMPORT
from xshare_trtllm.trtllm.startup import HOOK_LINE

ROOT = Path(__file__).resolve().parent.parent
DOCTOR = [sys.executable, "-c", "from xshare_trtllm.cli import main; main()", "doctor"]
QUERY = "--query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader"
INSTALL_HOOK = "xshare trtllm --install"
H100 = "NVIDIA H100 80GB HBM3, 9.0, 580.95.05, 81559 MiB"

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the libraries")


class Machine:
    """A folder with distributions, commands and libraries; `examine` says what the doctor finds there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages, self.commands = folder / "packages", folder / "bin"
        self.packages.mkdir()
        self.commands.mkdir()
        self.environment = {
            "PATH": str(self.commands),
            "PYTHONPATH": f"{self.packages}:{ROOT}",
            "XSHARE_PLUGIN": str(folder / "no-plugin.so"),
            "XSHARE_CUDA_LIBRARY": str(folder / "no-cuda.so"),
        }

    def install(self, name: str, version: str) -> None:
        information = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def trtllm(self, version: str, stand_in: str) -> None:
        self.install("tensorrt-llm", version)
        self.environment["PYTHONPATH"] += f":{ROOT / 'tests' / 'trtllm' / stand_in}"
        (self.packages / "sitecustomize.py").write_text(HOOK_LINE)  # as the line in site-packages

    def command(self, name: str, text: str) -> None:
        path = self.commands / name
        path.write_text(text)
        path.chmod(0o755)

    def gpu(self, line: str) -> None:
        self.command("nvidia-smi", f'#!/bin/sh\n[ "$*" = "{QUERY}" ] || exit 2\necho "{line}"\n')

    def library(self, variable: str, source: str) -> Path:
        """Compiled from C, named by the environment variable."""
        path = self.folder / f"{variable.lower()}.so"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=source, text=True, check=True, timeout=30)
        self.environment[variable] = str(path)
        return path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*DOCTOR, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self.environment,
            cwd=self.folder,
        )

    def examine(self) -> dict[str, dict[str, object]]:
        done = self.run("--json")
        assert not done.stderr, done.stderr
        checks = {check["name"]: check for check in json.loads(done.stdout)}
        runs = any(check["ok"] for check in checks.values() if check["group"] == "path")
        assert done.returncode == (0 if runs else 1)
        for check in checks.values():
            assert bool(check["mend"]) == (not check["ok"]), check
        return checks


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


HEADERS = "0.1.0, TensorRT 10.14.1 headers"
PLUGIN = f'int getCreators; const char* xshare_plugin_build(void) {{ return "{HEADERS}"; }}'
CUDA = 'int xshare_route_cuda, xshare_route_cpu; const char* xshare_version(void) { return "0.1.0"; }'


def test_this_machine_in_under_three_seconds() -> None:
    start = time.monotonic()
    done = subprocess.run(DOCTOR, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("torch", "libnvinfer_plugin_xshare.so", "trtllm-build", "mend it with"):
        assert word in done.stdout
    assert seconds < 3


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from xshare_trtllm.doctor import examine; examine(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert not {"torch", "transformers", "onnx", "numpy"} & set(done.stdout.split())


def test_the_native_library_of_this_checkout(machine: Machine) -> None:
    check = machine.examine()["libxshare.so"]
    if (PACKAGE / "lib" / "libxshare.so").is_file():
        assert check["ok"] and str(check["found"]).endswith("libxshare.so: 0.1.0")
    else:
        assert "compiler" in str(check["mend"])


def test_no_python_packages_at_all(machine: Machine) -> None:
    """Nothing can run, so the exit code is 1: an interpreter that sees no distributions."""
    code = (
        "import importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "from xshare_trtllm.cli import main\nmain(['doctor', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=machine.environment,
    )
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert not any(check["ok"] for check in checks.values() if check["group"] in ("package", "path"))
    assert checks["torch"]["mend"] == "pip install torch"


@needs_compiler
def test_contract_a_machine_where_both_paths_run(machine: Machine) -> None:
    machine.trtllm("1.2.1", "torch_stand_in")
    machine.gpu(H100)
    machine.library("XSHARE_PLUGIN", PLUGIN)
    machine.library("XSHARE_CUDA_LIBRARY", CUDA)
    machine.command("trtllm-build", f"#!/usr/bin/python3\n{OUR_IMPORT}")
    checks = machine.examine()
    assert checks["tensorrt-llm"]["found"] == "1.2.1"
    assert str(checks["libnvinfer_plugin_xshare.so"]["found"]).endswith(HEADERS)
    assert checks["GPU 0"]["found"] == (
        "NVIDIA H100 80GB HBM3, compute capability 9.0, 81559 MiB, driver 580.95.05"
    )
    for name in ("trtllm-build", "trtllm-build --plugin xshare", "trtllm-serve with XShare"):
        assert checks[name]["ok"], checks[name]
    said = {name: (checks[name]["ok"], checks[name]["found"]) for name in checks}
    assert said["executor"] == (True, "tensorrt_llm.executor.executor:GenerationExecutor.create")
    assert said["RenormalizeMoeRoutingMethod"] == (True, "supported")
    assert said["SparseMixerMoeRoutingMethod"][0] is False
    assert said["TritonFusedMoE"][1].startswith("masked logits, for Renormalize and RenormalizeNaive")
    assert said["MarlinFusedMoE"] == (False, "refused: no scheduler of this version calls apply")
    assert said["GptOssForCausalLM"] == (True, "applies: Renormalize")
    assert said["Llama4ForConditionalGeneration"] == (True, "applies: Llama4Renormalize")
    for name in ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "ExaoneMoEForCausalLM"):
        assert said[name] == said["KimiK25ForConditionalGeneration"] == (True, "applies: DeepSeekV3")
    need = ("--need", "trtllm-serve", "--model")
    assert machine.run(*need, "GptOssForCausalLM").returncode == 0
    assert machine.run(*need, "PhiMoEForCausalLM").returncode == 1
    (machine.packages / "sitecustomize.py").unlink()  # an editable installation has no line in site-packages
    checks = machine.examine()
    assert checks["worker processes"]["mend"] == checks["trtllm-serve with XShare"]["mend"] == INSTALL_HOOK
    assert machine.run(*need, "GptOssForCausalLM").returncode == 1


@pytest.mark.parametrize(
    ("capability", "found"),
    [
        ((8, 0), "machine code for 8.0"),
        ((8, 9), "machine code for 8.0"),
        ((8, 7), ""),  # a Jetson takes no desktop's code
        ((9, 0), "machine code for 9.0"),
        ((10, 3), "machine code for 10.0"),
        ((11, 0), "PTX of 9.0, of which the driver makes code at first use"),
        ((12, 1), "machine code for 12.0"),
        ((13, 0), "PTX of 9.0, of which the driver makes code at first use"),
    ],
)
def test_which_image_a_gpu_runs(capability: tuple[int, int], found: str) -> None:
    defaults = re.search(
        r"XSHARE_DEFAULT_ARCHITECTURES (.*)\)", (ROOT / "plugins/cuda/architectures.cmake").read_text()
    )
    assert defaults is not None
    assert find_image(defaults[1].split(), capability) == found
    assert find_image(["90", "90a-real", "native"], (9, 0)) == "machine code for 9.0"
    assert find_image(["90"], (12, 0)).startswith("PTX of 9.0")
    assert find_image(["87-real"], capability) == (
        "machine code for 8.7" if capability in ((8, 7), (8, 9)) else ""
    )


@needs_compiler
def test_contract_a_library_without_code_for_the_gpu(machine: Machine) -> None:
    """The kernels that are compiled serve where no library is named; a plugin has only its own."""
    machine.trtllm("1.2.1", "torch_stand_in")
    machine.gpu(H100)
    machine.library("XSHARE_PLUGIN", PLUGIN.replace(HEADERS, f"{HEADERS}, code for 80-real 120-virtual"))
    built = 'const char* xshare_cuda_architectures(void) { return "80-real"; }'
    machine.library("XSHARE_CUDA_LIBRARY", CUDA + built)
    checks = machine.examine()
    assert str(checks["libxshare_cuda.so"]["found"]).endswith("0.1.0, code for 80-real")
    for library in ("libxshare_cuda.so", "libnvinfer_plugin_xshare.so"):
        image = checks[f"{library} on GPU 0"]
        assert (image["ok"], image["found"]) == (False, "no code for it")
        assert image["mend"] == "build_scripts/build_plugin.sh sm_90"
    engine = checks["trtllm-build --plugin xshare"]
    assert not engine["ok"] and engine["found"] == "libnvinfer_plugin_xshare.so on GPU 0: no code for it"
    if checks["compiled kernels"]["ok"]:
        assert "by NVRTC" in str(checks["compiled kernels"]["found"])
    serve = checks["trtllm-serve with XShare"]  # takes the library that is named
    assert not serve["ok"] and serve["found"] == "libxshare_cuda.so on GPU 0: no code for it"
    del machine.environment["XSHARE_CUDA_LIBRARY"]
    checks = machine.examine()
    if checks["compiled kernels"]["ok"] and checks["libxshare.so"]["ok"]:
        assert checks["trtllm-serve with XShare"]["ok"]


def test_contract_their_own_trtllm_build(machine: Machine) -> None:
    machine.command("trtllm-build", "#!/usr/bin/python3\nfrom tensorrt_llm.commands.build import main\n")
    check = machine.examine()["trtllm-build"]
    assert not check["ok"] and "without --plugin xshare" in str(check["found"])
    assert check["mend"] == "python -m xshare_trtllm.trtllm.build_command --xshare_install"


@needs_compiler
def test_contract_a_version_without_engines(machine: Machine) -> None:
    machine.trtllm("1.3.0rc18", "torch_stand_in_2026")
    machine.gpu(H100)
    machine.library("XSHARE_PLUGIN", PLUGIN)
    machine.library("XSHARE_CUDA_LIBRARY", CUDA)
    checks = machine.examine()
    engine = checks["trtllm-build --plugin xshare"]
    assert not engine["ok"] and engine["found"] == "tensorrt-llm: 1.3.0rc18, needs TensorRT-LLM 1.0 to 1.2"
    assert checks["trtllm-serve with XShare"]["ok"]
    assert "attention.backends" in str(checks["attention metadata"]["found"])
    assert checks["TrtllmTrtllmGenNvfp4Impl"]["found"] == checks["MarlinFusedMoE"]["found"] == "applies"
    assert "computes every expert" in str(checks["DenseGemmNvfp4Impl"]["found"])
    assert "looks tokens up in a table" in str(checks["DeepSeekV4MoeRoutingMethod"]["found"])
    assert machine.run("--need", "trtllm-build").returncode == 1


@needs_compiler
def test_contract_a_version_that_has_moved_things_on(machine: Machine, tmp_path: Path) -> None:
    """Not imported at all, or without a name that XShare takes hold of: nothing would serve, and why."""
    machine.install("tensorrt-llm", "9.9.9")
    machine.gpu(H100)
    machine.library("XSHARE_CUDA_LIBRARY", CUDA)
    package = machine.packages / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    check = machine.examine()["tensorrt_llm, imported"]
    assert not check["ok"] and str(check["found"]).startswith(
        "has no model engine, attention metadata, model"
    )
    (package / "__init__.py").write_text("import libcuda_is_not_here")
    checks = machine.examine()
    found = "does not import: ModuleNotFoundError: No module named 'libcuda_is_not_here'"
    assert checks["tensorrt_llm, imported"]["found"] == found
    assert not checks["trtllm-serve with XShare"]["ok"]
    assert machine.run("--need", "trtllm-serve").returncode == 1


def test_contract_an_old_gpu_and_a_driver_that_fails(machine: Machine) -> None:
    machine.gpu("Tesla T4, 7.5, 580.95.05, 15360 MiB")
    check = machine.examine()["GPU 0"]
    assert not check["ok"] and "8.0 or newer" in str(check["mend"])
    machine.command("nvidia-smi", "#!/bin/sh\necho couldn\\'t communicate with the NVIDIA driver\nexit 9\n")
    check = machine.examine()["GPU"]
    assert not check["ok"] and "couldn't communicate" in str(check["found"])


@needs_compiler
def test_a_library_that_crashes_is_a_no(machine: Machine) -> None:
    source = "#include <stdlib.h>\n__attribute__((constructor)) void start(void) { abort(); }\n"
    machine.library("XSHARE_PLUGIN", source)
    check = machine.examine()["libnvinfer_plugin_xshare.so"]
    assert not check["ok"] and "does not load: exit code -6" in str(check["found"])


@needs_compiler
def test_other_libraries_are_a_no(machine: Machine) -> None:
    machine.library("XSHARE_PLUGIN", "int something_else;")
    text = machine.folder / "text.so"
    text.write_text("no library")
    machine.environment["XSHARE_CUDA_LIBRARY"] = str(text)
    checks = machine.examine()
    assert "loads, but is another library" in str(checks["libnvinfer_plugin_xshare.so"]["found"])
    assert "does not load: OSError" in str(checks["libxshare_cuda.so"]["found"])
    assert checks["libxshare_cuda.so"]["mend"] == "build_scripts/build_plugin.sh"
    machine.environment["XSHARE_PLUGIN"] = "/nowhere/plugin.so"
    assert machine.examine()["libnvinfer_plugin_xshare.so"]["found"] == "no file /nowhere/plugin.so"


@needs_compiler
def test_a_plugin_that_does_not_say_its_headers(machine: Machine) -> None:
    machine.library("XSHARE_PLUGIN", "int getCreators;")
    check = machine.examine()["libnvinfer_plugin_xshare.so"]
    assert check["ok"] and "does not say with which TensorRT headers" in str(check["found"])


def test_a_bare_environment_will_do(machine: Machine) -> None:
    """As in a service: no HOME, no terminal."""
    assert "HOME" not in machine.environment
    done = machine.run()
    assert "mend it with" in done.stdout and not done.stderr
