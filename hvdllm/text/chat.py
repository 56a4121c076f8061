"""Conversations: lines of .jsonl, their template, and which of their tokens count.

A line is {"messages": [{"role": ..., "content": ...}, ...]} with the roles system, user and assistant, or
{"prompt": ..., "completion": ...}. What the assistant says counts, with the token that ends it. All else does not.

A template writes a conversation as text. It is that of the tokenizer (`chat_template` in the tokenizer_config.json, or
the chat_template.jinja, beside its tokenizer.json), or ours. A template of others is a program in Jinja. It is run in
Jinja's sandbox while the text is prepared, and at no other time: a run keeps the two texts that it puts around a
question (`Around`), never the template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text.tokenize import Tokenizer

COUNTS, BEGINS = np.uint32(2**31), np.uint32(2**30)  # flags of a token: the loss counts it; a conversation begins
IDS = np.uint32(2**30 - 1)  # the bits of its id
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # role and content
Encoded = tuple[np.ndarray, np.ndarray]  # the tokens of a conversation, and whether each counts, bool
MOST = 2**20  # bytes of a tokenizer_config.json with its template
LONGEST = 2**24  # characters that a template may write for one conversation
AROUND = "chat.json"  # in the folders of prepared text and of runs
MARK = "\x01hvdllm\x01"  # stands for a question while it is found out what a template puts around it


@dataclass(frozen=True)
class Around:
    """What a template writes before and after a question, up to where the assistant begins.

    Attributes:
        before, after: the texts.
        stop: the token that ends an answer, or "" for the end token.
        special: whether these texts may spell special tokens of the tokenizer.
    """

    before: str
    after: str
    stop: str
    special: bool

    def ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """The tokens of a question, after which the model answers. A question never spells special tokens."""
        if not self.special:
            parts = tokenizer.encode([self.before, question, self.after])
        else:
            (before, _), (after, _) = tokenizer.encode_special([self.before, self.after])
            parts = [before, tokenizer.encode([question])[0], after]
        return [int(id) for part in parts for id in part]

    def ends(self, tokenizer: Tokenizer) -> int:
        """The id of the token that ends an answer."""
        found = tokenizer.id_of(self.stop) if self.stop else None
        return tokenizer.end if found is None else found

    @property
    def hash(self) -> str:
        """The sha256 of json() in hex."""
        return hashlib.sha256(self.json().encode()).hexdigest()

    def json(self) -> str:
        return json.dumps([self.before, self.after, self.stop, self.special])

    @staticmethod
    def load(path: Path, inside: Path | None = None) -> Around:
        """Reads what json() wrote. Raises UserError if it cannot be read."""
        try:
            before, after, stop, special = untrusted.read_json(path, MOST, inside)
            if not all(isinstance(text, str) for text in (before, after, stop)) or not isinstance(special, bool):
                raise ValueError("it holds other values")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): copy its folder again") from None
        return Around(before, after, stop, special)


class Template(Protocol):
    def encode(self, tokenizer: Tokenizer, conversations: list[tuple[str, list[Message]]]) -> list[Encoded]:
        """The tokens of each conversation, and which count. Conversations come with a name, for errors.

        Raises UserError, which names the conversation, if it cannot be written.
        """

    def around(self) -> Around:
        """What it puts around a question."""

    @property
    def source(self) -> str:
        """What tells it from other templates."""


# ------------------------------------------------------------------ lines
def canonical(name: str, row: Any) -> str:
    """A conversation as JSON: a list of role and content. Raises UserError if the line is none.

    Args:
        name: of the line, for the error.
        row: the value of the line.
    """
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
    elif isinstance(row, dict) and {"prompt", "completion"} <= row.keys():
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    else:
        raise UserError(
            f"{name} is no conversation: text=chat needs `messages`, or `prompt` and `completion`, in each line"
        )
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: `messages` must be a list of at least one message: correct the line, or take it out")
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{name}: message {number} needs a `role` and a `content`, both texts: correct the line")
        if message["role"] not in ROLES:
            raise UserError(
                f"{name}: message {number} has the role {message['role'][:40]!r}, which is none of {', '.join(ROLES)}: "
                "correct the line, or take it out"
            )
        found.append({"role": message["role"], "content": _whole(message["content"])})
    if not any(message["role"] == "assistant" and message["content"] for message in found):
        raise UserError(f"{name} has no message of the assistant, so nothing could be learnt of it: take it out")
    return json.dumps(found, ensure_ascii=False)


def _whole(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can spell and UTF-8 cannot, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ------------------------------------------------------------------ our template
class Ours:
    """Each message is its role in <| |>, a line end, its content, and a line end, or the end token for the assistant.

    Roles are ordinary text. What a message says cannot produce the end token.
    """

    def encode(self, tokenizer: Tokenizer, conversations: list[tuple[str, list[Message]]]) -> list[Encoded]:
        pieces: list[str] = []
        for _, messages in conversations:
            for message in messages:
                pieces += [f"<|{message['role']}|>\n", message["content"]]
        encoded = iter(tokenizer.encode([*pieces, "\n"]))
        out, line_end = [], tokenizer.encode(["\n"])[0]
        end = np.array([tokenizer.end], tokenizer.dtype)
        for _, messages in conversations:
            parts: list[np.ndarray] = []
            counts: list[np.ndarray] = []
            for message in messages:
                head, content, learnt = next(encoded), next(encoded), message["role"] == "assistant"
                tail = end if learnt else line_end
                parts += [head, content, tail]
                counts += [np.zeros(len(head), bool), np.full(len(content) + len(tail), learnt)]
            out.append((np.concatenate(parts), np.concatenate(counts)))
        return out

    source = "ours"

    def around(self) -> Around:
        return Around("<|user|>\n", "\n<|assistant|>\n", "", special=False)


def written(messages: list[Message]) -> str:
    """A conversation as our template writes it, without end tokens."""
    return "\n".join(f"<|{message['role']}|>\n{message['content']}" for message in messages)


# ------------------------------------------------------------------ templates of others
class Theirs:
    """The template that comes with a tokenizer.

    Which part of the text counts is found by writing a conversation up to each message of the assistant, and then with
    it. What comes in addition counts. A template that writes earlier messages in another way once later ones are there
    is refused, since a model could then not be asked as it was taught.

    Args:
        source: the template in Jinja.
        tokens: the special tokens that it may name, such as bos_token.
        path: its file, for errors.
    """

    def __init__(self, source: str, tokens: Json, path: Path) -> None:
        self.source, self.path, self.tokens = source + json.dumps(tokens), path, tokens
        self._render = _compiled(source, path)

    def write(self, name: str, messages: list[Message], *, asks: bool = False) -> str:
        """The text of some messages; asks: up to where the assistant begins. Raises UserError if there is none."""
        try:
            text = self._render(messages=messages, add_generation_prompt=asks, **self.tokens)
        except Exception as error:  # whatever a template raises
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"the template of {self.path} cannot write {name} ({why}): correct it, or give text.template=ours"
            ) from None
        return text

    def spans(self, name: str, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and where in it the characters that count begin and end."""
        whole, spans = self.write(name, messages), []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.write(name, messages[:at], asks=True)
            after = whole if at == len(messages) - 1 else self.write(name, messages[: at + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"the template of {self.path} writes {name} in another way once it goes on, so its answers cannot "
                    "be told from its questions: give text.template=ours"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def encode(self, tokenizer: Tokenizer, conversations: list[tuple[str, list[Message]]]) -> list[Encoded]:
        found = [self.spans(name, messages) for name, messages in conversations]
        out = []
        for (ids, starts), (_, spans) in zip(tokenizer.encode_special([t for t, _ in found]), found, strict=True):
            counts = np.zeros(len(ids), bool)
            for first, stop in spans:
                counts |= (starts >= first) & (starts < stop)
            out.append((ids, counts))
        return out

    def around(self) -> Around:
        text = self.write("a question", [{"role": "user", "content": MARK}], asks=True)
        before, mark, after = text.partition(MARK)
        if not mark:
            raise UserError(f"the template of {self.path} leaves questions out: give text.template=ours")
        return Around(before, after, self.tokens.get("eos_token", ""), special=True)


def _compiled(source: str, path: Path) -> Callable[..., str]:
    """The template as a function. It sees what is given to it, and has no way to files, modules or the network.

    It can still waste time and memory. It stands beside the tokenizer that the user named, and is not run for anybody
    else.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, by which some templates say what the assistant writes. Here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise ValueError(message)

    def to_json(value: Any, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(indent, 8))

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    try:
        template = sandbox.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(
            f"the template of {path} is not Jinja ({' '.join(str(error).split())[:200]}): give text.template=ours"
        ) from None

    def render(**values: Any) -> str:
        out, size = [], 0
        for piece in template.generate(**values):
            out.append(piece)
            size += len(piece)
            if size > LONGEST:
                raise ValueError(f"it writes more than {LONGEST:,} characters")
        return "".join(out)

    return render


def template(tokenizer: Path | None, asked: str) -> Template:
    """The template of a tokenizer.json if there is one, else ours.

    Args:
        tokenizer: the user's tokenizer.json, or None if it is one of ours.
        asked: text.template.

    Raises UserError if there is a template that cannot be read, or if there must be one and is not.
    """
    found = None if tokenizer is None or asked == "ours" else _found(tokenizer.parent)
    if found is None and asked == "tokenizer":
        raise UserError(
            "text.template=tokenizer: there is no chat_template in a tokenizer_config.json beside the tokenizer.json "
            "that text.tokenizer names: give text.template=ours"
        )
    return Ours() if found is None else found


def _found(folder: Path) -> Theirs | None:
    """The template in a folder of `transformers`. Raises UserError if it cannot be read."""
    path, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = untrusted.read_json(path, 16 * MOST) if path.exists() else {}
        source = untrusted.read(alone, MOST).decode() if alone.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} or {alone.name} cannot be read ({error}): correct it, or give text.template=ours"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: correct it, or give text.template=ours")
    source = source or config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > MOST:
        raise UserError(f"the chat_template of {path} is no text: correct it, or give text.template=ours")
    tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[key] = token
    return Theirs(source, tokens, alone if alone.exists() else path)
