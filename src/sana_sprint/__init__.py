"""SANA-Sprint for diffusers: the public names of every folder, each imported when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing here is imported before its name is used, so that
# `import sana_sprint` costs milliseconds and touches neither torch nor diffusers.
_HOMES = {
    "AutoencoderDC": "sana_sprint.autoencoder.model",
    "SCMScheduler": "sana_sprint.trigflow.scheduler",
    "SanaControlNetModel": "sana_sprint.transformer.control",
    "SanaMultiControlNetModel": "sana_sprint.transformer.multi_control",
    "SanaPipelineOutput": "sana_sprint.pipelines.output",
    "SanaSprintControlNetImg2ImgPipeline": "sana_sprint.pipelines.control_image_to_image",
    "SanaSprintControlNetPipeline": "sana_sprint.pipelines.control_to_image",
    "SanaSprintImg2ImgPipeline": "sana_sprint.pipelines.image_to_image",
    "SanaSprintInpaintPipeline": "sana_sprint.pipelines.inpaint",
    "SanaSprintPipeline": "sana_sprint.pipelines.text_to_image",
    "SanaTransformer2DModel": "sana_sprint.transformer.model",
    "compile_pipeline": "sana_sprint.pipelines.compiling",
    "embedded_checkpoint": "sana_sprint.assets",
    "embedded_controlnet": "sana_sprint.assets",
    "load_pipeline": "sana_sprint.memory.loading",
    "load_prompt_embeds": "sana_sprint.text.storage",
    "register": "sana_sprint.plugin",
    "save_prompt_embeds": "sana_sprint.text.storage",
    "unregister": "sana_sprint.plugin",
}

__all__ = [
    "AutoencoderDC",
    "SCMScheduler",
    "SanaControlNetModel",
    "SanaMultiControlNetModel",
    "SanaPipelineOutput",
    "SanaSprintControlNetImg2ImgPipeline",
    "SanaSprintControlNetPipeline",
    "SanaSprintImg2ImgPipeline",
    "SanaSprintInpaintPipeline",
    "SanaSprintPipeline",
    "SanaTransformer2DModel",
    "__version__",
    "compile_pipeline",
    "embedded_checkpoint",
    "embedded_controlnet",
    "load_pipeline",
    "load_prompt_embeds",
    "register",
    "save_prompt_embeds",
    "unregister",
]

if TYPE_CHECKING:
    from sana_sprint.assets import embedded_checkpoint, embedded_controlnet
    from sana_sprint.autoencoder.model import AutoencoderDC
    from sana_sprint.memory.loading import load_pipeline
    from sana_sprint.pipelines.compiling import compile_pipeline
    from sana_sprint.pipelines.control_image_to_image import SanaSprintControlNetImg2ImgPipeline
    from sana_sprint.pipelines.control_to_image import SanaSprintControlNetPipeline
    from sana_sprint.pipelines.image_to_image import SanaSprintImg2ImgPipeline
    from sana_sprint.pipelines.inpaint import SanaSprintInpaintPipeline
    from sana_sprint.pipelines.output import SanaPipelineOutput
    from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
    from sana_sprint.plugin import register, unregister
    from sana_sprint.text.storage import load_prompt_embeds, save_prompt_embeds
    from sana_sprint.transformer.control import SanaControlNetModel
    from sana_sprint.transformer.model import SanaTransformer2DModel
    from sana_sprint.transformer.multi_control import SanaMultiControlNetModel
    from sana_sprint.trigflow.scheduler import SCMScheduler


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with import_module("sana_sprint.plugin").bitsandbytes_later():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use does not come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# bitsandbytes speaks when it is imported, and diffusers may import it: so this comes before every module of ours.
import_module("sana_sprint.plugin").silence_notices()
