"""Text to tokens and back: bytes, a byte-level BPE trained on the corpus, or the user's own tokenizer.json.

Invariant: decode(encode(text)) == text for any text, with bytes and bpe. Text never makes an end token, even
where it spells one: only the borders of documents do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hvdllm import untrusted
from hvdllm.errors import UserError

END = "<|end|>"
# What the end of a document is called in the tokenizer.json of others, looked for in this order.
ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
MOST = 2**28  # bytes of a tokenizer.json; those of large models have 10 to 35 MB
BYTES = json.dumps({"hvdllm": "bytes"}) + "\n"  # the tokenizer.json of tokenizer=bytes: 256 values, then the end


class Tokenizer:
    """A tokenizer as its tokenizer.json says it.

    json: str, all there is to know about it: what is saved and hashed
    hash: str, sha256 of json in hex
    vocab: int, tokens; every id is smaller
    end: int, id of the token between documents
    dtype: np.uint16 where every id fits, else np.uint32
    """

    def __init__(self, json: str) -> None:
        """Raises ValueError (or what `tokenizers` raises: Exception) where `json` describes no tokenizer,
        UserError where that has no end token."""
        self.json = json
        self.hash = hashlib.sha256(json.encode()).hexdigest()
        self._bpe: Any = None  # None: bytes
        self.ours = False  # made by train_bpe, just now
        if json == BYTES:
            self.vocab, self.end = 257, 256
        else:
            self._bpe = tokenizers.Tokenizer.from_str(json)
            self._bpe.no_truncation()
            self._bpe.no_padding()
            self._bpe.encode_special_tokens = True  # "<|end|>" in a text is seven characters
            self.vocab = max(self._bpe.get_vocab().values(), default=-1) + 1  # ids may have gaps
            ends = [self._bpe.token_to_id(end) for end in ENDS]
            if all(end is None for end in ends):
                raise UserError(
                    f"the tokenizer has no token for the end of a document (none of {', '.join(ENDS)}): add one to it"
                )
            self.end = next(end for end in ends if end is not None)
        self.dtype = np.uint16 if self.vocab <= 2**16 else np.uint32

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, [tokens] of self.dtype. Batches of 100 kB and more use all cores."""
        if self._bpe is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        return [
            np.array(encoding.ids, self.dtype)
            for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; a broken character becomes U+FFFD. The end, and ids from vocab on (a model's
        vocabulary may be padded), stand for no text."""
        known = [int(id) for id in ids if id < self.vocab and id != self.end]
        if self._bpe is None:
            return bytes(known).decode(errors="replace")
        return str(self._bpe.decode(known))

    @property
    def exact(self) -> bool:
        """Is it one of ours, which keeps every text?"""
        return self._bpe is None or self.ours

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for: int64 [vocab], 0 for the end.

        Exact for bytes and every byte-level tokenizer (GPT-2, Llama 3): over an encoded text they sum to its
        bytes. For others approximate: "▁" counts as one space, <0x0A> as one byte, "##" as nothing, and what a
        normalizer drops or adds is not seen.
        """
        sizes = np.zeros(self.vocab, np.int64)
        if self._bpe is None:
            sizes[:256] = 1
            return sizes
        described = json.loads(self.json)
        byte_level = "ByteLevel" in _types(described.get("decoder"))
        added = {token["id"]: token["content"] for token in described.get("added_tokens", [])}
        for token, id in self._bpe.get_vocab().items():
            if id in added:
                sizes[id] = len(added[id].encode())
            elif byte_level:
                sizes[id] = len(token)  # a byte-level token spells each byte as one character
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[id] = 1
            else:
                sizes[id] = len(token.removeprefix("##").replace("▁", " ").encode())
        sizes[self.end] = 0
        return sizes

    def save(self, path: Path) -> None:
        """Writes tokenizer.json, which load() reads; a link that stands there is replaced, not written through."""
        if path.is_symlink():
            path.unlink()
        path.write_text(self.json, encoding="utf-8", newline="")

    @staticmethod
    def load(path: Path, inside: Path | None = None, sha256: str | None = None) -> Tokenizer:
        """Reads what save() wrote, or a tokenizer.json of the library `tokenizers`. inside: the folder that it must lie
        in; sha256: what was written. Raises UserError."""
        try:
            text = untrusted.read(path, MOST, inside).decode()
            untrusted.parsed(text)
            tokenizer = Tokenizer(text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except OSError as error:
            raise UserError(f"the tokenizer {path} cannot be read ({error.strerror}): correct the path") from None
        except (
            BaseException
        ) as error:  # tokenizers raises nothing more special, and where it is damaged a panic of Rust
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path} describes no tokenizer ({error}): give a tokenizer.json, bytes or bpe") from None
        if sha256 not in (None, tokenizer.hash):
            raise UserError(f"{path} is not what was written: copy the run's folder again")
        return tokenizer


def train_bpe(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab` tokens: the end, 256 bytes, then merges, the most frequent first.

    Every text can be spelled in it, and the same texts give the same tokenizer, whatever the number of threads.
    A small corpus yields fewer tokens: see Tokenizer.vocab.
    """
    bpe: Any = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(bpe.to_str())
    tokenizer.ours = True
    return tokenizer


def _types(part: Any) -> set[str]:
    """Every "type" in a part of a tokenizer.json."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*map(_types, part.values()))
    return set[str]().union(*map(_types, part)) if isinstance(part, list) else set()
