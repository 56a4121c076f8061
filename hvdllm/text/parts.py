"""Where text comes from: the settings of each source."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from hvdllm import registry
from hvdllm.errors import UserError
from hvdllm.registry import of, part
from hvdllm.settings import DIGEST, NAME, Config, Named, Settings, Setup, Several, made, meant, setting


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
    def endless(self) -> bool:
        """Does it arrive while it is trained on (hvdllm/online)?"""
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

    @property
    def paths(self) -> dict[str, Several]:
        """The paths that it names, by setting."""
        return {"text.path": getattr(self, "path", None), "text.validation": self.validation}

    def refusal(self, setup: Setup) -> str | None:
        for key in ("path", "validation"):
            value = getattr(self, key, None)
            if value is not None and not _paths(value):
                return f"text.{key}={value} is neither a path nor a list of paths"
        if not 0 <= self.validation_share < 1:
            return f"text.validation_share={self.validation_share} must lie between 0 and 1"
        return None


def _paths(value: object) -> bool:
    several = isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
    return isinstance(value, str) or several


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


READER = "{reader}"  # in settings of a stream, the number of the reader


@part("text", "stream", "hvdllm.text.corpus:streamed")
@dataclass
class Stream(Text):
    """Text that arrives while it is trained on, each document once (hvdllm/online/README.md)."""

    @property
    def endless(self) -> bool:
        return True

    source: str = setting(
        "replay",
        "where documents arrive: redis (a stream of text.address), folder (files of text.path that grow or are added), "
        "stdin (of rank 0, a document a line), replay (a text that is played at text.rate) or log (what another run "
        "has read, as far as it is there)",
        choices=("replay", "redis", "folder", "stdin", "log"),
        ours=True,
    )
    path: Several = setting(
        None,
        "of source=folder: a folder of .jsonl and .txt files; of source=replay: the text that is played, as text=files "
        "takes it, or a list of texts that are played one after the other; null: the standard library; of source=log: "
        "the folder RUN/log",
        ours=True,
    )
    column: str = setting("text", "name of the field that holds the text of a .jsonl line, or of an entry in Redis")
    address: str = setting(
        "redis://127.0.0.1:6379/0",
        "of source=redis: where the server is; a password is better in REDIS_PASSWORD",
        ours=True,
    )
    key: str = setting("documents", "of source=redis: the name of the stream", ours=True)
    forget: bool = setting(
        False,
        "of source=redis: trim the stream up to what was trained on, once a checkpoint with it is whole",
        ours=True,
    )
    rate: float = setting(200.0, "of source=replay: documents a second; 0: as fast as they are read", least=0)
    readers: int = setting(
        1,
        "processes that read, dealt to the hosts; {reader} in text.path, text.key or text.address is the number of "
        "each, from 0; without it they share a folder's files, or the documents that are replayed",
        least=1,
        most=1024,
    )
    wait_s: float = setting(
        2.0,
        "seconds that a round waits for a whole batch, before it is made of what has arrived",
        least=0.05,
        most=86400,
    )
    backlog: str = setting(
        "all",
        "where more than text.behind_tokens wait: all (fall behind, but learn each), newest (leave out what is older "
        "than a batch) or sample (leave out all but a batch, spread over what waits)",
        choices=("all", "newest", "sample"),
    )
    behind_tokens: int = setting(1_000_000, "tokens that may wait before text.backlog leaves some out", least=0)
    replay: float = setting(
        0.0, "share of each batch that is drawn from what was trained on before, below 1", least=0, most=0.95
    )
    replay_by: str = setting(
        "uniform",
        "how that share is drawn: uniform (each window alike) or loss (in proportion to the held-out loss of its slice "
        "in the last evaluation, so that what was forgotten comes back more often)",
        choices=("uniform", "loss"),
    )
    last_tokens: int | None = setting(
        None, "of source=log: begin so many tokens before its end; null: at its beginning", least=1
    )
    slice_tokens: int = setting(
        131_072,
        "tokens of a slice of the stream; the last text.validation_share of each is held out and evaluated",
        least=1024,
    )
    window_tokens: int = setting(
        100_000,
        "tokens over which the recent prequential loss is averaged, with weights that fall exponentially",
        least=1,
    )

    def refusal(self, setup: Setup) -> str | None:
        config = setup.config
        exchange = registry.of("exchange", config.exchange)
        if registry.name_of("task", config.task) != "causal_lm":
            return "text=stream is learnt by task=causal_lm alone: leave the task out"
        if self.source in ("folder", "log") and self.path is None:
            what = "the folder whose files grow" if self.source == "folder" else "the folder log of another run"
            return f"text.source={self.source} needs text.path: {what}"
        if self.readers > 1 and self.source in ("stdin", "log"):
            return f"text.readers={self.readers}: text.source={self.source} has one reader, leave readers at 1"
        if self.readers > 1 and self.source == "redis" and self.shared:
            return (
                f"text.readers={self.readers} do not share a stream of Redis: give each its own, such as "
                f"text.key={self.key}-{READER}"
            )
        if self.readers > 1 and isinstance(self.path, list):
            return f"text.readers={self.readers}: a list of texts has one reader, leave readers at 1"
        if self.prepared is not None or self.validation is not None:
            return "text=stream prepares nothing and holds out a share of each slice: leave prepared and validation out"
        if exchange.facts.clients:
            return f"text=stream with exchange={exchange.name}: a stream is dealt to no clients, take another exchange"
        for name in ("timed", "by_speed"):
            if getattr(config.exchange, name, False):
                return f"text=stream with exchange.{name}=true: ranks agree on rounds by count, leave it at false"
        if self.replay_by == "loss" and not (self.replay and config.eval_every):
            return "text.replay_by=loss draws text.replay by the losses of evaluations: give text.replay and eval_every"
        held = self.held(config)
        if not 0 < held < self.slice(config):
            return (
                f"text.slice_tokens={self.slice_tokens} has {self.slice(config)} windows of model.context="
                f"{config.model.context}, of which text.validation_share={self.validation_share} holds out {held}: "
                "raise one of the first two, or lower the share"
            )
        return super().refusal(setup)

    @property
    def shared(self) -> bool:
        """Whether readers take their documents from the same place."""
        return not any(READER in str(each) for each in (self.path, self.key, self.address))

    def slice(self, config: Config) -> int:
        """Windows in a slice."""
        return int(self.slice_tokens // config.model.context)

    def held(self, config: Config) -> int:
        """Windows of a slice that are held out."""
        return max(1, round(self.slice(config) * self.validation_share))


COMMON = ("tokenizer", "vocab", "prepared")  # settings that all sources of a mixture share


@part("text", "mix", "hvdllm.text.mix:files")
@dataclass
class Mix(Text):
    """Several texts, each visited as often as its share says, each with a validation loss of its own."""

    sources: Named = setting(
        None,
        "the texts by name: {NAME: PATH, ...} for files as text=files takes them, or a dict of settings where `text` "
        "names another kind: {code: src/, talk: {text: chat, path: talk.jsonl}}; their tokenizer is text.tokenizer",
        ours=True,
    )
    mix: Named = setting(
        None,
        "the share of each source among the tokens that count, as numbers that are divided by their sum: "
        "{code: 0.7, talk: 0.3}; null: each item once an epoch",
    )

    @property
    def conversations(self) -> bool:
        return any(each.conversations for each in self.parts.values())

    @property
    def packed(self) -> bool:
        return any(each.packed for each in self.parts.values())

    @property
    def parts(self) -> dict[str, Text]:
        """The settings of each source; {} if none is named. Raises UserError if they are wrong."""
        if self.sources is None:
            return {}
        if not isinstance(self.sources, dict) or not self.sources:
            raise UserError(f"text.sources={self.sources} is no dict: give {{NAME: PATH, ...}}")
        return {name: self._part(name, value) for name, value in self.sources.items()}

    def _part(self, name: object, value: object) -> Text:
        where = f"text.sources.{name}"
        if not isinstance(name, str) or not re.fullmatch(NAME[0], name):
            raise UserError(f"text.sources: the name {name!r} is none, give {NAME[1]}")
        values = dict(value) if isinstance(value, dict) else {"path": value}
        kinds = {kind: each for kind, each in registry.kinds("text").items() if each not in (Mix, Stream)}
        kind = values.pop("text", "files")
        if kind not in kinds:
            raise UserError(f"{where}.text={kind}: choose one of {', '.join(kinds)}{meant(str(kind), list(kinds))}")
        if common := next((key for key in COMMON if key in values), None):
            raise UserError(f"{where}.{common}: all sources share it, give text.{common}")
        common_ones = {"tokenizer": self.tokenizer, "vocab": self.vocab}
        held = {"validation_share": self.validation_share}
        found: Text = made(kinds[kind], {**common_ones, **held, **values}, f"{where}.")
        for key, path in found.paths.items():
            if path is not None and not _paths(path):
                raise UserError(f"{where}{key.removeprefix('text')}={path} is neither a path nor a list of paths")
        return found

    @property
    def paths(self) -> dict[str, Several]:
        return {
            f"text.sources.{name}{key.removeprefix('text')}": path
            for name, each in self.parts.items()
            for key, path in each.paths.items()
        }

    def refusal(self, setup: Setup) -> str | None:
        if self.sources is None and self.prepared is None:
            return "text=mix needs text.sources: {NAME: PATH, ...}, such as text.sources={code: src/, books: books/}"
        try:
            parts = self.parts
        except UserError as error:
            return str(error)
        if self.validation is not None:
            return "text.validation with text=mix: give it to a source, {NAME: {path: …, validation: …}}"
        for name, each in parts.items():
            if (why := each.refusal(setup)) is not None:
                return f"text.sources.{name}: {why.replace('text.', f'text.sources.{name}.')}"
        return self._shares_refused(setup, list(parts)) or super().refusal(setup)

    def _shares_refused(self, setup: Setup, sources: list[str]) -> str | None:
        """Why the shares cannot be used, or None."""
        if self.mix is None:
            return None
        if not isinstance(self.mix, dict) or not self.mix:
            return f"text.mix={self.mix} is no dict: give {{NAME: SHARE, ...}}"
        for name, share in self.mix.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1e9:
                return f"text.mix.{name}={share}: give a number above 0, or take the source out"
        if least := next((name for name, share in self.shares().items() if share < LEAST_SHARE), None):
            return f"text.mix.{least} is less than {LEAST_SHARE:g} of all: raise it, or take the source out"
        if sources and (odd := {*sources} ^ self.mix.keys()):
            names = ", ".join(sorted(map(str, odd)))
            return f"text.mix and text.sources name different sources ({names}): name the same"
        exchange = registry.of("exchange", setup.config.exchange)
        if exchange.facts.clients:
            return f"text.mix with exchange={exchange.name}: clients train on all they own, leave text.mix at null"
        return None

    def shares(self) -> dict[str, float]:
        """The shares of text.mix, which add up to 1."""
        whole = sum(self.mix.values())
        return {name: share / whole for name, share in self.mix.items()}


LEAST_SHARE = 1e-3  # of a source of a mixture
