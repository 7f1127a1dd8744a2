"""A model and a dtype to the model in that dtype, without a warning that concerns none of its modules."""

import logging
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

# What diffusers logs at every cast, whether or not the class names modules to keep in float32.
_EMPTY_WARNING = "should be kept in float32: []"


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return _EMPTY_WARNING not in record.getMessage()


class QuietCastMixin(ModelMixin):
    """`ModelMixin` whose `to` warns of modules that should stay in float32 only where there are any."""

    def to(self, *args: Any, **kwargs: Any) -> "QuietCastMixin":
        """`torch.nn.Module.to`, with the checks that diffusers makes for quantised and offloaded models."""
        logger = logging.getLogger(ModelMixin.__module__)
        logger.addFilter(_is_worth_reading)
        try:
            return super().to(*args, **kwargs)
        finally:
            logger.removeFilter(_is_worth_reading)
