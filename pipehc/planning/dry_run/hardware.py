"""How fast a GPU and its links are: a YAML file, one of those that are shipped or one's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipehc.config.strict_yaml import ConfigError, parse_yaml
from pipehc.planning.dry_run.kernels import KERNELS

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Cost = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Products(_Part):
    """Peaks in TFLOP/s, and what is reached of them."""

    bf16_tflops: Rate
    fp32_tflops: Rate
    efficiency: Share

    def rate(self, half: bool) -> float:
        """FLOP/s."""
        return 1e12 * (self.bf16_tflops if half else self.fp32_tflops) * self.efficiency


class Memory(_Part):
    gb_per_s: Rate
    efficiency: Share

    @property
    def rate(self) -> float:
        """Bytes/s."""
        return 1e9 * self.gb_per_s * self.efficiency


class Link(Memory):
    latency_us: Cost


class Reserved(_Part):
    """Memory that no tensor is in. allocator: of all that comes and goes, what roundings and fragments add."""

    context_gib: Cost
    group_mib: Cost
    allocator: Cost


class Hardware(_Part):
    """A kind of GPU, as in pipehc/planning/hardware/h100.yaml. kernels: what those of ours reach of the memory's rate, every byte
    counted once; those that are not there reach it."""

    name: str
    memory_gib: Rate
    gpus_per_node: Annotated[int, Field(gt=0)]
    matmul: Products
    attention: Products
    memory: Memory
    kernels: dict[Literal[tuple(KERNELS)], Rate] = {}  # type: ignore[valid-type]
    launch_us: Cost
    nvlink: Link
    network: Link
    reserved: Reserved

    def link(self, processes: int) -> Link:
        """What joins a group of neighbouring processes."""
        return self.nvlink if processes <= self.gpus_per_node else self.network


_SHIPPED = resources.files("pipehc.planning") / "hardware"


def shipped() -> list[str]:
    """Names of the files that are there."""
    return sorted(file.name.removesuffix(".yaml") for file in _SHIPPED.iterdir() if file.name.endswith(".yaml"))


def load_hardware(name: str, key: str = "--gpu") -> Hardware:
    """A shipped file by its name, or any by its path. key: what the user wrote it to.

    Raises ConfigError that names file, key, value and what is allowed.
    """
    if name in shipped():
        text = (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key} {name}: cannot be read: {error}") from error
    else:
        raise ConfigError(f"{key} {name}: no such GPU; must be {', '.join(shipped())} or a .yaml file")
    try:
        return Hardware.model_validate(parse_yaml(text))
    except ConfigError as error:
        raise ConfigError(f"{key} {name}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{key} {name}: {'; '.join(map(_words, error.errors()))}") from None


def _words(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "the file"
    if detail["type"] == "missing":
        return f"{key} is missing; see pipehc/planning/hardware/h100.yaml for all keys"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; see pipehc/planning/hardware/h100.yaml for all keys"
    return f"{key}: {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
