"""`sana-sprint convert` for a DC-AE, with the arguments of diffusers' script of this name.

python scripts/convert_dcae_to_diffusers.py --config_name dc-ae-f32c32-sana-1.1 --output_path out
"""

import argparse
import sys

from sana_sprint.checkpoints.autoencoder_config import SCALING_FACTORS
from sana_sprint.cli.convert import DTYPES
from sana_sprint.cli.main import main as sana_sprint

OWNER = "mit-han-lab"
IMAGENET = {
    f"dc-ae-f{ratio}c{channels}-{training}-1.0": SCALING_FACTORS[ratio][training]
    for ratio, channels in ((32, 32), (64, 128), (128, 512))
    for training in ("in", "mix")
}
NAMES = ("dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-sana-1.1", *IMAGENET)


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a DC-AE to diffusers' layout.")
    parser.add_argument("--config_name", default=NAMES[0], choices=NAMES, help="which model (%(default)s)")
    parser.add_argument("--ae_ckpt_path", help="its file or folder; fetched from the hub if it is not given")
    parser.add_argument("--output_path", required=True, help="the folder to write")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the weights (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args()

    source = options.ae_ckpt_path or f"{OWNER}/{options.config_name}/model.safetensors"
    command = ["convert", source, options.output_path, "--kind", "autoencoder", "--dtype", options.dtype]
    if options.config_name in IMAGENET:
        command += ["--set", f"scaling_factor={IMAGENET[options.config_name]}"]
    return sana_sprint([*command, *(["--force"] if options.force else [])])


if __name__ == "__main__":
    sys.exit(main())
