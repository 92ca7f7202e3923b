"""Plans of training runs: FLOPs, memory, sharding, hours and cost, estimated before the run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedConfig

from diffusify.config import nearest, to_plain
from diffusify.models.loading import load_config, network_class
from diffusify.models.lora import Lora, check_lora, own_adapters
from diffusify.models.make_denoiser import check_fit
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import default_recipe, saved_recipe
from diffusify.planning.devices import DEVICES, DeviceGroup
from diffusify.planning.footprint import DTYPES, Footprint, ParameterCounts, TrainingSetup, count_parameters, footprint

GIB = 2**30
FLOAT32, ADAMW = 4.0, 8.0  # bytes per weight: of the weight itself, and of AdamW's two moments
OVERHEAD, FRAGMENTATION = 1.0 * GIB, 0.05  # the device's context and libraries; the share of activations lost in gaps
MIN_TOKENS = 4096  # per device and pass; below this, activation checkpointing with more rows is faster
MAX_ROWS = 64  # per device and pass; more rows do not make matrix products more efficient

Sharding = Literal["single", "DDP", "ZeRO-2", "ZeRO-3"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at a step's peak, by use.

    `weights` are the float32 weights that the optimizer updates. `copies` are weights in the compute dtype (gathered
    ones under sharding), `optimizer` AdamW's moments, `exchange` communication buffers for gradients, `rest` the
    allowance for libraries and fragmentation.
    """

    weights: float
    copies: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    exchange: float
    rest: float

    @property
    def total(self) -> float:
        """The sum of all uses."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ShardingLayout:
    """A sharding strategy, with or without checkpointing, and the most rows that fit on one device (0: none)."""

    sharding: Sharding
    checkpointing: bool
    rows: int


@dataclass(frozen=True)
class Suggestion:
    """A change that would make a run fit, and the option of `diffusify plan` for it."""

    what: str
    option: str


@dataclass(frozen=True)
class Plan:
    """The estimated resources of a training run.

    `layout` is None if the run does not fit; then `suggestions` lists changes that would make it fit. `memory` is for
    `rows` rows on each device, `memory_checkpointed` with activation checkpointing. FLOPs are per token of text: a
    token that a step shows several times counts once.
    """

    model: str
    tokens: float
    devices: DeviceGroup
    setup: TrainingSetup
    parameters: ParameterCounts
    sharding: Sharding
    layout: ShardingLayout | None
    rows: int
    memory: Memory
    memory_checkpointed: Memory
    flops_per_token: float
    recomputed_per_token: float
    utilisation: float
    price: float | None
    suggestions: tuple[Suggestion, ...]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed; also True if the run does not fit."""
        return self.layout is None or self.layout.checkpointing

    @property
    def steps(self) -> int:
        """The number of optimizer steps if each is one pass over `rows` rows on every device."""
        return max(1, round(self.tokens / (self.rows * self.setup.length * self.devices.count)))

    @property
    def flops(self) -> float:
        """The run's FLOPs, without recomputation."""
        return self.tokens * self.flops_per_token

    @property
    def tokens_per_second(self) -> float:
        """The throughput of all devices, at `utilisation` of their peak, recomputation included."""
        executed = self.flops_per_token + self.checkpointing * self.recomputed_per_token
        return self.devices.count * self.devices.device.peak(self.setup.dtype) * self.utilisation / executed

    @property
    def hours(self) -> float:
        """The run's duration."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def device_hours(self) -> float:
        """The run's duration times the number of devices."""
        return self.hours * self.devices.count

    @property
    def cost(self) -> float | None:
        """The run's cost in the currency of `price`; None without a price."""
        return None if self.price is None else self.device_hours * self.price

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types; bytes and FLOPs are plain numbers."""
        setup, layout = self.setup, None if self.layout is None else {"type": "Layout"} | asdict(self.layout)
        given = {name: getattr(self, name) for name in ("model", "tokens", "rows", "sharding", "utilisation", "price")}
        derived = ("steps", "flops", "tokens_per_second", "hours", "device_hours", "cost")
        return (
            given
            | {"fits": self.layout is not None, "checkpointing": self.checkpointing}
            | {"device": asdict(self.devices.device), "devices": self.devices.count}
            | {"recipe": to_plain(setup.recipe), "length": setup.length, "dtype": setup.dtype}
            | {"lora": to_plain(setup.lora), "parameters": asdict(self.parameters) | {"body": self.parameters.body}}
            | {"flops_per_token": self.flops_per_token, "recomputed_per_token": self.recomputed_per_token}
            | {name: getattr(self, name) for name in derived}
            | {"layout": layout, "remedies": [asdict(suggestion) for suggestion in self.suggestions]}
            | {
                name: asdict(memory) | {"total": memory.total}
                for name, memory in (("memory", self.memory), ("memory_checkpointed", self.memory_checkpointed))
            }
        )


def plan(
    model: str | PreTrainedConfig,
    *,
    tokens: float,
    gpus: str | DeviceGroup = "cpu",
    recipe: Recipe | None = None,
    length: int = 256,
    batch: int | None = None,
    lora: Lora | None = None,
    dtype: str | None = None,
    utilisation: float | None = None,
    price: float | None = None,
) -> Plan:
    """Estimate what a run of `adapt` or `tune` takes; no weights are read.

    `model` is a source for `load_base`, a diffusion model, a path of a config.json, or a config. `gpus` is the devices,
    such as 64xH100; `batch` the rows of `length` tokens on each at a time (by default the most that fit); `utilisation`
    the share of their peak (by default the device's own); `price` that of one device for one hour. A model that has
    adapters continues with them. ValueError for invalid settings.
    """
    devices = DeviceGroup.parse(gpus) if isinstance(gpus, str) else gpus
    dtype = dtype or devices.device.dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not known{nearest(dtype, DTYPES)}')
    devices.device.peak(dtype)
    utilisation = devices.device.utilisation if utilisation is None else utilisation
    _check(tokens=tokens, length=length, batch=batch, utilisation=utilisation, price=price)
    source = model if isinstance(model, str) else model.model_type
    base, own = (isinstance(model, str) and own_adapters(model)) or (model, lora)
    config = load_config(base) if isinstance(base, str) else base
    network, masked = network_class(config, source)
    recipe = recipe or saved_recipe(source) or default_recipe(masked=masked)
    check_fit(source, masked, recipe)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"length={length} is more than the {context} tokens of {source}'s context; use less")
    check_lora(source, lora, recipe)
    setup = TrainingSetup(network, config, recipe, length, dtype, own)
    parameters = count_parameters(setup)
    layouts = list(_candidate_layouts(setup, parameters, devices, batch))
    best = next((layout for layout in layouts[::-1] if layout.rows >= (batch or 1)), None)
    sharding = (best or layouts[-1]).sharding
    rows = batch or (1 if best is None else min(MAX_ROWS, 1 << (best.rows.bit_length() - 1)))
    step, checkpointed = (_step(setup, sharding, checkpointing, rows) for checkpointing in (False, True))
    return Plan(
        source, tokens, devices, setup, parameters, sharding, best, rows,
        memory=memory(setup, parameters, sharding, devices.count, step),
        memory_checkpointed=memory(setup, parameters, sharding, devices.count, checkpointed),
        flops_per_token=step.flops / (rows * length),
        recomputed_per_token=(checkpointed.flops - step.flops) / (rows * length),
        utilisation=utilisation,
        price=price,
        suggestions=() if best else tuple(_suggestions(setup, parameters, devices, batch)),
    )  # fmt: skip


def memory(
    setup: TrainingSetup, parameters: ParameterCounts, sharding: Sharding, device_count: int, step: Footprint
) -> Memory:
    """The memory of one of `device_count` devices at a step's peak."""
    shards = device_count if sharding in ("ZeRO-2", "ZeRO-3") else 1
    width = DTYPES[setup.dtype].itemsize
    # ZeRO-3 gathers a layer while the one before it is in use.
    gathered = {"ZeRO-2": parameters.total, "ZeRO-3": parameters.root + 2 * parameters.layer}
    exchange = {"DDP": FLOAT32 * parameters.trained, "single": 0.0}
    bucket = min(parameters.trained, max(parameters.root, parameters.layer))
    return Memory(
        weights=(FLOAT32 * (parameters.total - parameters.half) + width * parameters.half) / shards,
        copies=step.copies + width * gathered.get(sharding, 0),
        gradients=FLOAT32 * parameters.trained / shards,
        optimizer=ADAMW * parameters.trained / shards,
        activations=step.activations,
        logits=step.logits,
        exchange=exchange.get(sharding, 2.0 * width * bucket),
        rest=OVERHEAD + FRAGMENTATION * (step.activations + step.logits),
    )


def _candidate_layouts(
    setup: TrainingSetup, parameters: ParameterCounts, devices: DeviceGroup, batch: int | None
) -> Iterator[ShardingLayout]:
    """Layouts from the fastest to the most economical, up to the first that fits `batch` rows or `MIN_TOKENS` tokens.

    If there is none and `batch` is unset, the last one is the fastest layout that fits any row.
    """
    strategies: tuple[Sharding, ...] = ("single",) if devices.count == 1 else ("DDP", "ZeRO-2", "ZeRO-3")
    enough = batch or min(MAX_ROWS, -(-MIN_TOKENS // setup.length))
    fitting = []
    for checkpointing in (False, True):
        for sharding in strategies:
            rows = _max_rows(setup, parameters, sharding, checkpointing, devices)
            layout = ShardingLayout(sharding, checkpointing, rows)
            yield layout
            if layout.rows >= enough:
                return
            fitting += [layout] if layout.rows and not batch else []
    yield from fitting[:1]


def _max_rows(
    setup: TrainingSetup, parameters: ParameterCounts, sharding: Sharding, checkpointing: bool, devices: DeviceGroup
) -> int:
    """The most rows that fit on a device."""

    def free(step: Footprint) -> float:
        return devices.device.memory * GIB - memory(setup, parameters, sharding, devices.count, step).total

    if free(Footprint(0.0, 0.0, 0.0, 0.0)) < 0:  # weights and optimizer alone do not fit, so no step is counted
        return 0
    one, two = (free(_step(setup, sharding, checkpointing, rows)) for rows in (1, 2))
    return int(1 + one / (one - two)) if one >= 0 else 0


_COUNTED_ROWS = (4, 16)


@lru_cache(maxsize=64)
def _counted_steps(setup: TrainingSetup, gathered: bool, checkpointing: bool) -> tuple[Footprint, Footprint]:
    first, last = (footprint(setup, rows, checkpointing=checkpointing, gathered=gathered) for rows in _COUNTED_ROWS)
    return first, last


def _step(setup: TrainingSetup, sharding: Sharding, checkpointing: bool, rows: int) -> Footprint:
    """The footprint of a step with any number of rows, by linear interpolation between two counted ones."""
    first, last = _counted_steps(setup, sharding in ("ZeRO-2", "ZeRO-3"), checkpointing)
    share = (rows - _COUNTED_ROWS[0]) / (_COUNTED_ROWS[1] - _COUNTED_ROWS[0])
    values = {field.name: getattr(first, field.name) for field in fields(Footprint)}
    return Footprint(**{name: value + share * (getattr(last, name) - value) for name, value in values.items()})


def _suggestions(
    setup: TrainingSetup, parameters: ParameterCounts, devices: DeviceGroup, batch: int | None
) -> Iterator[Suggestion]:
    """Changes of one option each that would make a run fit."""

    def fitting(setup: TrainingSetup, parameters: ParameterCounts, devices: DeviceGroup) -> ShardingLayout | None:
        layouts = _candidate_layouts(setup, parameters, devices, batch)
        return next((layout for layout in layouts if layout.rows >= (batch or 1)), None)

    def described(layout: ShardingLayout) -> str:
        return layout.sharding + (" and activation checkpointing" if layout.checkpointing else "")

    if batch:
        layouts = [layout for layout in _candidate_layouts(setup, parameters, devices, MAX_ROWS) if layout.rows]
        if layouts:
            layout = max(layouts, key=lambda layout: layout.rows)
            rows = 1 << (layout.rows.bit_length() - 1)  # a power of 2, which divides the texts of `reinforce`
            yield Suggestion(f"fewer rows at a time, with {described(layout)}", f"--batch {rows}")
    for count in (devices.count * 2**k for k in range(1, 11)):
        if layout := fitting(setup, parameters, replace(devices, count=count)):
            yield Suggestion(f"more devices, with {described(layout)}", f"--gpus {count}x{devices.device.name}")
            break
    for device in sorted(DEVICES.values(), key=lambda device: device.memory):
        larger = replace(devices, device=device)
        if device.memory > devices.device.memory and (layout := fitting(setup, parameters, larger)):
            yield Suggestion(f"larger devices, with {described(layout)}", f"--gpus {larger}")
            break
    for length in (setup.length >> k for k in (1, 2, 3) if setup.length >> k >= 32):
        if layout := fitting(replace(setup, length=length), parameters, devices):
            yield Suggestion(f"shorter rows, with {described(layout)}", f"--length {length}")
            break
    if setup.lora is None:
        adapters = replace(setup, lora=Lora())
        if layout := fitting(adapters, count_parameters(adapters), devices):
            yield Suggestion(f"adapters instead of all weights, with {described(layout)}", f"--lora {Lora().rank}")


def _check(**given: Any) -> None:
    bounds = {
        "tokens": (lambda v: 0 < v < float("inf"), "above 0, as 65e9"),
        "length": (lambda v: v >= 2, "at least 2"),
        "batch": (lambda v: v is None or v >= 1, "at least 1; leave it unset for the most that fit"),
        "utilisation": (lambda v: 0 < v <= 1, "in (0, 1], the share of the peak"),
        "price": (lambda v: v is None or 0 <= v < float("inf"), "0 or more, for an hour of one device"),
    }
    for name, value in given.items():
        valid, requirement = bounds[name]
        if not valid(value):
            raise ValueError(f"{name}={value} must be {requirement}")
