"""Fetch the training text of the shipped model and split it by document.

    python -m xshare_trtllm.evaluation.training.data --out DIR

Downloads the Debian 12 packages of `recipe.yaml` (`apt-get download`, no root needed), checks their
SHA-256, reads the documents, and writes with one `{"domain", "source", "text"}` a line: `DIR/train.jsonl`,
`DIR/held_out.jsonl` (whole documents), and `DIR/held_out_sample.jsonl`: the pieces of held-out documents
that the package ships beside the model.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypedDict

import click
import yaml

RECIPE = Path(__file__).with_name("recipe.yaml")


class Document(TypedDict):
    """One file of one package: its domain, `package:path`, and its text."""

    domain: str
    source: str
    text: str


def load_recipe() -> dict[str, Any]:
    """The parsed `recipe.yaml`."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    return recipe


def fetch(package: dict[str, Any], folder: Path) -> Path:
    """Download one `.deb` into `folder` unless it is there; raises `click.ClickException` on another hash
    than the recipe's."""
    found = sorted(folder.glob(f"{package['name']}_*.deb"))
    if not found:
        wanted = f"{package['name']}={package['version']}"
        result = subprocess.run(["apt-get", "download", wanted], cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            raise click.ClickException(f"apt-get download {wanted} failed: {result.stderr.strip()}")
        found = sorted(folder.glob(f"{package['name']}_*.deb"))
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != package["sha256"]:
        raise click.ClickException(
            f"{found[0].name} has SHA-256 {digest}, the recipe wants {package['sha256']}"
        )
    return found[0]


class _Text(HTMLParser):
    """The visible text of an HTML page, one line per block element."""

    BLOCKS = frozenset(
        [
            "p",
            "div",
            "pre",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "li",
            "dt",
            "dd",
            "tr",
            "table",
            "ul",
            "ol",
            "dl",
            "br",
        ]
    )
    HIDDEN = frozenset(["script", "style", "head", "nav"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def read(path: Path, how: str) -> str:
    """The text of one file; `how` is `plain`, `roff` (gzipped manual page without its comments) or
    `html_text`."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="ignore").replace("\r\n", "\n")
    if how == "roff":
        text = re.sub(r'^[.\']\\".*\n', "", text, flags=re.MULTILINE)
    if how == "html_text":
        parser = _Text()
        parser.feed(text)
        text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip()


def documents(package: dict[str, Any], deb: Path) -> Iterator[Document]:
    """Every document of one package that the recipe names."""
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "-x", str(deb), unpacked], check=True)
        for path in sorted(Path(unpacked).glob(package["files"])):
            if path.is_file() and not path.is_symlink():
                source = f"{package['name']}:{path.relative_to(unpacked)}"
                yield Document(domain=package["domain"], source=source, text=read(path, package["read"]))


def split(recipe: dict[str, Any], found: list[Document]) -> tuple[list[Document], list[Document]]:
    """`(train, held_out)`: duplicates dropped, documents and domains cut to the recipe's sizes, in a fixed
    random order."""
    random.Random(0).shuffle(found)
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    size: dict[str, int] = {}
    for document in found:
        data = document["text"].encode()[: recipe["max_document_bytes"]]
        text = data.decode("utf-8", errors="ignore")
        digest = hashlib.sha256(text[:1024].encode()).hexdigest()
        full = size.get(document["domain"], 0) + len(data) > recipe["max_domain_bytes"]
        if len(data) < 512 or digest in seen or full:
            continue
        seen.add(digest)
        size[document["domain"]] = size.get(document["domain"], 0) + len(data)
        target = held_out if int(digest, 16) % 1000 < recipe["held_out_per_mille"] else train
        target.append(Document(domain=document["domain"], source=document["source"], text=text))
    return train, held_out


def sample(held_out: list[Document], per_domain: int = 16, size: int = 2048) -> list[Document]:
    """One piece of `size` bytes from anywhere in each of `per_domain` documents of each domain, the domains
    in turn."""
    draw = random.Random(0)
    pieces: dict[str, list[Document]] = {}
    for document in held_out:
        data = document["text"].encode()
        part = pieces.setdefault(document["domain"], [])
        if len(data) < size + 512 or len(part) == per_domain:
            continue
        start = data.find(b"\n", draw.randrange(len(data) - size - 256)) + 1
        text = data[start : start + size].decode("utf-8", errors="ignore")
        part.append(Document(domain=document["domain"], source=document["source"], text=text))
    return [
        piece for turn in zip(*(pieces[domain] for domain in sorted(pieces)), strict=True) for piece in turn
    ]


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="folder to write"
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="folder of .deb files (default: OUT/debs)",
)
def main(out: Path, cache: Path | None) -> None:
    """Download and split the training text of the shipped model."""
    recipe = load_recipe()
    cache = cache or out / "debs"
    for folder in (out, cache):
        folder.mkdir(parents=True, exist_ok=True)
    found: list[Document] = []
    for package in recipe["packages"]:
        before = len(found)
        found += documents(package, fetch(package, cache))
        click.echo(f"{package['name']}: {len(found) - before} documents")
    train, held_out = split(recipe, found)
    parts = {"train": train, "held_out": held_out, "held_out_sample": sample(held_out)}
    for name, part in parts.items():
        with (out / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in part)
        sizes: dict[str, int] = {}
        for document in part:
            sizes[document["domain"]] = sizes.get(document["domain"], 0) + len(document["text"].encode())
        click.echo(f"{name}: {len(part)} documents, bytes by domain: {sizes}")


if __name__ == "__main__":
    main()
