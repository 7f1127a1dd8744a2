from copy import deepcopy
import torch
import diffusers.pipelines.sana.pipeline_sana_sprint as their_pipeline
from sana_sprint import SanaSprintPipeline
def test_zz(tiny_pipeline_parts, their_parts, short, seeded):
    def latents(pipeline_class, parts, dtype, s):
        parts = {n: deepcopy(p).to(dtype) if isinstance(p, torch.nn.Module) else p for n, p in parts.items()}
        pipeline = pipeline_class(**parts); pipeline.set_progress_bar_config(disable=True)
        return pipeline("A red circle", **short, generator=seeded(s)).images
    for s in range(5):
        exact = latents(their_pipeline.SanaSprintPipeline, their_parts, torch.float32,s)
        theirs = latents(their_pipeline.SanaSprintPipeline, their_parts, torch.bfloat16,s)
        ours = latents(SanaSprintPipeline, tiny_pipeline_parts, torch.bfloat16,s)
        print((ours - exact).norm() , (theirs - exact).norm())
