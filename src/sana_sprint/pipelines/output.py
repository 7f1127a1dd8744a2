"""What a pipeline returns: a list or an array of pictures, as `images`.

It is diffusers' own class, so that code which asks `isinstance` of a result has the answer it expects.
"""

from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput

__all__ = ["SanaPipelineOutput"]
