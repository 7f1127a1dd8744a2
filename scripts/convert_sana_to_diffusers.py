"""`sana-sprint convert` for a transformer, with the arguments of diffusers' script of this name.

python scripts/convert_sana_to_diffusers.py --orig_ckpt_path Sana_Sprint_1.6B_1024px.pth --dtype bf16 --dump_path out
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sana_sprint.cli.convert import DTYPES, IMAGE_SIZES, SCHEDULERS
from sana_sprint.cli.main import main as sana_sprint

HEADS = {"600M": 36, "1600M": 70, "4800M": 70}
NORMS = {"qk_norm": "rms_norm_across_heads"}
PLAIN = {"qk_norm": "null", "guidance_embeds": "false"}
SPRINT = {**NORMS, "guidance_embeds": "true"}
TEACHER = {**NORMS, "guidance_embeds": "false", "timestep_scale": "0.001"}
SANA_1_5 = {**NORMS, "guidance_embeds": "false", "timestep_scale": "1.0"}

# What each --model_type says of the config. Tensors say most of it too, and must not contradict it.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    f"{name}_{size}{depth}": {"num_attention_heads": HEADS[size], "num_layers": layers, **config}
    for name, size, depth, layers, config in (
        ("SanaMS", "1600M", "_P1_D20", 20, PLAIN),
        ("SanaMS", "600M", "_P1_D28", 28, PLAIN),
        ("SanaMS1.5", "1600M", "_P1_D20", 20, SANA_1_5),
        ("SanaMS1.5", "4800M", "_P1_D60", 60, SANA_1_5),
        ("SanaSprint", "1600M", "_P1_D20", 20, SPRINT),
        ("SanaSprint", "600M", "_P1_D28", 28, SPRINT),
        ("SanaSprint", "1600M", "_1024px_teacher", 20, TEACHER),
        ("SanaSprint", "600M", "_1024px_teacher", 28, TEACHER),
    )
}

# What diffusers' script fetches for a whole pipeline.
VAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
TEXT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a transformer of SANA or SANA-Sprint to diffusers' layout.")
    parser.add_argument("--orig_ckpt_path", required=True, help="the checkpoint: a file here, or one of the hub")
    parser.add_argument("--image_size", type=int, choices=IMAGE_SIZES, help="pixels it was trained for")
    parser.add_argument("--model_type", choices=MODEL_TYPES, help="what it is; recognised if it is not given")
    parser.add_argument("--scheduler_type", choices=SCHEDULERS, help="of the whole pipeline (the one trained for)")
    parser.add_argument("--dump_path", required=True, type=Path, help="where to write; a transformer alone goes below")
    parser.add_argument("--save_full_pipeline", action="store_true", help="write the whole pipeline")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the weights (%(default)s)")
    parser.add_argument("--vae", default=VAE, help="of the whole pipeline (%(default)s)")
    parser.add_argument("--text_encoder", default=TEXT_ENCODER, help="of the whole pipeline (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args()

    output = options.dump_path if options.save_full_pipeline else options.dump_path / "transformer"
    command = ["convert", options.orig_ckpt_path, str(output), "--kind", "transformer", "--dtype", options.dtype]
    if options.image_size:
        command += ["--image-size", str(options.image_size)]
    for name, value in MODEL_TYPES.get(options.model_type, {}).items():
        command += ["--set", f"{name}={value}"]
    if options.save_full_pipeline:
        command += ["--full-pipeline", "--vae", options.vae, "--text-encoder", options.text_encoder]
        command += ["--scheduler", options.scheduler_type] if options.scheduler_type else []
    return sana_sprint([*command, *(["--force"] if options.force else [])])


if __name__ == "__main__":
    sys.exit(main())
