"""What every part of a job spec is made of: refused unknown keys, resources, names. Used by the other spec modules."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from medgen import as_written, sbatch_options
from medgen.names import CONTROL, OptionWord
from medgen.units import Mebibytes, Minutes

STAGE_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Frozen(BaseModel):
    """Base of everything a user can write: unknown keys refused, values fixed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        for name, field in cls.model_fields.items():
            if isinstance(value, dict) and name in value:
                told = as_written.problem(value[name], field.annotation, field.metadata)
                if told is not None:
                    raise ValueError(f"{name}: {told}")
        return value


def _directive(value: str) -> str:
    """One line of sbatch options such as `--partition=GPUQ`, without the `#SBATCH`."""
    text = value.strip().removeprefix("#SBATCH").strip()
    if not text.startswith("-") or CONTROL.search(text):
        raise ValueError(f"not a line of sbatch options: {value!r}; write for example --partition=GPUQ")
    sbatch_options.options_of(text)  # raises ValueError for an open quote
    return text


Directive = Annotated[str, AfterValidator(_directive)]


class GpuRequest(Frozen):
    """Which GPUs will do; the site profile turns the names into features."""

    any_of: list[OptionWord] = []
    prefer: OptionWord | None = None
    memory: Mebibytes | None = None

    @model_validator(mode="after")
    def _prefer_is_allowed(self) -> GpuRequest:
        if self.prefer and self.any_of and self.prefer not in self.any_of:
            raise ValueError(f"prefer: {self.prefer} is not among any_of: {', '.join(self.any_of)}")
        return self


class Resources(Frozen):
    """What one task of a stage needs. Never part of a run's identity: other resources, same run."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    gpus: int | None = Field(None, ge=0)
    processes: int | None = Field(None, ge=1)  # ranks per node where there is no GPU (gloo)
    gpu: GpuRequest | None = None
    time: Minutes | None = None
    mem: Mebibytes | None = None
    cpus: int | None = Field(None, ge=1)
    setup: list[str] = []  # lines after those of the site, before the command
    slurm: list[Directive] = []  # directives as sbatch reads them; each takes the place of medgen's own for that option

    @model_validator(mode="after")
    def _gpu_needs_gpus(self) -> Resources:
        if self.gpu is not None and self.gpus_asked == 0:
            raise ValueError("gpu says which GPUs will do, but no GPU is asked for; remove gpu, or write gpus: 1")
        return self

    @model_validator(mode="after")
    def _one_way_to_count_gpus(self) -> Resources:
        if self.gpus is not None and self.gpus_per_node is not None:
            raise ValueError("gpus and gpus_per_node both given; keep gpus_per_node for several nodes, gpus for one")
        if self.gpus is not None and self.nodes > 1:
            raise ValueError("gpus counts the GPUs of one node; with nodes write gpus_per_node")
        if self.processes is not None and self.gpus_asked:
            raise ValueError("processes is for runs without GPUs; with GPUs there is one process per GPU")
        return self

    @property
    def gpus_asked(self) -> int | None:
        """GPUs per node, or None if nothing was said."""
        return self.gpus_per_node if self.gpus_per_node is not None else self.gpus


def _stage_name(value: str) -> str:
    if not STAGE_NAME.fullmatch(value):
        raise ValueError(f"stage names are up to 60 lower-case letters, digits and _, got {value[:80]!r}")
    return value


def _variable_name(value: str) -> str:
    if not VARIABLE_NAME.fullmatch(value):
        raise ValueError(f"not a name for a shell variable: {value!r}")
    return value


StageName = Annotated[str, AfterValidator(_stage_name)]
VariableName = Annotated[str, AfterValidator(_variable_name)]


class StageSpec(Frozen):
    """What all stages share."""

    needs: list[StageName] = []
    resources: Resources = Resources()

    def inputs(self) -> list[str]:
        """The stages that must be finished before this one."""
        return list(self.needs)
