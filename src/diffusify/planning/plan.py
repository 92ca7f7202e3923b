"""What a training run will take, told before anything is spent: FLOPs, memory, sharding, hours, money."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedConfig

from diffusify.config import nearest, to_plain
from diffusify.models.loading import load_config, network_class
from diffusify.models.lora import Lora
from diffusify.models.recipes import Recipe, block, of_model
from diffusify.planning.devices import DEVICES, Fleet
from diffusify.planning.footprint import DTYPES, Footprint, Sizes, Subject, footprint, sizes
from diffusify.training.adapt import check_fit

GIB = 2**30
FLOAT32, ADAMW = 4.0, 8.0  # bytes of a weight, and of both its moments
REST, SCATTERED = 1.0 * GIB, 0.05  # the device's context and libraries, and memory that is lost between tensors
ENOUGH_TOKENS = 4096  # on a device at a time; with fewer, recomputing activations is the better bargain
MOST_ROWS = 64  # products are as large as they need to be long before

Sharding = Literal["single", "DDP", "ZeRO-2", "ZeRO-3"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at a step's peak, by part.

    `weights` are float32: what the optimizer changes. `copies` are those in the type that is computed with (or gathered
    ones, under sharding), `optimizer` AdamW's moments, `exchange` buffers of gradients on their way to other devices.
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
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Layout:
    """A way to lay a run over devices, and the most rows of text that one device then takes (0: it does not fit)."""

    sharding: Sharding
    checkpointing: bool
    rows: int


@dataclass(frozen=True)
class Remedy:
    """What would make a run fit, and the option of `diffusify plan` that says it."""

    what: str
    option: str


@dataclass(frozen=True)
class Plan:
    """What a run takes. `layout` is None where it does not fit, and then `remedies` tell what would.

    `memory` is for `rows` rows on each device, `memory_checkpointed` with activations computed again instead of kept.
    FLOPs are those of text tokens: a token that is shown several times in a step counts once.
    """

    model: str
    tokens: float
    fleet: Fleet
    subject: Subject
    sizes: Sizes
    sharding: Sharding
    layout: Layout | None
    rows: int
    memory: Memory
    memory_checkpointed: Memory
    flops_per_token: float
    recomputed_per_token: float
    utilisation: float
    price: float | None
    remedies: tuple[Remedy, ...]

    @property
    def checkpointing(self) -> bool:
        return self.layout is None or self.layout.checkpointing

    @property
    def steps(self) -> int:
        """Optimizer steps, if each is one pass of `rows` rows on every device."""
        return max(1, round(self.tokens / (self.rows * self.subject.length * self.fleet.count)))

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token

    @property
    def tokens_per_second(self) -> float:
        executed = self.flops_per_token + self.checkpointing * self.recomputed_per_token
        return self.fleet.count * self.fleet.device.peak(self.subject.dtype) * self.utilisation / executed

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.fleet.count

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.device_hours * self.price

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; bytes and FLOPs are plain numbers."""
        subject, told = self.subject, ("steps", "flops", "tokens_per_second", "hours", "device_hours", "cost")
        mine = {name: getattr(self, name) for name in ("model", "tokens", "rows", "sharding", "utilisation", "price")}
        return (
            mine
            | {"fits": self.layout is not None, "checkpointing": self.checkpointing}
            | {"device": asdict(self.fleet.device), "devices": self.fleet.count}
            | {"recipe": to_plain(subject.recipe), "length": subject.length, "dtype": subject.dtype}
            | {"lora": to_plain(subject.lora), "parameters": asdict(self.sizes) | {"body": self.sizes.body}}
            | {"flops_per_token": self.flops_per_token, "recomputed_per_token": self.recomputed_per_token}
            | {name: getattr(self, name) for name in told}
            | {"layout": to_plain(self.layout), "remedies": [asdict(remedy) for remedy in self.remedies]}
            | {
                name: asdict(memory) | {"total": memory.total}
                for name, memory in (("memory", self.memory), ("memory_checkpointed", self.memory_checkpointed))
            }
        )


def plan(
    model: str | PreTrainedConfig,
    *,
    tokens: float,
    gpus: str | Fleet = "cpu",
    recipe: Recipe | None = None,
    length: int = 256,
    batch: int | None = None,
    lora: Lora | None = None,
    dtype: str | None = None,
    utilisation: float | None = None,
    price: float | None = None,
) -> Plan:
    """What `adapt` or `tune` would take: `model` as `load_base` takes it, a lone config.json, or a config; no weights.

    `gpus` as 64xH100; `batch` rows of `length` tokens on each (the most that fit, if unset); `utilisation` of their
    peak (each device's own, if unset); `price` of an hour of one. ValueError for what cannot be.
    """
    fleet = Fleet.parse(gpus) if isinstance(gpus, str) else gpus
    dtype = dtype or fleet.device.dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not known{nearest(dtype, DTYPES)}')
    fleet.device.peak(dtype)
    utilisation = fleet.device.utilisation if utilisation is None else utilisation
    _check(tokens=tokens, length=length, batch=batch, utilisation=utilisation, price=price)
    source = model if isinstance(model, str) else model.model_type
    config = load_config(model) if isinstance(model, str) else model
    kind, masked = network_class(config, source)
    recipe = recipe or of_model(source) or block()
    check_fit(source, masked, recipe)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"length={length} is more than the {context} tokens that {source} can see; use less")
    subject = Subject(kind, config, recipe, length, dtype, lora)
    counted = sizes(subject)
    layouts = list(_until_it_fits(subject, counted, fleet, batch))
    best = next((layout for layout in layouts[::-1] if layout.rows >= (batch or 1)), None)
    sharding = (best or layouts[-1]).sharding
    rows = batch or (1 if best is None else min(MOST_ROWS, 1 << (best.rows.bit_length() - 1)))
    kept, again = (_step(subject, sharding, checkpointing, rows) for checkpointing in (False, True))
    return Plan(
        source, tokens, fleet, subject, counted, sharding, best, rows,
        memory=memory(subject, counted, sharding, fleet.count, kept),
        memory_checkpointed=memory(subject, counted, sharding, fleet.count, again),
        flops_per_token=kept.flops / (rows * length),
        recomputed_per_token=(again.flops - kept.flops) / (rows * length),
        utilisation=utilisation,
        price=price,
        remedies=() if best else tuple(_remedies(subject, counted, fleet, batch)),
    )  # fmt: skip


def memory(subject: Subject, counted: Sizes, sharding: Sharding, count: int, step: Footprint) -> Memory:
    """What one of `count` devices holds at the peak of a step."""
    sharded = sharding in ("ZeRO-2", "ZeRO-3")
    parts, width = count if sharded else 1, DTYPES[subject.dtype].itemsize
    gathered = {"ZeRO-2": counted.total, "ZeRO-3": counted.root + 2 * counted.layer}  # one in use, one on its way
    passing = {"DDP": FLOAT32 * counted.trained, "single": 0.0}
    return Memory(
        weights=FLOAT32 * counted.total / parts,
        copies=step.copies + width * gathered.get(sharding, 0),
        gradients=FLOAT32 * counted.trained / parts,
        optimizer=ADAMW * counted.trained / parts,
        activations=step.activations,
        logits=step.logits,
        exchange=passing.get(sharding, 2.0 * width * min(counted.trained, max(counted.root, counted.layer))),
        rest=REST + SCATTERED * (step.activations + step.logits),
    )


def _until_it_fits(subject: Subject, counted: Sizes, fleet: Fleet, batch: int | None) -> Iterator[Layout]:
    """Layouts from the fastest to the smallest, until one takes a full step; else, again, until one takes any."""
    kinds: tuple[Sharding, ...] = ("single",) if fleet.count == 1 else ("DDP", "ZeRO-2", "ZeRO-3")
    enough = batch or min(MOST_ROWS, -(-ENOUGH_TOKENS // subject.length))
    small = []
    for checkpointing in (False, True):
        for sharding in kinds:
            layout = Layout(sharding, checkpointing, _rows(subject, counted, sharding, checkpointing, fleet))
            yield layout
            if layout.rows >= enough:
                return
            small += [layout] if layout.rows and not batch else []
    yield from small[:1]


def _rows(subject: Subject, counted: Sizes, sharding: Sharding, checkpointing: bool, fleet: Fleet) -> int:
    """The most rows that fit on a device."""

    def left(step: Footprint) -> float:
        return fleet.device.memory * GIB - memory(subject, counted, sharding, fleet.count, step).total

    if left(Footprint(0.0, 0.0, 0.0, 0.0)) < 0:  # no step needs to be counted
        return 0
    one, two = (left(_step(subject, sharding, checkpointing, rows)) for rows in (1, 2))
    return int(1 + one / (one - two)) if one >= 0 else 0


_ENDS = (4, 16)


@lru_cache(maxsize=64)
def _ends(subject: Subject, gathered: bool, checkpointing: bool) -> tuple[Footprint, Footprint]:
    first, last = (footprint(subject, rows, checkpointing=checkpointing, gathered=gathered) for rows in _ENDS)
    return first, last


def _step(subject: Subject, sharding: Sharding, checkpointing: bool, rows: int) -> Footprint:
    """A step of any number of rows, by a straight line through two that were counted."""
    first, last = _ends(subject, sharding in ("ZeRO-2", "ZeRO-3"), checkpointing)
    share = (rows - _ENDS[0]) / (_ENDS[1] - _ENDS[0])
    at = {part.name: getattr(first, part.name) for part in fields(Footprint)}
    return Footprint(**{name: value + share * (getattr(last, name) - value) for name, value in at.items()})


def _remedies(subject: Subject, counted: Sizes, fleet: Fleet, batch: int | None) -> Iterator[Remedy]:
    """What would make it fit, each alone."""

    def fitting(subject: Subject, counted: Sizes, fleet: Fleet) -> Layout | None:
        tried = _until_it_fits(subject, counted, fleet, batch)
        return next((layout for layout in tried if layout.rows >= (batch or 1)), None)

    def how(layout: Layout) -> str:
        return layout.sharding + (" and activation checkpointing" if layout.checkpointing else "")

    if batch and (layout := next(_most(subject, counted, fleet), None)):
        yield Remedy(f"fewer rows at a time, with {how(layout)}", f"--batch {layout.rows}")
    for count in (fleet.count * 2**k for k in range(1, 11)):
        if layout := fitting(subject, counted, replace(fleet, count=count)):
            yield Remedy(f"more devices, with {how(layout)}", f"--gpus {count}x{fleet.device.name}")
            break
    for device in sorted(DEVICES.values(), key=lambda device: device.memory):
        if device.memory > fleet.device.memory and (layout := fitting(subject, counted, replace(fleet, device=device))):
            yield Remedy(f"larger devices, with {how(layout)}", f"--gpus {Fleet(device, fleet.count)}")
            break
    for length in (subject.length >> k for k in (1, 2, 3) if subject.length >> k >= 32):
        if layout := fitting(replace(subject, length=length), counted, fleet):
            yield Remedy(f"shorter rows, with {how(layout)}", f"--length {length}")
            break
    if subject.lora is None:
        small = replace(subject, lora=Lora())
        if layout := fitting(small, sizes(small), fleet):
            yield Remedy(f"adapters instead of all weights, with {how(layout)}", f"--lora {Lora().rank}")


def _most(subject: Subject, counted: Sizes, fleet: Fleet) -> Iterator[Layout]:
    """The layouts that take any row at all, those with most rows first."""
    found = [layout for layout in _until_it_fits(subject, counted, fleet, MOST_ROWS) if layout.rows]
    yield from sorted(found, key=lambda layout: -layout.rows)


def _check(**given: Any) -> None:
    bounds = {
        "tokens": (lambda v: 0 < v < float("inf"), "above 0, as 65e9"),
        "length": (lambda v: v >= 2, "at least 2"),
        "batch": (lambda v: v is None or v >= 1, "at least 1; leave it unset for the most that fit"),
        "utilisation": (lambda v: 0 < v <= 1, "in (0, 1], the share of the peak"),
        "price": (lambda v: v is None or 0 <= v < float("inf"), "0 or more, for an hour of one device"),
    }
    for name, value in given.items():
        holds, said = bounds[name]
        if not holds(value):
            raise ValueError(f"{name}={value} must be {said}")
