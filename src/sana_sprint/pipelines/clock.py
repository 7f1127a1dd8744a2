"""A scheduler of diffusers to what the denoise loop asks for: its steps, first latents, one step, and the result.

The network is a flow-matching network throughout. A TrigFlow scheduler runs it by way of the bridge, a flow-matching
scheduler as it is. B batch; angles are in radians, time is flow matching's, 0 clean and 1 noise.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_scm import SCMScheduler as DiffusersSCMScheduler

from sana_sprint.trigflow.bridge import FlowNetwork, trigflow_velocity
from sana_sprint.trigflow.path import add_noise
from sana_sprint.trigflow.scheduler import PublishedDefault, SCMScheduler

DEFAULT_STEPS = 2

# Flow matching with the velocity noise - data, and nothing else.
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
# These are flow-matching schedulers with use_flow_sigmas=True and prediction_type="flow_prediction".
CONFIGURABLE_SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)


def last_part(table: torch.Tensor, share: float) -> torch.Tensor:
    """The end of a timetable: the entry at which this share of its steps is still to come, and all entries after it.

    Between two entries the first one is interpolated, so that every share begins elsewhere.

    Args:
        table: Descending, (steps + 1,), on the CPU.
        share: In [0, 1]. Of 0 the last entry alone is left, of 1 the whole table.
    """
    steps = len(table) - 1
    start = np.interp(steps - steps * share, np.arange(steps + 1), table.numpy())
    first = torch.tensor([start], dtype=table.dtype)
    return torch.cat([first, table[table < first]])


class Clock(Protocol):
    """What the denoise loop asks of a scheduler. Latents are (B, C, H, W), in float32, in the scheduler's scale."""

    @property
    def timesteps(self) -> torch.Tensor:
        """One entry for each call of the network, in the scheduler's own unit."""

    def set_steps(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
        device: torch.device,
        strength: float = 1.0,
    ) -> None:
        """Choose the steps; ValueError for what this scheduler cannot do. To be called before all else.

        Of the timetable that the other arguments make, `strength` is the share that is run, its last part; see
        `last_part`. Of 0 there are no steps.
        """

    def from_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise of unit variance to the first latents."""

    def from_picture(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents and noise, both of unit variance, to latents with as much of it as the first step starts from."""

    def step(
        self, network: FlowNetwork, index: int, latents: torch.Tensor, generator: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step to the latents of the next one, and the result if this were the last, in the same scale."""

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to the autoencoder's latents times its scaling factor."""


class TrigFlowClock:
    """Steps through angles with SCMScheduler, ours or diffusers'."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._host_angles = self._angles = torch.empty(0)

    @property
    def timesteps(self) -> torch.Tensor:
        return self._angles[:-1]

    def set_steps(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
        device: torch.device,
        strength: float = 1.0,
    ) -> None:
        # diffusers' has no timetable for every number of steps, but takes any that it is given.
        is_ours = isinstance(self.scheduler, SCMScheduler)
        ours = self.scheduler if is_ours else SCMScheduler(self.scheduler.config.num_train_timesteps)
        steps = _steps_unless_implied(num_inference_steps, timesteps)
        ours.set_timesteps(steps, timesteps, None, max_timesteps, intermediate_timesteps)
        angles = last_part(ours.timesteps.cpu(), strength)
        self._host_angles, self._angles = angles, angles.to(device)
        if len(angles) > 1:
            self.scheduler.set_timesteps(
                len(angles) - 1, angles, device, max_timesteps=None, intermediate_timesteps=None
            )
            self.scheduler.set_begin_index(0)

    def from_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return noise * self.scheduler.config.sigma_data

    def from_picture(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if len(self.timesteps) == 0:  # and no angle, even in a timetable that does not end at 0
            return clean * self.scheduler.config.sigma_data
        return add_noise(clean, noise, self._angles[0]) * self.scheduler.config.sigma_data

    def step(
        self, network: FlowNetwork, index: int, latents: torch.Tensor, generator: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angle = self._host_angles[index]  # no step then waits for an accelerator
        velocity = trigflow_velocity(network, latents, angle, self.scheduler.config.sigma_data)
        return self.scheduler.step(velocity, angle, latents, generator=generator, return_dict=False)

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.scheduler.config.sigma_data


class FlowClock:
    """Steps through time with a flow-matching scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._ends_clean = False
        self._times = torch.empty(0)

    @property
    def timesteps(self) -> torch.Tensor:
        return self.scheduler.timesteps[: len(self.scheduler.sigmas) - 1]

    def set_steps(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
        device: torch.device,
        strength: float = 1.0,
    ) -> None:
        name = type(self.scheduler).__name__
        for argument, value in [
            ("max_timesteps", max_timesteps),
            ("intermediate_timesteps", intermediate_timesteps),
        ]:
            if value is not None and not isinstance(value, PublishedDefault):
                raise ValueError(
                    f"{argument} is an angle of SCMScheduler, and {name} has none: leave it out, got {value}"
                )
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            # Those with use_flow_sigmas have the parameter too, and fail on it or ignore it.
            accepted = inspect.signature(self.scheduler.set_timesteps).parameters
            if "timesteps" not in accepted or "use_flow_sigmas" in _own_settings(self.scheduler):
                raise ValueError(f"{name} chooses its timesteps itself: leave timesteps out, got {timesteps!r}")
            steps = _steps_unless_implied(num_inference_steps, timesteps)
            self.scheduler.set_timesteps(steps, timesteps=list(timesteps), device=device)
        if strength < 1:
            self._begin_later(strength, device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        # DEIS and SASolver do not end at sigma 0 but repeat their last one, and would leave its noise in the result.
        self._ends_clean = float(self.scheduler.sigmas[-1]) == 0
        # Most keep them on the CPU, and to fetch one in each step would be to wait there.
        self._times = self.scheduler.sigmas.to(device, torch.float32)

    def _begin_later(self, strength: float, device: torch.device) -> None:
        # Schedulers choose their sigmas themselves, so this puts others in their place once they are ready for as many
        # steps. Those of two calls a step have most sigmas twice; what follows the last step counts as clean.
        sigmas, timesteps = self.scheduler.sigmas, self.timesteps
        starts = sigmas[:-1]
        whole = torch.cat([starts.unique().flip(0), starts.new_zeros(1)])
        first, *later = last_part(whole.cpu(), strength)
        self.scheduler.set_timesteps(max(len(later), 1), device=device)
        if not later:
            self.scheduler.sigmas, self.scheduler.timesteps = sigmas[-1:], timesteps[:0]
            return
        first, remaining = first.to(sigmas), starts < first.to(sigmas)
        first_timestep = (first * self.scheduler.config.num_train_timesteps).to(timesteps)
        self.scheduler.sigmas = torch.cat([first.view(1), starts[remaining], sigmas[-1:]])
        self.scheduler.timesteps = torch.cat([first_timestep.view(1), timesteps[remaining.to(timesteps.device)]])

    def from_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def from_picture(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if len(self.timesteps) == 0:
            return clean
        return torch.lerp(clean, noise, self.scheduler.sigmas[0].to(noise))

    def step(
        self, network: FlowNetwork, index: int, latents: torch.Tensor, generator: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The network's time is the scheduler's sigma, which is the share of noise in the latents. Timesteps are sigma
        # times num_train_timesteps, and some schedulers round them to integers. What a network trained on 0 to 1000
        # would be told is 1000 * sigma * timestep_scale. For Sprint's teachers (timestep_scale 0.001) that is sigma
        # again. Sprint's own timestep_scale is 1, and belongs to a pipeline that has always passed a time in [0, 1]:
        # for both, then, sigma, and timestep_scale must not be applied a second time.
        time = self._times[index]
        velocity = network(latents, time.expand(latents.shape[0])).float()
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        timestep = self.timesteps[index]
        clean = latents - time * velocity
        latents = self.scheduler.step(velocity, timestep, latents, **extra, return_dict=False)[0]
        is_clean = self._ends_clean and index == len(self.timesteps) - 1
        return latents, latents if is_clean else clean

    def result(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def clock_for(scheduler: Any) -> Clock:
    """The clock that runs this scheduler.

    Raises:
        ValueError: if it cannot run a flow-matching network. The message names those that can.
    """
    if isinstance(scheduler, (SCMScheduler, DiffusersSCMScheduler)):
        return TrigFlowClock(scheduler)
    if any(base.__name__ in FLOW_SCHEDULERS for base in type(scheduler).__mro__) or _is_set_to_flow(scheduler):
        return FlowClock(scheduler)
    raise ValueError(
        f"the scheduler must be SCMScheduler, a flow-matching one ({', '.join(FLOW_SCHEDULERS)}), or one of"
        f" {', '.join(CONFIGURABLE_SCHEDULERS)} with use_flow_sigmas=True and prediction_type='flow_prediction';"
        f" got {_describe(scheduler)}"
    )


def _own_settings(scheduler: Any) -> Collection[str]:
    # By its constructor: a config that came from another scheduler's also holds that one's settings, without effect.
    return inspect.signature(type(scheduler).__init__).parameters.keys()


def _is_set_to_flow(scheduler: Any) -> bool:
    if "use_flow_sigmas" not in _own_settings(scheduler):
        return False
    return scheduler.config.use_flow_sigmas and scheduler.config.prediction_type == "flow_prediction"


def _describe(scheduler: Any) -> str:
    name = type(scheduler).__name__
    if "use_flow_sigmas" not in _own_settings(scheduler):
        return name
    config = scheduler.config
    return f"{name} with use_flow_sigmas={config.use_flow_sigmas} and prediction_type={config.prediction_type!r}"


def _steps_unless_implied(num_inference_steps: int | None, timesteps: Sequence[float] | None) -> int | None:
    """The number of steps to ask a scheduler for; None if it follows from the timesteps.

    The default cannot be told from the same number asked for. Any other number that does not fit is an error.
    """
    return None if timesteps is not None and num_inference_steps == DEFAULT_STEPS else num_inference_steps
