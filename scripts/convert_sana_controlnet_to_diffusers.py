"""`sana-sprint convert` for a ControlNet, with the arguments of diffusers' script of this name.

python scripts/convert_sana_controlnet_to_diffusers.py --orig_ckpt_path Sana_1600M_1024px_HED.pth --dump_path out
"""

import argparse
import sys

from sana_sprint.cli.convert import DTYPES, IMAGE_SIZES
from sana_sprint.cli.main import main as sana_sprint

NUM_HEADS = {"SanaMS_1600M_P1_ControlNet_D7": 70, "SanaMS_600M_P1_ControlNet_D7": 36}
NUM_LAYERS = 7


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a ControlNet of SANA to diffusers' layout.")
    parser.add_argument("--orig_ckpt_path", required=True, help="the checkpoint: a file here, or one of the hub")
    parser.add_argument("--image_size", type=int, choices=IMAGE_SIZES, help="pixels it was trained for")
    parser.add_argument("--model_type", choices=NUM_HEADS, help="what it is; recognised if it is not given")
    parser.add_argument("--dump_path", required=True, help="the folder to write")
    parser.add_argument("--dtype", default="fp16", choices=DTYPES, help="of the weights (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args()

    command = ["convert", options.orig_ckpt_path, options.dump_path, "--kind", "controlnet", "--dtype", options.dtype]
    if options.image_size:
        command += ["--image-size", str(options.image_size)]
    if options.model_type:
        command += [
            "--set",
            f"num_attention_heads={NUM_HEADS[options.model_type]}",
            "--set",
            f"num_layers={NUM_LAYERS}",
        ]
    return sana_sprint([*command, *(["--force"] if options.force else [])])


if __name__ == "__main__":
    sys.exit(main())
