"""What the user reads about a wrong configuration: key, value, what is allowed, the nearest name of an unknown key."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from typing import Any

from pipehc.config.schema import Config, Section


def sections() -> list[str]:
    return list(Config.model_fields)


def keys(section: str) -> list[str]:
    model = Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, Section)
    return list(model.model_fields)


def nearest(section: str, key: str) -> str:
    """Advice on an unknown `section.key`, or on an unknown section with key ''."""
    names = [f"{known}.{leaf}" for known in sections() for leaf in keys(known)]
    leaf = key or section
    elsewhere = [name for name in names if name.endswith(f".{leaf}")]
    if not key:
        near = difflib.get_close_matches(section, sections(), 1, 0.6) or elsewhere
    elif section in sections():
        near = elsewhere or [f"{section}.{match}" for match in difflib.get_close_matches(key, keys(section), 1, 0.6)]
    else:
        near = difflib.get_close_matches(f"{section}.{key}", names, 1, 0.6) or elsewhere
    if near:
        return f"did you mean {near[0]}?"
    if section in sections():
        return f"{section} has the keys {', '.join(keys(section))}"
    return f"the sections are {', '.join(sections())}"


def show(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, (int, float)):
        return str(value) if isinstance(value, float) or abs(value) < 10**40 else "a number of more than 40 digits"
    return repr(value) if isinstance(value, str) and len(value) <= 80 else reprlib.repr(value)


_MUST = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text (in quotes if it looks like a number)",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "tuple_type": "must be a list",
    "too_long": "must have at most {max_length} entries",
}


def messages(detail: Any) -> Iterator[str]:
    """A pydantic error in the words of the file: key, value, what is allowed."""
    kind, location, value, context = detail["type"], detail["loc"], detail["input"], detail.get("ctx", {})
    name = "".join(f"[{part}]" if isinstance(part, int) and depth else f".{part}" for depth, part in enumerate(location))[1:]
    section = str(location[0]) if location else ""
    if kind == "value_error":
        yield from str(context["error"]).splitlines()
    elif kind == "extra_forbidden":
        yield f"{name}: unknown key (value {show(value)}); {nearest(section, '.'.join(map(str, location[1:])))}"
    elif kind == "invalid_key":
        yield f"{'.'.join(map(str, location[:-1])) or 'the file'}: key {location[-1]} is not text; the keys are words"
    elif kind == "missing":
        if len(location) == 1:
            yield f"{name}: missing; must be a section with the keys {', '.join(keys(section))}"
        elif isinstance(location[-1], int):
            yield f"{name.removesuffix(f'[{location[-1]}]')}: {show(value)}: must be a pair of numbers"
        else:
            yield f"{name}: missing; must be set, it has no default"
    elif kind in ("model_type", "model_attributes_type"):
        yield f"{name}: {show(value)}: must be a section with the keys {', '.join(keys(section))}"
    else:
        yield f"{name}: {show(value)}: " + _MUST.get(kind, detail["msg"]).format(**context)
