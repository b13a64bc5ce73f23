"""Settings as people give them: in a YAML file, on the command line, from Python."""

import contextlib
import dataclasses
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from opcd.config.fields import FIELDS, GROUPS, TrainConfig
from opcd.config.presets import PRESETS
from opcd.errors import InputError, did_you_mean
from opcd.runtime.files import write_text
from opcd.runtime.strict_yaml import dump_yaml, parse_yaml, read_yaml
from opcd.runtime.user_code import located

FORMAT = 1  # of the file
WRITTEN = "# Written by opcd: the settings of this run."
KINDS = {name: get_type_hints(TrainConfig)[name] for name in FIELDS}
INPUT_FILES = (
    *("context", "prompts", "validation_data", "test_data", "elsewhere_data"),
    *("chat_template", "guided_completions", "replay_data"),
)
FILES_BY_NAME = ("test_sets",)
MODELS = ("model", "teacher")
# What nobody but a run or a loop leaves.
OF_A_RUN = (
    *("metrics.jsonl", "scorecard.json", "evidence.json", "guided.jsonl", "final/selection.json"),
    *("rounds.jsonl", "round-1", "rivals/rivals.jsonl"),
)
CODE = ("scorer", "trackers")  # fields that may name a Python function
_FIELD_LINE, _ORIGIN = re.compile(r"  (\w+):"), re.compile(r"  # (.+)$")
REQUIRED = [
    f.name
    for f in dataclasses.fields(TrainConfig)
    if f.default is f.default_factory is dataclasses.MISSING
]
RENAMED = {"eval_data": "test_data", "sequences_per_pass": "max_tokens_per_pass (in tokens)"}
WORDS = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text"},
    list[str]: 'a list of texts, like ["###"]',
}


def gather(
    given: Mapping[str, Any],  # by the caller: text of a command line, or values
    file: Path | None = None,
    preset: str | None = None,
    caller: str = "command line",
    leave_out: str = "",
) -> TrainConfig:
    """The configuration of a preset, overridden by a file, overridden by what is given.

    leave_out: a group of the file that is another's to read.
    Input files are found from the folder of the file that names them, else from the current one.
    Raises InputError for fields that are unknown or missing, and for values of another kind.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        own, values = read_config_file(file, leave_out)
        preset = preset or own
        layers = [(file.name, values)]
    if preset is not None:
        layers.insert(0, (f"preset {preset}", _preset(preset)))
    layers.append((caller, _located(converted(given, caller), Path.cwd())))
    values = {}
    origins: dict[str, str] = {}
    of_run = file is not None and written_here(file)
    for origin, layer in layers:
        # A run's file holds every field: what it says of their origins stays, unless they change.
        named = [n for n in layer if not (of_run and n in values and values[n] == layer[n])]
        values |= layer
        if of_run and file is not None and origin == file.name:
            origins |= _origins_in(file)
        else:
            origins |= dict.fromkeys(named, origin)
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise InputError(
            f"{_listed(missing)} must be given, in a configuration file or by name; `opcd init "
            f"FOLDER` writes an example"
        )
    return TrainConfig(**values, origins=origins)


def refuse_code(
    named: Mapping[str, str],  # Python code, by the field that names it
    command: str,
    given: Container[str] = (),  # fields that the user has named
    called: Container[str] | None = None,  # fields whose code the command calls; None: all
) -> None:
    """Raise InputError for code that the command would call and the user has not named.

    The configuration in a run folder is not the user's own where a stranger made the folder.
    """
    for name, value in named.items():
        if name not in given and (called is None or name in called):
            raise InputError(
                f"{command} runs no Python code that a file in a run's folder names, got {name} "
                f"{value!r}; look at it, then allow it (--allow-code, in Python allow_code=True)"
            )


def of_a_run(file: str | Path | None) -> bool:
    """Whether a configuration file lies directly in the folder of a run or of a loop, or was
    written for one."""
    if file is None or not Path(file).is_file():
        return False
    folder = Path(file).parent
    return written_here(Path(file)) or any((folder / name).exists() for name in OF_A_RUN)


def code_of(config: TrainConfig) -> dict[str, str]:
    """The fields in which a configuration names Python code, and what they name."""
    values = {name: getattr(config, name) for name in CODE}
    found = {
        name: value
        for name, value in values.items()
        if any(part.strip().startswith("python:") for part in value.split(","))
    }
    # A task file of lm-eval may name functions, which it imports.
    tasks = config.elsewhere_tasks
    if any(part.strip().endswith((".yaml", ".yml")) for part in tasks.split(",")):
        found["elsewhere_tasks"] = tasks
    return found


def read_config_file(path: Path, leave_out: str = "") -> tuple[str | None, dict[str, Any]]:
    """The preset that a configuration file names, and its values by field.

    leave_out: a group that is another's to read.

    Raises InputError for what is no such file.
    """
    content = read_yaml(path, "a configuration")
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} must hold settings in groups ({', '.join(GROUPS)}), got "
            f"{type(content).__name__}; `opcd init FOLDER` writes an example"
        )
    if content.pop("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path} must have format {FORMAT}, got another: it was written for another version of "
            f"opcd; install that, or write the file anew"
        )
    preset = content.pop("preset", None)
    content.pop(leave_out, None)
    _check_groups(content, path)
    values: dict[str, Any] = {}
    for group, members in content.items():
        for name in members or {}:
            if FIELDS.get(name, group) != group:
                raise InputError(
                    f"{path}: {name} must stand in the group {FIELDS[name]}, got it in {group}; "
                    f"move it"
                )
        values |= members or {}
    return preset, _located(converted(values, str(path)), path.parent)


def write_config(config: TrainConfig, path: Path) -> None:
    """Write every field, resolved, and behind each where its value came from.

    Input files beside `path` or below are named from there, so that the folder may move.
    """
    lines = [WRITTEN, f"format: {FORMAT}"]
    for group in GROUPS:
        lines.append(f"\n{group}:")
        for name in (name for name, its in FIELDS.items() if its == group):
            value = dump_yaml({name: _from(path.parent, name, config)}).rstrip("\n")
            origin = f"  # {config.origins[name]}" if name in config.origins else ""
            lines += [f"  {line}" for line in value.split("\n")]
            lines[-1] += origin
    write_text(path, "\n".join(lines) + "\n")


def _from(folder: Path, name: str, config: TrainConfig) -> Any:
    """A field's value, an input's path from `folder` where it lies in it."""
    value = getattr(config, name)
    if name in FILES_BY_NAME:
        return {key: _inside(folder, path) for key, path in value.items()}
    return _inside(folder, value) if name in (*INPUT_FILES, *MODELS) and value else value


def _inside(folder: Path, path: str) -> str:
    """A path from a folder where it lies in it."""
    if Path(path).is_absolute():
        with contextlib.suppress(ValueError):
            return Path(path).relative_to(folder.absolute()).as_posix()
    return path


def _origins_in(path: Path) -> dict[str, str]:
    """Where `write_config` said that the values of a file came from."""
    found: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if started := _FIELD_LINE.match(line):
            name = started[1]
        if told := _ORIGIN.search(line):
            found[name] = told[1]
    return {name: origin for name, origin in found.items() if name in FIELDS}


def written_here(path: Path) -> bool:
    """Whether `write_config` wrote a file, and no person."""
    try:
        return path.read_text(encoding="utf-8").startswith(WRITTEN)
    except (OSError, UnicodeDecodeError):
        return False


def converted(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values in the kinds of their fields. Raises InputError for others and for unknown fields."""
    for name in values:
        if name not in FIELDS:
            raise InputError(f"{source}: {_unknown_field(name)}")
    return {name: _converted(name, value, source) for name, value in values.items()}


def _unknown_field(name: str) -> str:
    """What is said of a field that there is not."""
    hint = f"; it is {RENAMED[name]} now" if name in RENAMED else did_you_mean(name, FIELDS)
    return f"there is no field {name!r}{hint}"


def _converted(name: str, value: Any, source: str) -> Any:
    return converted_to(KINDS[name], name, value, source)


def converted_to(kind: Any, name: str, value: Any, source: str) -> Any:
    """`value`, or what its text spells, in the kind of the field. Raises InputError for others."""
    optional = type(None) in get_args(kind)
    if optional:
        if value is None or value == "null":
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    try:
        return _as(kind, value)
    except (ValueError, TypeError, KeyError, OverflowError):
        if get_origin(kind) is Literal:
            options = get_args(kind)
            words = f"one of {', '.join(options)}"
            hint = did_you_mean(str(value), options)
        else:
            example = (
                "{typos: typos.jsonl}" if name in FILES_BY_NAME else "{enable_thinking: false}"
            )
            words = WORDS.get(kind, f"a mapping, like {example}")
            hint = "; put it in quotes" if kind is str and isinstance(value, (int, float)) else ""
            if name in INPUT_FILES and isinstance(value, (dict, list)):
                hint = "; write it into a .json file, and name that"
        words += " or null" if optional else ""
        raise InputError(f"{source}: {name} must be {words}, got {value!r:.80}{hint}") from None


def _as(kind: Any, value: Any) -> Any:
    """`value` as `kind`. Raises ValueError or TypeError where it is none."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError
        return value
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if get_origin(kind) in (dict, list):
        value = parse_yaml(value) if isinstance(value, str) else value
        if not isinstance(value, get_origin(kind)):
            raise TypeError
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise TypeError
        return value
    if kind is bool:
        spelled = {"true": True, "false": False}
        return value if isinstance(value, bool) else spelled[str(value).lower()]
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if kind is float:
        return number
    return int(value) if isinstance(value, (str, int)) and _digits(value) else _whole(number)


def _digits(value: str | int) -> bool:
    return isinstance(value, int) or value.strip().lstrip("+-").isdigit()


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError
    return int(number)


def _located(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the paths of input files made absolute, as they are found from `folder`."""
    found = dict(values)
    for name in INPUT_FILES:
        if isinstance(path := values.get(name), str) and path.strip():
            found[name] = str((folder / Path(path).expanduser()).absolute())
    for name in set(FILES_BY_NAME) & set(values):
        found[name] = {
            key: str((folder / Path(path).expanduser()).absolute())
            if isinstance(path, (str, Path)) and str(path).strip()
            else path  # refused where it is checked
            for key, path in values[name].items()
        }
    for name in CODE:
        if name in values:
            found[name] = ",".join(_code(part, folder) for part in values[name].split(","))
    if values.get("output_dir", "").startswith("~"):
        found["output_dir"] = str(Path(values["output_dir"]).expanduser())
    for name in MODELS:
        if isinstance(path := values.get(name), str) and path.strip():
            local = folder / Path(path).expanduser()
            if local.exists() or path.startswith("."):
                found[name] = str(local.absolute())
    return found


def _code(name: str, folder: Path) -> str:
    """``python:FILE.py:function`` with the file as it is found from `folder`."""
    kind, colon, target = name.strip().partition(":")
    return f"python:{located(target, folder)}" if kind == "python" and colon else name


def _preset(name: Any) -> Mapping[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(
            f"preset must be one of {', '.join(PRESETS)}, got {name!r}"
            f"{did_you_mean(str(name), PRESETS)}"
        )
    return PRESETS[name]


def _check_groups(content: dict[Any, Any], path: Path) -> None:
    loose = [name for name in content if name in FIELDS or name in RENAMED]
    if loose:
        raise InputError(
            f"{path} must hold its fields in groups, got {_listed(loose)} outside of any; write\n"
            f"{_grouped(content)}"
        )
    for name, members in content.items():
        if name not in GROUPS:
            raise InputError(
                f"{path}: a group must be one of {', '.join(GROUPS)}, got {name!r}"
                f"{did_you_mean(str(name), GROUPS)}"
            )
        if members is not None and not isinstance(members, dict):
            raise InputError(f"{path}: the group {name} must hold fields, got {members!r:.80}")


def _grouped(content: Mapping[Any, Any]) -> str:
    """The fields of a file as they would stand in their groups."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        name = RENAMED.get(name, name).partition(" ")[0]
        groups.setdefault(FIELDS.get(name, name), {})[name] = value
    ordered = {name: groups[name] for name in GROUPS if name in groups}
    return dump_yaml({"format": FORMAT} | ordered).rstrip("\n")


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
