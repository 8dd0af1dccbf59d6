"""The folder of compiled kernels: kept, mended, shared by processes, and not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xshare_trtllm.kernels import store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XSHARE_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def never() -> bytes:
    raise AssertionError("made again")


def test_what_is_made_is_kept(folder: Path) -> None:
    assert store.get_or_make("a.cubin", lambda: b"code") == b"code"
    assert store.get_or_make("a.cubin", never) == b"code"
    assert [path.name for path in folder.iterdir()] == ["a.cubin"]


@pytest.mark.parametrize("damage", ("empty", "half", "other"))
def test_a_damaged_file_is_made_again(folder: Path, damage: str) -> None:
    store.get_or_make("a.cubin", lambda: b"code" * 100)
    path = folder / "a.cubin"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "other": whole[:-1] + b"?"}[damage])
    assert store.get_or_make("a.cubin", lambda: b"new") == b"new"
    assert store.get_or_make("a.cubin", never) == b"new"


def test_where_nothing_can_be_kept_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XSHARE_CACHE", str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="Name a folder in XSHARE_CACHE"):
        assert store.get_or_make("a.cubin", lambda: b"code") == b"code"


def test_a_full_disk_leaves_no_half_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert store.get_or_make("a.cubin", lambda: b"code") == b"code"
    assert not list(folder.iterdir())


def test_two_processes_at_once(folder: Path) -> None:
    code = (
        "import runpy, sys, time; get_or_make = runpy.run_path(sys.argv[1])['get_or_make']\n"
        "made = lambda: (time.sleep(0.2), b'code' * 100000)[1]\n"
        "assert get_or_make('a.cubin', made) == made()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, store.__file__]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert store.get_or_make("a.cubin", never) == b"code" * 100000
    assert [path.name for path in folder.iterdir()] == ["a.cubin"]


def test_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XSHARE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert store.folder() == Path("/somewhere/xshare-trtllm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.folder() == Path.home() / ".cache" / "xshare-trtllm"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert store.folder().name == f"xshare-trtllm-{os.getuid()}"
