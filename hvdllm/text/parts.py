"""Where text comes from: the settings of each source."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hvdllm.registry import of, part
from hvdllm.settings import DIGEST, Settings, Setup, Several, setting


@dataclass
class Text(Settings):
    """What is common to every source of text."""

    @property
    def users(self) -> bool:
        """Are the files the user's own, and not those of this machine's Python?"""
        return True

    @property
    def ready(self) -> bool:
        """Is it tokens already (text/tokens.py)?"""
        return False

    @property
    def conversations(self) -> bool:
        """Is it made of conversations (text/chat.py), and not of documents?"""
        return False

    @property
    def packed(self) -> bool:
        """Are its documents packed whole into windows (text/packed.py)?"""
        return False

    @property
    def plain(self) -> Text:
        """The source whose prepared text this one takes."""
        return self

    tokenizer: str = setting(
        "bpe",
        "bytes (257 tokens), bpe (byte-level, trained on this corpus) or the path of a tokenizer.json; "
        "bpe, because a small model gets further on 3 bytes a token than on one",
        ours=True,
    )
    vocab: int = setting(2048, "tokens; asked of tokenizer=bpe, the corpus may yield fewer", least=258, most=10_000_000)
    validation: Several = setting(
        None, "path, list or glob of the validation text; null: documents chosen by a hash of their content", ours=True
    )
    prepared: str | None = setting(
        None,
        "data hash of a text that was prepared before (`hvdllm prepare` prints it): the one in data_dir is taken as it "
        "is, and no file of text is read; null: what the other settings name",
        form=DIGEST,
        ours=True,
    )
    validation_share: float = setting(
        0.05,
        "share of documents (of 64 KiB pieces where files are larger) held out where text.validation is null; 0: none, "
        "and where none qualifies the one with the smallest hash; 5 % of 11 MB is 500 kB",
        least=0,
    )

    def refusal(self, setup: Setup) -> str | None:
        for key in ("path", "validation"):
            value = getattr(self, key, None)
            if value is not None and not (
                isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
            ):
                return f"text.{key}={value} is neither a path nor a list of paths"
        if not 0 <= self.validation_share < 1:
            return f"text.validation_share={self.validation_share} must lie between 0 and 1"
        return None


@part("text", "stdlib", "hvdllm.text.corpus:stdlib")
@dataclass
class Stdlib(Text):
    """The source of this machine's Python standard library: about 11 MB on every machine, nothing to download."""

    @property
    def users(self) -> bool:
        return False


@part("text", "files", "hvdllm.text.corpus:files")
@dataclass
class Files(Text):
    """The user's own files: .txt .md .py, .jsonl with a text column, each also as .gz."""

    path: Several = setting(
        None, "file, folder or glob, or a list of them; folders are walked in sorted order", ours=True
    )
    column: str = setting("text", "name of the field that holds the text of a .jsonl line")

    def refusal(self, setup: Setup) -> str | None:
        if self.path is None and self.prepared is None:
            return "text=files needs text.path: a file, a folder, a glob or a list of them"
        return super().refusal(setup)


@part("text", "packed", "hvdllm.text.corpus:packed")
@dataclass
class Packed(Files):
    """Documents packed whole into windows, with attention inside each. The text is that of text=files or stdlib."""

    path: Several = setting(
        None,
        "file, folder or glob, or a list of them; folders are walked in sorted order; null: the standard library",
        ours=True,
    )

    @property
    def packed(self) -> bool:
        return True

    @property
    def plain(self) -> Text:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.path is not None:
            return Files(**given)
        return Stdlib(**{key: value for key, value in given.items() if key not in ("path", "column")})

    def refusal(self, setup: Setup) -> str | None:
        config = setup.config
        if not getattr(config.model, "documents", False):
            return "text=packed needs model.documents=true, which keeps attention inside documents: give that"
        if config.model.context < 2:
            return f"text=packed needs windows of two tokens at least, and model.context={config.model.context}"
        if of("exchange", config.exchange).facts.clients:
            return "text=packed with clients: a window holds documents of several clients, give text=files"
        return Text.refusal(self, setup)


@part("text", "tokens", "hvdllm.text.tokens:files")
@dataclass
class Tokens(Text):
    """Tokens that somebody else has made: files of Megatron-LM (.bin and .idx), llm.c (.bin) or NumPy (.npy)."""

    path: Several = setting(
        None, "file, folder or glob of .npy or .bin, or a list of them; folders are walked in sorted order", ours=True
    )

    @property
    def ready(self) -> bool:
        return True

    def refusal(self, setup: Setup) -> str | None:
        if self.path is None:
            return "text=tokens needs text.path: a .npy or .bin file, a folder, a glob or a list of them"
        if self.tokenizer == "bpe":
            return "text=tokens needs text.tokenizer: the tokenizer.json that made the tokens, or bytes"
        if self.prepared is not None:
            return "text.prepared with text=tokens: nothing is prepared, leave it out"
        return super().refusal(setup)


@part("text", "chat", "hvdllm.text.corpus:chats")
@dataclass
class Chat(Text):
    """Conversations: .jsonl or .jsonl.gz of `messages`, or of `prompt` and `completion`. Only answers count."""

    @property
    def conversations(self) -> bool:
        return True

    path: Several = setting(
        None, "file, folder or glob of .jsonl, or a list of them; folders are walked in sorted order", ours=True
    )
    template: str = setting(
        "auto",
        "how a conversation is written: tokenizer (by the chat_template beside the tokenizer.json that text.tokenizer "
        "names), ours, or auto (the former if there is one)",
        choices=("auto", "tokenizer", "ours"),
    )

    def refusal(self, setup: Setup) -> str | None:
        if self.path is None and self.prepared is None:
            return "text=chat needs text.path: a .jsonl file, a folder, a glob or a list of them"
        return super().refusal(setup)
