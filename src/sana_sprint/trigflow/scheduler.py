"""A number of steps to a timetable of angles, and a network's velocity at one angle to the latents at the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from sana_sprint.trigflow.path import add_noise, predict_clean


class PublishedDefault(float):
    """A default that says so: equal to the published number, but told apart from the same number given by a caller.

    The published signatures have 1.57080 and 1.3 as defaults, and 1.3 has a meaning for two steps only. A function
    that has these two constants as its own defaults can forward them unread, and `timetable` sees what was asked for.
    """


MAX_TIMESTEPS = PublishedDefault(1.57080)  # the published rounding of pi/2, 4e-6 too large
INTERMEDIATE_TIMESTEPS = PublishedDefault(1.3)

LARGEST_ANGLE = math.pi / 2 + 1e-4  # room for roundings of pi/2 such as the published one

# Beyond the first angle, for the step counts that have a list of their own. Two and four steps: SANA-Sprint
# (arXiv 2503.09641), Table 7. Three: the list for four without 1.1. Every angle is then one that the paper chose, and
# of the three ways to leave one out it is the one that keeps 1.3 second, as both of the paper's lists have it, without
# a last step that covers most of the way.
LATER_ANGLES = {2: (1.3, 0.0), 3: (1.3, 0.6, 0.0), 4: (1.3, 1.1, 0.6, 0.0)}
# Table 7 starts from this angle. Two steps keep the published default of 1.57080: same seed, same picture.
FIRST_ANGLE = {3: math.atan(200 / 0.5), 4: math.atan(200 / 0.5)}


def custom_angles(timesteps: Sequence[float] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """A caller's own angles as a float32 tensor on the CPU; ValueError unless they are a timetable."""
    try:
        angles = torch.as_tensor(timesteps).detach().to("cpu", torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"timesteps must be a list of angles in radians, got {timesteps!r}") from error
    if angles.ndim != 1 or len(angles) < 2:
        raise ValueError(
            f"timesteps must be a list of at least two angles, where each step starts and the last one ends, "
            f"got {timesteps!r}"
        )
    in_range = (angles >= 0) & (angles <= LARGEST_ANGLE)  # False for nan as well
    if not in_range.all():
        raise ValueError(f"timesteps are angles in radians and must lie in [0, pi/2], got {angles.tolist()}")
    if not (angles[1:] < angles[:-1]).all():
        raise ValueError(f"timesteps must descend, each angle smaller than the one before, got {angles.tolist()}")
    return angles


def step_count(num_inference_steps: int | None, most: int) -> int:
    """The number of steps as an int; ValueError unless it is a whole number from 1 to `most`."""
    if not isinstance(num_inference_steps, Integral):  # numpy's integers are
        raise ValueError(
            f"num_inference_steps must be a whole number unless timesteps are given, got {num_inference_steps!r}"
        )
    if not 1 <= num_inference_steps <= most:
        raise ValueError(
            f"num_inference_steps must lie between 1 and {most} (num_train_timesteps), got {num_inference_steps}"
        )
    return int(num_inference_steps)


def timetable(steps: int, max_timesteps: float | None, intermediate_timesteps: float | None) -> torch.Tensor:
    """The angles for a number of steps: `steps` + 1 of them, descending to 0, float32, on the CPU.

    | steps | with nothing asked for | intermediate_timesteps=None |
    | --- | --- | --- |
    | 1 | 1.57080, 0 | the same |
    | 2 | 1.57080, 1.3, 0 | evenly spaced |
    | 3 | arctan(400), 1.3, 0.6, 0 | evenly spaced |
    | 4 | arctan(400), 1.3, 1.1, 0.6, 0 | evenly spaced |
    | more | evenly spaced from 1.57080 | the same |

    Args:
        steps: At least 1.
        max_timesteps: The first angle. `MAX_TIMESTEPS` stands for "not asked for".
        intermediate_timesteps: The angle between the two steps of two. `INTERMEDIATE_TIMESTEPS` stands for "not asked
            for", None for even spacing.

    Raises:
        ValueError: if an angle was asked for that has no place in the timetable.
    """
    asked_for_max = not isinstance(max_timesteps, PublishedDefault)
    asked_for_intermediate = not isinstance(intermediate_timesteps, PublishedDefault)
    if max_timesteps is None:
        raise ValueError("max_timesteps must be an angle in radians unless timesteps are given, got None")
    if not 0 < max_timesteps <= LARGEST_ANGLE:
        raise ValueError(f"max_timesteps is an angle in radians and must lie in (0, pi/2], got {max_timesteps}")
    if asked_for_intermediate and intermediate_timesteps is not None and steps != 2:
        raise ValueError(
            f"intermediate_timesteps={intermediate_timesteps} lies between two steps, but there are {steps}: "
            f"leave it out, or give all {steps + 1} angles as timesteps"
        )

    if intermediate_timesteps is None or steps not in LATER_ANGLES:
        # Float32 throughout, as diffusers computes it.
        return torch.linspace(max_timesteps, 0, steps + 1, dtype=torch.float32)
    first = max_timesteps if asked_for_max else FIRST_ANGLE.get(steps, max_timesteps)
    later = (intermediate_timesteps, 0.0) if asked_for_intermediate else LATER_ANGLES[steps]
    if not first > later[0] > 0:
        raise ValueError(
            f"the first angle must be larger than the second and the second larger than 0, got {first} "
            f"(max_timesteps) and {later[0]} (intermediate_timesteps): change one of them, give all angles as "
            "timesteps, or pass intermediate_timesteps=None for even spacing"
        )
    return torch.tensor([first, *later], dtype=torch.float32)


@dataclass
class SCMSchedulerOutput(BaseOutput):
    """What `SCMScheduler.step` returns.

    Attributes:
        prev_sample: Latents at the next angle, input of the next step.
        pred_original_sample: The clean latents predicted at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class SCMScheduler(SchedulerMixin, ConfigMixin):
    """The sampler of continuous-time consistency models: predict the clean latents, add noise for the next angle.

    A config may hold `_timesteps` beside its arguments: timetables by number of steps, {"2": [1.5708, 1.1, 0.0]}. A run
    of so many steps follows it unless an angle is asked for. diffusers' class passes the entry on and does not use it.

    Args:
        num_train_timesteps: The largest number of steps, and the length of the scheduler.
        prediction_type: "trigflow", the only one there is.
        sigma_data: Standard deviation of the clean latents, and so of the noise.

    Raises:
        ValueError: if `prediction_type` is not "trigflow". No other can be stepped with, so a config that names one,
            such as that of another scheduler, is refused here rather than after the first pass of the network.
    """

    order = 1

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, prediction_type: str = "trigflow", sigma_data: float = 0.5
    ) -> None:
        if prediction_type != "trigflow":
            raise ValueError(f"prediction_type must be 'trigflow' for SCMScheduler, got {prediction_type!r}")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        # Until `set_timesteps` there is no timetable, but diffusers' schedulers are never without timesteps.
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def timesteps(self) -> torch.Tensor:
        """The angles in radians, descending (steps + 1,), on the device that `set_timesteps` was given."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: torch.Tensor) -> None:
        # `step` takes its angles from the second, because reading one from an accelerator would wait for all the work
        # queued there. On the CPU the two are one tensor, so that an edit in place counts.
        self._timesteps, self._host_angles = timesteps, timesteps.cpu()

    @property
    def step_index(self) -> int | None:
        """The index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step if `set_begin_index` has named it, else None."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Name the index of the first step, so that `step` need not look its timestep up."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        device: str | torch.device | None = None,
        max_timesteps: float | None = MAX_TIMESTEPS,
        intermediate_timesteps: float | None = INTERMEDIATE_TIMESTEPS,
    ) -> None:
        """Choose the angles of the next run, by number of steps or one by one.

        Args:
            num_inference_steps: Number of steps, 1 to `num_train_timesteps`. Not needed with `timesteps`.
            timesteps: The angles themselves in radians, strictly descending in [0, pi/2], one more than there are
                steps. The last one is normally 0; a run that ends earlier leaves noise in `prev_sample`, and
                `pred_original_sample` is clean all the same.
            device: Where `timesteps` shall be; where a given tensor is, or the CPU, if None.
            max_timesteps: The first angle in radians.
            intermediate_timesteps: The angle in radians between two steps, for a run of two. None spaces the angles
                evenly, for any number of steps.

        Left alone, the last two do not get in the way: every number of steps has a timetable (the config's own or that
        of the function `timetable`), and `timesteps` needs nothing else.

        Raises:
            ValueError: if a value is out of its range, or two of them contradict each other.
        """
        most = self.config["num_train_timesteps"]
        if timesteps is None:
            steps = step_count(num_inference_steps, most)
            own = self._own_timetable(steps)
            asked_for = {type(max_timesteps), type(intermediate_timesteps)} != {PublishedDefault}
            angles = timetable(steps, max_timesteps, intermediate_timesteps) if own is None or asked_for else own
        else:
            for name, value in [("max_timesteps", max_timesteps), ("intermediate_timesteps", intermediate_timesteps)]:
                if value is not None and not isinstance(value, PublishedDefault):
                    raise ValueError(f"timesteps already holds every angle: leave out {name}, got {value}")
            angles = custom_angles(timesteps)
            steps = step_count(len(angles) - 1, most)
            if num_inference_steps is not None and num_inference_steps != steps:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} does not fit timesteps with {len(angles)} angles, "
                    f"which make {steps} steps: leave one of the two out"
                )
            if device is None and isinstance(timesteps, torch.Tensor):
                device = timesteps.device

        self.num_inference_steps = len(angles) - 1
        self._timesteps, self._host_angles = angles.to(device), angles
        self._step_index = None
        self._begin_index = None

    def _own_timetable(self, steps: int) -> torch.Tensor | None:
        """The config's angles for a number of steps; ValueError if they are no timetable of so many."""
        angles = self.config.get("_timesteps", {}).get(str(steps))
        if angles is None:
            return None
        if len(angles) != steps + 1:
            raise ValueError(
                f"_timesteps in the scheduler's config must hold {steps + 1} angles for {steps} steps, got {angles}"
            )
        return custom_angles(angles)

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The index of an angle in `schedule_timesteps`, by default the scheduler's own.

        Args:
            timestep: The angle in radians, or a tensor with the same angle for each sample.
            schedule_timesteps: One-dimensional. Of an angle that it holds twice, the second is meant (diffusers'
                contract: a run that starts there then skips nothing).

        Raises:
            ValueError: if the angle is not there.
        """
        angles = self._host_angles if schedule_timesteps is None else schedule_timesteps.cpu()
        wanted = torch.as_tensor(timestep, device="cpu").to(angles.dtype).unique()
        indices = (angles == wanted).nonzero() if wanted.numel() == 1 else ()
        if len(indices) == 0:
            raise ValueError(f"timestep must be one of {angles.tolist()}, got {timestep}")
        return int(indices[min(1, len(indices) - 1)])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take the latents from one angle of the timetable to the next.

        Args:
            model_output: TrigFlow velocity (B, ...) in the scale of the sample: `bridge.trigflow_velocity`.
            timestep: The angle the sample is at. Read at the first step only, and not then if `set_begin_index` was
                called; later steps follow the timetable.
            sample: Noisy latents, same shape.
            generator: Source of the noise, or one for each sample.
            return_dict: False for the plain tuple (prev_sample, pred_original_sample).

        Returns:
            Both latents in float32, or in float64 for a float64 sample.

        Raises:
            ValueError: before `set_timesteps`, past the end of the timetable, for a timestep that is not in it, and
                for a `model_output` of another shape than `sample`.
        """
        if self.num_inference_steps is None:
            raise ValueError("the scheduler has no timetable yet: call set_timesteps before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output and sample must have one shape, got {tuple(model_output.shape)} and "
                f"{tuple(sample.shape)}"
            )
        if self._step_index is None:
            begins = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begins is None else begins
        if not 0 <= self._step_index < len(self._host_angles) - 1:
            raise ValueError(
                f"no step starts at index {self._step_index} of the {len(self._host_angles)} angles "
                f"{self._host_angles.tolist()}: call set_timesteps to start again"
            )

        angle, next_angle = self._host_angles[self._step_index : self._step_index + 2]
        clean = predict_clean(sample, model_output, angle)
        # diffusers contract: drawn even where the next angle is 0 and it is multiplied by sin(0), so that a generator
        # used for a second picture is where it would be there.
        noise = randn_tensor(model_output.shape, generator, model_output.device, torch.float32)
        prev_sample = add_noise(clean, noise * self.config["sigma_data"], next_angle)
        self._step_index += 1

        if not return_dict:
            return prev_sample, clean
        return SCMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]
