"""Text to tokens and back: bytes, a byte-level BPE trained on the corpus, or the user's own tokenizer.json.

Invariant: with bytes and bpe, decode(encode(text)) == text for any text. A text that spells the end token does not
produce it: only the borders between documents do.
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
# Names of the end of a document in other people's tokenizer.json, in the order in which they are looked for.
ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
MASKS = ("[MASK]", "<mask>")  # names of a token that hides another one
MOST = 2**28  # bytes of a tokenizer.json; those of large models have 10 to 35 MB
BYTES = json.dumps({"hvdllm": "bytes"}) + "\n"  # the tokenizer.json of tokenizer=bytes: 256 values, then the end


class Tokenizer:
    """A tokenizer as its tokenizer.json describes it.

    Attributes:
        json: str, the whole description, which is saved and hashed.
        hash: str, the sha256 of json in hex.
        vocab: int, the number of tokens; every id is smaller.
        end: int, the id of the token between documents.
        dtype: np.uint16 if every id fits, else np.uint32.
    """

    def __init__(self, json: str) -> None:
        """Raises ValueError, or Exception from `tokenizers`, if `json` describes no tokenizer.

        Raises UserError if the tokenizer has no end token.
        """
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
        """The tokens of each text, [tokens] of self.dtype. Batches of 100 kB and more are encoded on all cores."""
        if self._bpe is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        return [np.array(encoding.ids, self.dtype) for encoding in self.encode_only(texts)]

    def encode_only(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """What `tokenizers` itself makes of each text, which is not a tokenizer of bytes."""
        found: list[tokenizers.Encoding] = self._bpe.encode_batch_fast(texts, add_special_tokens=False)
        return found

    def encode_special(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each text, where special tokens may be spelt, and the character at which each begins, int64."""
        if self._bpe is None:
            sizes = [[len(char.encode()) for char in text] for text in texts]
            return [
                (ids, np.repeat(np.arange(len(each)), each))
                for ids, each in zip(self.encode(texts), sizes, strict=True)
            ]
        self._bpe.encode_special_tokens = False
        try:
            found = self._bpe.encode_batch(texts, add_special_tokens=False)
        finally:
            self._bpe.encode_special_tokens = True
        return [
            (np.array(each.ids, self.dtype), np.array([first for first, _ in each.offsets], np.int64)) for each in found
        ]

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text; None if there is none."""
        found: int | None = None if self._bpe is None else self._bpe.token_to_id(token)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these tokens. A broken character becomes U+FFFD.

        The end token stands for no text. Neither do ids from `vocab` on, which a model may produce because its
        vocabulary is padded.
        """
        known = [int(id) for id in ids if id < self.vocab and id != self.end]
        if self._bpe is None:
            return bytes(known).decode(errors="replace")
        return str(self._bpe.decode(known))

    @property
    def end_text(self) -> str:
        """How the end token is spelled."""
        return END if self._bpe is None else str(self._bpe.id_to_token(self.end))

    @property
    def mask(self) -> int | None:
        """The id of the tokenizer's own mask token; None if it has none."""
        return next((id for name in MASKS if (id := self.id_of(name)) is not None), None)

    def with_mask(self) -> tuple[str, str]:
        """The tokenizer.json that other programs read, with a mask token, and how that is spelled.

        Where the tokenizer has none, it gets the next id. Raises UserError if it cannot be given that.
        """
        if self.mask is not None:
            return self.for_others(), str(self._bpe.id_to_token(self.mask))
        whole = tokenizers.Tokenizer.from_str(self.for_others())
        whole.add_special_tokens([MASKS[0]])
        if (id := whole.token_to_id(MASKS[0])) != self.vocab:
            raise UserError(
                f"the ids of the tokenizer have gaps, so a mask token would be number {id} there and not {self.vocab}: "
                "train with a tokenizer that has [MASK]"
            )
        return str(whole.to_str()), MASKS[0]

    def for_others(self) -> str:
        """The tokenizer.json that other programs read. That of bytes is one of BPE without merges."""
        if self._bpe is not None:
            return self.json
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that ByteLevel spells as they are
        others = [byte for byte in range(256) if byte not in plain]
        letters = {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + k) for k, byte in enumerate(others)}}
        spelled = tokenizers.Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
        spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        spelled.decoder = decoders.ByteLevel()
        spelled.add_special_tokens([END])
        return str(spelled.to_str())

    @property
    def exact(self) -> bool:
        """Whether it is one of ours, which keep every text exactly."""
        return self._bpe is None or self.ours

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, int64 [vocab]; 0 for the end token.

        This is exact for bytes and for every byte-level tokenizer (GPT-2, Llama 3): summed over an encoded text it
        gives the size of the text. For other tokenizers it is approximate: "▁" counts as one space, <0x0A> as one byte,
        "##" as nothing, and what a normalizer drops or adds is not seen.
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
        """Writes tokenizer.json, which load() reads. A link at `path` is replaced, not written through."""
        if path.is_symlink():
            path.unlink()
        path.write_text(self.json, encoding="utf-8", newline="")

    @staticmethod
    def load(path: Path, inside: Path | None = None, sha256: str | None = None) -> Tokenizer:
        """Reads what save() wrote, or a tokenizer.json of the library `tokenizers`.

        Args:
            path: the file.
            inside: the folder that the file must lie in once links are followed; None for anywhere.
            sha256: the hash that the file must have; None for any.

        Raises UserError if the file cannot be read, describes no tokenizer, or has another hash.
        """
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
    """Trains a byte-level BPE of at most `vocab` tokens: the end token, 256 bytes, then merges, most frequent first.

    It can encode every text. The same texts give the same tokenizer, whatever the number of threads. A small corpus
    yields fewer tokens than asked for: see Tokenizer.vocab.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
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


def _types(part: object) -> set[str]:
    """Every value of "type" in a part of a tokenizer.json."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*map(_types, part.values()))
    return set[str]().union(*map(_types, part)) if isinstance(part, list) else set()
