"""Composes a typed Config from the files in conf/ and the words of the command line, or says in one sentence why not.

Hydra composes groups, presets and overrides. Its schemas catch unknown keys and wrong types, but not what `+`, `++` and
`~` add or take away, so the result is compared with the dataclasses field by field. Classes are looked up in a dict. No
file can name one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hvdllm import registry
from hvdllm.config.trunk import begin_with
from hvdllm.config.words import expand, key_of, last, split, typed, unquoted, value_of
from hvdllm.errors import UserError
from hvdllm.models.hugging import Settings
from hvdllm.paths import path_of
from hvdllm.plain import Json
from hvdllm.settings import MODULES, Chosen, Config, checked, meant

CONFIG_DIR = "--config-dir="
NOT_OPTIONS = ("world", "device", "debug")  # groups with one class of settings, whose options are presets alone

OLDER = {"task": {"name": "causal_lm"}, "debug": {"name": "debug"}}  # groups that a file of an earlier version may lack


def conf_dir() -> Path:
    """The folder of the yaml files, which is inside the package if that was installed from a wheel, else beside it.

    Hydra gets a path, because `pkg://` would fail if a clone shadows the wheel.
    """
    package = Path(__file__).resolve().parents[1]
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "train.yaml").exists())


def options(group: str) -> list[str]:
    """The names that `group=name` takes."""
    presets = {file.stem for file in (conf_dir() / group).glob("*.yaml")}
    return sorted(presets | ({*registry.kinds(group)} if group not in NOT_OPTIONS else set()))


def compose(words: Sequence[str], beneath: Config | None = None) -> Config:
    """Composes the defaults and the words of a command line.

    Args:
        words: the overrides. `--config-dir=DIR` adds a folder of the user, whose launch/site.yaml is `launch=site`.
        beneath: the configuration of a run's folder. It replaces the defaults for settings that a folder may choose
          (settings.setting) and that no word gives.

    Raises UserError, with one sentence, if the words cannot be composed.
    """
    if bad := next((word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))), None):
        raise UserError(
            f"`{bad}` would change nothing: hvdllm reads no settings of Hydra's own, but those of its sweeper with "
            "`hvdllm train -m`"
        )
    words = [each for word in words for each in expand(word)]
    asked = {key_of(word): value_of(word) for word in words}
    words = with_model(words, usual=beneath is None)
    given = {key_of(word): value_of(word) for word in words}
    chosen = [] if beneath is None else _groups(beneath, given)
    try:
        config = _typed(_node([*chosen, *words]))
        _truths(config, given)
        if config.plugins is not None and "plugins" not in given:
            raise UserError("plugins= is a word of the command line alone: take it out of the file, and give it there")
        config = config if beneath is None else _over(beneath, config, given)
        if config.init_from is not None:
            begin_with(config, asked, _model)
        return config
    except _refusals() as error:
        raise UserError(sentence(error, words)) from None


@contextlib.contextmanager
def hydra_over(words: Sequence[str], sweep: bool = False) -> Iterator[list[str]]:
    """A context in which Hydra is ready to compose from conf/ and the user's folders.

    Args:
        words: of the command line.
        sweep: whether words may have several values.

    Yields the words as Hydra's overrides.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    registry.load(plugins(words))
    _register()
    overrides = [typed(word, sweep) for word in with_model(words) if not word.startswith(CONFIG_DIR)]
    if folders := [f"file://{word.removeprefix(CONFIG_DIR)}" for word in words if word.startswith(CONFIG_DIR)]:
        overrides.append(f"hydra.searchpath={json.dumps(folders, ensure_ascii=False)}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield overrides


def with_model(words: Sequence[str], usual: bool = True) -> list[str]:
    """The words, and what the task that they choose brings along where they do not choose it: its model and its usual
    settings. usual: whether these are wanted, too."""
    given = {key_of(word): value_of(word) for word in words}
    task = registry.parts("task").get(given.get("task", ""))
    if task is None:
        return list(words)
    brought = [f"model={task.facts.model}", *(task.facts.usual if usual else ())]
    return [*words, *(word for word in brought if key_of(word) not in given)]


def plugins(words: Sequence[str]) -> list[str]:
    """The modules that the word `plugins=` names. Raises UserError for a name that no module can have."""
    text = last(words, "plugins", "null").strip()
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    names = [] if text == "null" else [unquoted(part.strip()) for part in split(inner) if part.strip()]
    for name in names:
        if not re.fullmatch(MODULES[0], name):
            raise UserError(f"plugins={name}: give {MODULES[1]}")
    return names


def config_folder(path: str) -> str:
    """The word for `--config-dir path`, as `compose` takes it. Raises UserError if there is no such folder."""
    folder = path_of(path, "--config-dir ")
    if not path or not folder.is_dir():
        raise UserError(f"--config-dir {path}: there is no such folder; it may hold launch/site.yaml for launch=site")
    return f"{CONFIG_DIR}{folder.resolve()}"


def to_dict(config: Any) -> Json:
    """The configuration as plain values. Each group also holds the `name` of its option."""
    out: Json = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = {"name": registry.name_of(f.name, value), **dataclasses.asdict(value)}  # type: ignore[arg-type]
        out[f.name] = value
    return out


def from_dict(values: Json, where: str = "the configuration of this run") -> Config:
    """The inverse of `to_dict`, for the config.yaml of a run's folder.

    Types, choices and bounds are checked as on the command line. Text stays as it is, and nothing in it is looked up.

    Args:
        values: the plain values.
        where: where they come from, for the sentence of the error.

    Raises UserError if the values do not fit this version.
    """
    try:
        # A file of an earlier version may lack settings, which then have their defaults, but it has most groups.
        plain = dataclasses.asdict(Config()) | values
        for group, kinds in registry.all_kinds().items():
            inner = values.get(group, OLDER.get(group))
            kind = kinds.get(str(inner.get("name"))) if isinstance(inner, dict) else None
            if not isinstance(inner, dict) or kind is None:
                raise UserError(
                    f"it names an unknown {group}: {str(inner)[:80]!r}; where a module of yours has it, name that, "
                    "plugins=[MODULE]"
                )
            whole = dataclasses.asdict(kind()) | {key: value for key, value in inner.items() if key != "name"}
            plain[group] = kind(**{f.name: value for f, value in _fields(kind, whole, f"{group}.")})
        return Config(**{f.name: value for f, value in _fields(Config, plain, "")})
    except UserError as error:
        raise UserError(f"{where} does not fit this version of hvdllm, or was changed: {error}") from None


def to_yaml(config: Config) -> str:
    """The configuration as YAML, as --cfg job prints it and config.yaml in a run's folder holds it."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # it has no types
        def ignore_aliases(self, data: object) -> bool:  # files of a stranger are read without aliases
            return True

    return str(yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True))


def merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Joins the overrides of a run with new ones. The last word for a key counts, since Hydra takes a group only once.

    If the new words choose another option of a group, old words for settings of that group are dropped.
    """
    old, new = ([each for word in words for each in expand(word)] for words in (old, new))
    was, now = ({key_of(word): word for word in words if key_of(word) in registry.GROUPS} for words in (old, new))
    left = {group for group in now.keys() & was.keys() if value_of(now[group]) != value_of(was[group])}
    kept = [word for word in old if key_of(word).partition(".")[0] not in left or key_of(word) not in settings()]
    return list({key_of(word): word for word in (*kept, *new)}.values())


# ------------------------------------------------------------------ inside
_registered: dict[tuple[str, str], type] = {}  # what Hydra has been told, by group and name


def _register() -> None:
    """Registers every part that Hydra does not know yet, as an option of its group and as schema/GROUP/NAME, with which
    presets begin."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=Config, package="_global_")
    for group, kinds in registry.all_kinds().items():
        for name, kind in kinds.items():
            if _registered.get((group, name)) is kind:
                continue
            _registered[group, name] = kind
            store.store(group=f"schema/{group}", name=name, node=kind)
            if group not in NOT_OPTIONS:
                store.store(group=group, name=name, node=kind)


def _node(words: Sequence[str]) -> Chosen:
    """What Hydra composes from the words.

    Hydra takes 0.1 s, nearly all of it for the choice of options, and the points of a sweep choose few. So what the
    options give is kept, and a copy of it gets the settings in the order of the words, which is what Hydra does in the
    end. Hydra itself composes whatever else a word does, and whatever fails, so that errors are always its own.
    """
    from hydra import compose as hydra_compose
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    registry.load(plugins(words))
    known = {*settings()} - {*registry.GROUPS}
    given = [word for word in words if "=" in word and word.partition("=")[0] in known]
    options = [word for word in words if word.partition("=")[0] in (*registry.GROUPS, "experiment")]
    if len(given) + len(options) == len(words):
        parts = _own(options)
        with contextlib.suppress(*_refusals()):
            node = copy.deepcopy(_chosen(tuple(word for word in options if word not in parts), _parts()))
            for word, kind in parts.items():
                node[word.partition("=")[0]] = OmegaConf.structured(kind)
            for override in OverridesParser.create().parse_overrides([typed(word) for word in given]):
                if override.is_sweep_override():
                    raise ValueError(override.input_line)
                value = override.value()  # a dict replaces another one, such as that of an experiment
                OmegaConf.update(node, override.key_or_group, value, merge=not isinstance(value, dict))
            return node
    with hydra_over(words) as overrides:
        return hydra_compose("train", overrides=overrides)


@lru_cache(maxsize=64)
def _chosen(words: tuple[str, ...], parts: tuple[type, ...]) -> Chosen:
    """What Hydra composes from words that choose options among these parts. The caller must not change it."""
    from hydra import compose as hydra_compose

    with hydra_over(words) as overrides:
        return hydra_compose("train", overrides=overrides)


def _own(words: Sequence[str]) -> dict[str, type]:
    """Those of the words that choose nothing but a part's own defaults, each with the class of its settings.

    A file of settings may do more, and an experiment is put over what the other words choose.
    """
    chosen = [word.partition("=") for word in words]
    if len({group for group, _, _ in chosen}) < len(words) or "experiment" in {group for group, _, _ in chosen}:
        return {}
    return {
        f"{group}={name}": registry.kinds(group)[name]
        for group, _, name in chosen
        if group not in NOT_OPTIONS and name in registry.kinds(group)
        if not (conf_dir() / group / f"{name}.yaml").exists()
    }


def _parts() -> tuple[type, ...]:
    return tuple(kind for kinds in registry.all_kinds().values() for kind in kinds.values())


def _refusals() -> tuple[type[Exception], ...]:
    """What Hydra and OmegaConf raise for words that cannot be composed.

    ValueError comes from model=null, AssertionError from a word without a key, RecursionError from deep brackets.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException, ValueError, AssertionError, RecursionError


def _truths(config: Config, given: Mapping[str, str]) -> None:
    """Raises UserError for a word that gives a number where true or false is asked for: OmegaConf takes any but 0 as
    true."""
    for key, text in given.items():
        group, _, name = key.rpartition(".")
        if isinstance(getattr(getattr(config, group, None) if group else config, name, None), bool):
            with contextlib.suppress(ValueError):
                if float(text) not in (0, 1):
                    raise UserError(f"{key}={text}: give true or false")


def _typed(node: Chosen) -> Config:
    from omegaconf import OmegaConf

    config = Config()
    for f, value in _fields(Config, node, ""):
        if f.name in registry.GROUPS:
            kinds = registry.kinds(f.name).values()
            kind = OmegaConf.get_type(node, f.name)
            if kind is None or kind not in kinds:
                raise UserError(f"{f.name} has no settings: choose one with {f.name}={'|'.join(options(f.name))}")
            value = kind(**{inner.name: v for inner, v in _fields(kind, node[f.name], f"{f.name}.")})
        setattr(config, f.name, value)
    return config


def _groups(beneath: Config, given: dict[str, str]) -> list[str]:
    """Words that choose the options of a folder's configuration, for groups that no given word chooses."""
    names = {
        group: registry.name_of(group, getattr(beneath, group)) for group in registry.GROUPS if _theirs(beneath, group)
    }
    return [f"{group}={name}" for group, name in names.items() if group not in given and name in options(group)]


def _over(beneath: Config, config: Config, given: dict[str, str]) -> Config:
    """Changes the composed configuration in place: settings that no word gives become those of the folder."""
    for f in dataclasses.fields(Config):
        if not _theirs(beneath, f.name):
            continue
        theirs = getattr(beneath, f.name)
        if f.name not in registry.GROUPS:
            if f.name not in given:
                setattr(config, f.name, theirs)
            continue
        name = registry.name_of(f.name, theirs)
        if (
            type(theirs) is type(getattr(config, f.name)) and given.get(f.name, name) == name
        ):  # otherwise a preset was asked for
            for inner in dataclasses.fields(theirs):
                if _theirs(theirs, inner.name) and f"{f.name}.{inner.name}" not in given:
                    setattr(getattr(config, f.name), inner.name, getattr(theirs, inner.name))
    return config


def _model(kind: type[Settings], values: Json) -> Settings:
    """A model's settings from values by name, checked as those of a command line."""
    return kind(**{f.name: value for f, value in _fields(kind, values, "model.")})


def _theirs(settings: Chosen, name: str) -> bool:
    """Whether a run's folder may choose this setting of a configuration, or of one of its groups."""
    if name == "world":  # logical ranks are not processes, and their number shapes results
        return bool(settings.world.kind == "virtual")
    if name == "tokenizer":  # only these two are not files
        return settings.tokenizer in ("bytes", "bpe")
    return not next(f for f in dataclasses.fields(settings) if f.name == name).metadata["ours"]


def _fields(kind: type, node: Any, where: str) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yields each field with its plain value.

    Raises UserError for fields that are unknown or missing, and for values that are wrong by themselves.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in node:
        if key not in known:
            raise UserError(_unknown(f"{where}{key}"))
    hints = typing.get_type_hints(kind)
    for name, f in known.items():
        if name not in node:
            raise UserError(f"{where}{name} was taken away: every setting has a value, leave it at its default")
        value = node[name]
        if where == "" and name in registry.GROUPS:
            yield f, value
            continue
        if isinstance(value, (DictConfig, ListConfig)):
            value = OmegaConf.to_container(value, resolve=True)
        yield f, checked(f, hints[name], value, f"{where}{name}")


def _unknown(key: str) -> str:
    names = settings()
    if key in names:
        group, _, name = key.partition(".")
        kinds = registry.kinds(group)
        of = [option for option, kind in kinds.items() if name in {f.name for f in dataclasses.fields(kind)}]
        if name and len(of) < len(kinds):
            return (
                f"`{key}` belongs to {group}={'|'.join(of)} alone: choose it, or leave the setting out; among several "
                f"values give it to its own, {group}=...,{of[0]}+{key}=..."
            )
        return f"`{key}` cannot be added or taken away with + or ~, it is always there: give it a value, {key}=..."
    # A short word in the wrong place (lr for optim.lr) is found by its last part.
    near = difflib.get_close_matches(key, names, 2, 0.6) or [n for n in names if n.split(".")[-1] == key.split(".")[-1]]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`hvdllm train --help all` lists them all"
    return f"there is no setting `{key}`: {hint}"


def settings() -> list[str]:
    """The keys of all settings of all options, such as `optim.lr`."""
    names = [f.name for f in dataclasses.fields(Config)]
    for group, kinds in registry.all_kinds().items():
        names += [f"{group}.{f.name}" for kind in kinds.values() for f in dataclasses.fields(kind)]
    return list(dict.fromkeys(names))


def sentence(error: Exception, words: Sequence[str], sweep: bool = False) -> str:
    """One sentence for an error of Hydra or OmegaConf.

    Args:
        error: what was raised.
        words: that were to be composed.
        sweep: whether words may have several values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [typed(word, sweep) for word in words if not word.startswith(CONFIG_DIR)]
    for word in words:
        try:
            OverridesParser.create().parse_override(word)
        except (HydraException, ValueError):
            return f"`{word}` cannot be read: settings are given as key=value, values with special characters in quotes"
        if not re.fullmatch(r"[+]{0,2}[\w@./-]+=.*|~[\w@./-]+(=.*)?", word, re.S):
            return f"`{word}` cannot be read: settings are given as key=value"
    text = f"{error}\n{error.__cause__ or ''}"
    if found := re.search(r"Ambiguous value for argument '(.*)'|Sweep parameters '(.*)' requires", text):
        return f"`{found.group(1) or found.group(2)}` gives several values: `hvdllm train -m` trains with each of them"
    if "Config group override must be" in text:  # model=null, or a word without a key
        groups = ("", "experiment", *registry.GROUPS)
        parsed = {word: OverridesParser.create().parse_override(word) for word in words}
        odd = [w for w, p in parsed.items() if p.key_or_group in groups and not isinstance(p.value(), str)]
        word = odd[0] if odd else " ".join(words)
        return f"`{word}` cannot be read: a group takes the name of an option, model=tiny for example"
    if found := re.search(
        r"Could not find '(.*?)'.*?Available options in '(.*?)':\s*(.*?)(?:\n\s*Config|\n\n|$)", text, re.S
    ):
        what, group, names = found.groups()
        name, known = what.split("/")[-1], names.split()
        return f"there is no {group}={name}: choose one of {', '.join(known)}{meant(name, known)}"
    key = re.search(r"full_key: (\S+)", text)
    if found := re.search(r"Value '(.*?)'.*could not be converted to (\w+)", text):
        return f"{key.group(1) if key else 'a setting'}={found.group(1)}: not a value of type {found.group(2).lower()}"
    if found := re.search(r"field '([\w.]+)' is not Optional|Key '(\w+)' not in '", text):
        if found.group(1):
            return f"{key.group(1) if key else found.group(1)} cannot be null: give it a value"
        return _unknown(key.group(1) if key else found.group(2))
    if found := re.search(r"Could not (?:override|append|delete)[^']*'([^']*)'", text):
        return _unknown(found.group(1).lstrip("+~"))
    word = next((f"`{w}`: " for w in words if w in text), f"{key.group(1)}: " if key else "")
    return word + " ".join(str(error.__cause__ or error).split("\n")[0].split())
