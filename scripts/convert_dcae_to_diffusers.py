"""`sana-sprint convert` for a DC-AE, with the arguments of diffusers' script of this name.

python scripts/convert_dcae_to_diffusers.py --config_name dc-ae-f32c32-sana-1.1 --output_path out
"""

import argparse
import sys
from typing import Any

from sana_sprint.checkpoints.autoencoder_config import SCALING_FACTORS
from sana_sprint.cli.convert import DTYPES
from sana_sprint.cli.main import main as sana_sprint

OWNER = "mit-han-lab"
SANA = {"latent_channels": 32, "downsample_block_type": "Conv"}

# What each --config_name says of the config. Tensors say most of it too, and must not contradict it.
CONFIGS: dict[str, dict[str, Any]] = {
    "dc-ae-f32c32-sana-1.0": SANA,
    "dc-ae-f32c32-sana-1.1": SANA,
    **{
        f"dc-ae-f{ratio}c{channels}-{training}-1.0": {
            "latent_channels": channels,
            "downsample_block_type": "pixel_unshuffle",
            "scaling_factor": SCALING_FACTORS[ratio][training],
        }
        for ratio, channels in ((32, 32), (64, 128), (128, 512))
        for training in ("in", "mix")
    },
}
DEFAULT = "dc-ae-f32c32-sana-1.0"


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a DC-AE to diffusers' layout.")
    parser.add_argument("--config_name", choices=CONFIGS, help=f"which model (as its file says, or {DEFAULT})")
    parser.add_argument("--ae_ckpt_path", help="its file or folder; fetched from the hub if it is not given")
    parser.add_argument("--output_path", required=True, help="the folder to write")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the weights (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args()

    source = options.ae_ckpt_path or f"{OWNER}/{options.config_name or DEFAULT}/model.safetensors"
    command = ["convert", source, options.output_path, "--kind", "autoencoder", "--dtype", options.dtype]
    for name, value in CONFIGS.get(options.config_name, {}).items():
        command += ["--set", f"{name}={value}"]
    return sana_sprint([*command, *(["--force"] if options.force else [])])


if __name__ == "__main__":
    sys.exit(main())
