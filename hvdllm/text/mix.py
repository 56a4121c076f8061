"""Several texts with one tokenizer, of which none trains on a document that another holds out.

`data_dir` has a folder for the mixture, with its tokenizer and the hashes of all documents that are held out. Each
source then is a prepared text of its own (shards.py). Of sources that are tokens already (tokens.py) the documents are
not compared with those of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import and_
from pathlib import Path

import numpy as np

from hvdllm import registry
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text import shards
from hvdllm.text.corpus import documents, hash_of
from hvdllm.text.kept import keep, kept
from hvdllm.text.parts import Mix, Text
from hvdllm.text.shards import Corpus
from hvdllm.text.tokenize import train_bpe

APART = "apart.bin"  # the hashes of held-out documents, uint64 in ascending order
TOKENIZER = "tokenizer.json"
KNOWN = "mix.json"  # what the user named as text.sources, and the data hash of each
LARGEST = 2**20  # bytes of it


def prepare(text: Mix, data_dir: Path, *, say: Callable[[str], None], whole: bool = True) -> dict[str, Corpus]:
    """Opens the sources that are text, by name; prepares them first if they are missing.

    The arguments, and what is raised, are those of shards.prepare.
    """
    sources = {name: each for name, each in text.parts.items() if not each.ready}
    if not sources:
        return {}
    if text.prepared is not None:
        if (found := find(data_dir, text.prepared)) is None or found[1].keys() != sources.keys():
            raise UserError(f"text.prepared={text.prepared}: no mixture in {data_dir} has this data hash")
        return {
            name: shards.prepare(replace(each, prepared=found[1][name]), data_dir, say=say, whole=whole)
            for name, each in sources.items()
        }
    recipe: Json = {"mix": {}}
    for name, each in sources.items():
        with _named(name):
            recipe["mix"][name] = shards.recipe_of(each)
    folder = shards.once(data_dir, shards.key_of(recipe), lambda part: _build(text, sources, part, say), "mixture", say)
    apart = frozenset(np.fromfile(folder / APART, np.uint64).tolist())
    tokenizer = str(folder / TOKENIZER) if text.tokenizer == "bpe" else text.tokenizer
    corpora: dict[str, Corpus] = {}
    for name, each in sources.items():
        with _named(name):
            one = replace(each, tokenizer=tokenizer)
            corpora[name] = shards.prepare(one, data_dir, say=say, whole=whole, apart=apart)
    if not (folder / KNOWN).exists():
        hashes = {name: corpus.data_hash for name, corpus in corpora.items()}
        keep(folder / KNOWN, json.dumps({"sources": text.sources, "hashes": hashes}).encode())
    return corpora


def _build(text: Mix, sources: Mapping[str, Text], part: Path, say: Callable[[str], None]) -> None:
    """Makes the folder of a mixture. Each text is read once, and once more where a BPE is trained."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(0o700)
    apart = {hash_of(each.text) for source in sources.values() for each in documents(source) if each.held_out}
    np.array(sorted(apart), np.uint64).tofile(part / APART)
    if text.tokenizer == "bpe":
        train_bpe(shards.spoken([*sources.values()], say, frozenset(apart)), text.vocab).save(part / TOKENIZER)
    shards.seal(part, reduce(and_, map(shards.mode_of, sources.values())))


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Names the source in what a UserError says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"text.sources.{source}: {error}") from None


def files(text: Mix) -> list[Path]:
    """The files of all sources, in order and each once."""
    if not text.parts:
        raise UserError("text=mix reads the files that text.sources names: give {NAME: PATH, ...}")
    found = [path for each in text.parts.values() for path in registry.built(registry.of("text", each))(each)]
    return list(dict.fromkeys(found))


def data_hash(hashes: Mapping[str, str]) -> str:
    """The hash of a mixture, from those of its sources by name, in order."""
    return hashlib.sha256(json.dumps(list(hashes.items())).encode()).hexdigest()


def find(data_dir: Path, wanted: str | None) -> tuple[Json, dict[str, str]] | None:
    """What the user named as text.sources of a mixture with this data hash, and the hash of each; None if none has."""
    for file in sorted(data_dir.glob(f"*/{KNOWN}")) if data_dir.is_dir() else ():
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            found = kept(file, LARGEST)
            if data_hash(found["hashes"]) == wanted and found["sources"].keys() == found["hashes"].keys():
                return found["sources"], found["hashes"]
    return None
