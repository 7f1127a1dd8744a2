"""Networks and the memory at hand to an arrangement that fits, the best first, with every stage's bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sana_sprint.memory.stages import (
    Networks,
    largest_layer_bytes,
    streamed_bytes,
    table_bytes,
    unpacked_bytes,
    weight_bytes,
)
from sana_sprint.sizes import readable_bytes

Bits = Literal[16, 8, 4]
Placement = Literal["resident", "encoder on host", "model offload", "group offload"]

# The networks that run in each stage of a call, those of them that a pipeline has.
_RUNNING: dict[str, tuple[str, ...]] = {
    "encode picture": ("vae",),
    "encode": ("text_encoder",),
    "denoise": ("controlnet", "transformer"),
    "decode": ("vae",),
}

# Of a GPU's memory, what CUDA's context and libraries take, and the part that the allocator cannot hand out whole.
_CONTEXT_BYTES, _USABLE_SHARE = 500 * 2**20, 0.95
# Of a process without a GPU: Python with torch, diffusers and transformers imported (measured).
PROCESS_BYTES = 500 * 2**20
# Pixels of a tile's side, tried in this order where the autoencoder's work does not fit in one piece.
_TILES = (1024, 768, 512, 384, 256)


@dataclass(frozen=True)
class Budget:
    """The memory at hand, in bytes.

    Attributes:
        device: of the accelerator; None where the CPU computes.
        host: of the machine; None to leave it out of account.
    """

    device: int | None
    host: int | None = None


@dataclass(frozen=True)
class Arrangement:
    """How a pipeline is loaded.

    Attributes:
        bits: of the weights of transformer, ControlNet and text encoder; a text encoder on the host keeps 16, and a
            network that is quantised in the checkpoint its own.
        placement: "resident": all on the device; "encoder on host": the text encoder stays and runs on the CPU;
            "model offload": one network on the device at a time, and the ControlNet with the transformer; "group
            offload": one block of a network at a time.
        tile: pixels of a tile's side where pictures are decoded and encoded; None does so in one piece.
    """

    bits: Bits = 16
    placement: Placement = "resident"
    tile: int | None = None

    def __str__(self) -> str:
        tiles = f", tiles of {self.tile}" if self.tile else ""
        return f"{self.bits}-bit, {self.placement}{tiles}"


# The best first. What keeps its bits comes before what does not, for bits are quality, and what moves no weights before
# what moves them in every call. A text encoder on the host reads a prompt in a second or two and keeps all bits.
ARRANGEMENTS: tuple[Arrangement, ...] = (
    Arrangement(16, "resident"),
    Arrangement(16, "encoder on host"),
    Arrangement(8, "resident"),
    Arrangement(16, "model offload"),
    Arrangement(8, "encoder on host"),
    Arrangement(8, "model offload"),
    Arrangement(4, "resident"),
    Arrangement(4, "encoder on host"),
    Arrangement(4, "model offload"),
    Arrangement(16, "group offload"),
)


@dataclass(frozen=True)
class StageBytes:
    """What one stage of a call takes on the device: weights, those of other stages included, and tensors on top."""

    weights: int
    work: int

    @property
    def peak(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True)
class MemoryPlan:
    """An arrangement with what it takes.

    Attributes:
        stages: bytes of each stage of a call, in their order, on the device, which is the CPU where there is no
            accelerator. The first, "encode picture", is for calls that start from a picture or follow a drawing.
        host: bytes of what waits or works in the machine's memory beside an accelerator.
        budget: the memory that was planned for.
        to_quantise: names of the networks that are quantised while they are loaded.
        stored: bits of those networks that are quantised in the checkpoint, and stay as they are.
        reason: why this arrangement was chosen, once it was.
    """

    arrangement: Arrangement
    stages: dict[str, StageBytes]
    host: int
    budget: Budget
    to_quantise: tuple[str, ...] = ()
    stored: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def peak(self) -> int:
        """The most bytes on the device at once, the process itself included where that is the CPU."""
        process = PROCESS_BYTES if self.budget.device is None else 0
        return process + max(stage.peak for stage in self.stages.values())

    @property
    def fits(self) -> bool:
        """Whether the budget has room for it."""
        budget = self.budget
        if budget.device is None:
            return budget.host is None or self.peak <= budget.host
        room = budget.device * _USABLE_SHARE - _CONTEXT_BYTES
        return self.peak <= room and (budget.host is None or self.host + PROCESS_BYTES <= budget.host)

    def __str__(self) -> str:
        host = f", {readable_bytes(self.host)} in the machine's" if self.host else ""
        stored = "".join(f"; {name} stays in the checkpoint's {bits} bits" for name, bits in self.stored.items())
        need = f"at most {readable_bytes(self.peak)} in the device's memory{host}"
        return f"{self.arrangement}: {need}; {self.reason}{stored}"


def _quantised(networks: Networks, placement: Placement) -> tuple[str, ...]:
    """The networks to which an arrangement's bits apply."""
    # A text encoder on the host keeps 16 bits, and so does the autoencoder, whose layers are no matrix products.
    kept = ("vae", "text_encoder") if placement == "encoder on host" else ("vae",)
    return tuple(name for name in networks.modules if name not in kept)


def _differs(networks: Networks, arrangement: Arrangement) -> bool:
    """Whether an arrangement is possible, and no other one by another name, with what the checkpoint has quantised."""
    stored = networks.configs.stored_bits()
    if stored and arrangement.placement == "group offload":
        return False
    decides = any(name not in stored for name in _quantised(networks, arrangement.placement))
    return arrangement.bits == stored.get("transformer", 16) or decides


def _plan(networks: Networks, arrangement: Arrangement, budget: Budget) -> MemoryPlan:
    stored, placement, modules = networks.configs.stored_bits(), arrangement.placement, networks.modules
    quantised = _quantised(networks, placement)
    bits = {name: arrangement.bits if name in quantised else 16 for name in modules} | stored
    weights = {name: weight_bytes(module, bits[name]) for name, module in modules.items()}
    if budget.device is None:
        # What no call reads stays in its mapped file.
        weights["text_encoder"] -= table_bytes(modules["text_encoder"])
        if not networks.encodes_pictures:
            weights["vae"] -= weight_bytes(networks.vae.encoder)
    work = networks.stage_bytes(arrangement.tile)
    running = {stage: [name for name in _RUNNING[stage] if name in modules] for stage in work}
    for stage, names in running.items():
        work[stage] += max(unpacked_bytes(modules[name], bits[name]) for name in names)
    total, kept = sum(weights.values()), networks.kept_bytes
    if placement == "resident":
        on_device, host = dict.fromkeys(work, total), 0
        work = {stage: taken if stage == "encode" else taken + kept for stage, taken in work.items()}
    elif placement == "encoder on host":
        host = weights["text_encoder"] + kept
        on_device = dict.fromkeys(work, total - weights["text_encoder"])
        work["encode"] = 0
    elif placement == "model offload":
        host = total + kept
        # From the second step on, the transformer is still there when the ControlNet comes back.
        on_device = {stage: sum(weights[name] for name in names) for stage, names in running.items()}
    else:
        host = total + kept
        streamed = {name: streamed_bytes(module) for name, module in modules.items()}
        streamed["vae"] = largest_layer_bytes(modules["vae"])  # its blocks run in strips, not one after the other
        on_device = {stage: max(streamed[name] for name in names) for stage, names in running.items()}
    stages = {stage: StageBytes(on_device[stage], work[stage]) for stage in work}
    to_quantise = () if arrangement.bits == 16 else tuple(name for name in quantised if name not in stored)
    return MemoryPlan(arrangement, stages, host, budget, to_quantise, stored)


def _tiled_if_needed(networks: Networks, arrangement: Arrangement, budget: Budget) -> MemoryPlan:
    plan = _plan(networks, arrangement, budget)
    # The least that tiles could leave: they change nothing but what the autoencoder works with.
    least = {name: replace(stage, work=0) for name, stage in plan.stages.items() if _RUNNING[name] == ("vae",)}
    without = replace(plan, stages=plan.stages | least)
    if plan.fits or not without.fits:
        return plan
    size = max(networks.workload.height, networks.workload.width)
    ratio = networks.vae.spatial_compression_ratio
    for tile in _TILES:
        if tile < size and tile % ratio == 0:
            tiled = _plan(networks, replace(arrangement, tile=tile), budget)
            if tiled.fits:
                return tiled
    return plan


def all_plans(networks: Networks, budget: Budget) -> list[MemoryPlan]:
    """Every arrangement that is possible with this budget's kind of device, the best first, whether it fits or not.

    An autoencoder whose work is what does not fit gets the largest tiles with which it does.
    """
    chosen = [one for one in ARRANGEMENTS if budget.device is not None or one.placement == "resident"]
    return [_tiled_if_needed(networks, one, budget) for one in chosen if _differs(networks, one)]


def best_plan(plans: Sequence[MemoryPlan], bits: Bits | None = None) -> MemoryPlan:
    """The first that fits, with its reason, of those with so many bits if that is asked for.

    Raises:
        ValueError: if none fits, or the checkpoint's weights have other bits for good.
    """
    candidates = [plan for plan in plans if bits is None or plan.arrangement.bits == bits]
    if not candidates:
        raise ValueError(f"the checkpoint is quantised to {plans[0].arrangement.bits} bits already, asked for {bits}")
    refused: list[str] = []
    for plan in candidates:
        if plan.fits:
            before = f"{', '.join(refused)} would not fit" if refused else "the first choice, and it fits"
            return replace(plan, reason=before)
        refused.append(f"{plan.arrangement} ({readable_bytes(plan.peak)})")
    smallest = min(candidates, key=lambda plan: plan.peak)
    budget = smallest.budget
    raise ValueError(
        f"no arrangement fits {readable_bytes((budget.host if budget.device is None else budget.device) or 0)}"
        + (f" with {readable_bytes(budget.host)} in the machine" if budget.device is not None and budget.host else "")
        + f": the smallest, {smallest.arrangement}, takes {readable_bytes(smallest.peak)}"
        + (f" and {readable_bytes(smallest.host)} of the machine's memory" if smallest.host else "")
        + (" beside what CUDA takes" if budget.device is not None else "")
    )
