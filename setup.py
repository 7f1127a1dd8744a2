"""Package metadata to an installable distribution: names, dependencies, extras, the command and the data files."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"


def read_version() -> str:
    """The version written in the package, read as text: importing the package here would need it installed."""
    source = (ROOT / "src" / "sana_sprint" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('src/sana_sprint/__init__.py must hold a line __version__ = "..."')
    return found.group(1)


setup(
    name="sana-sprint",
    version=read_version(),
    description="SANA-Sprint, one to four step text-to-image, as a plugin for diffusers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "sana_sprint": ["py.typed"],
        "sana_sprint.assets": [f"**/*.{ending}" for ending in ("json", "jinja", "md", "model", "safetensors", "txt")],
    },
    # diffusers 0.42 and transformers 5.21 install on nothing older.
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        # plugin.py reaches into the internals of this one series.
        "diffusers>=0.42,<0.43",
        "transformers>=5.20,<6",
        "accelerate>=1.10",
        "bitsandbytes>=0.48",
        "safetensors>=0.8",
        "tokenizers>=0.22",
        "huggingface_hub>=1.32,<3",
        "ftfy>=6.3",
        "beautifulsoup4>=4.13",
        "numpy>=2.0",
        "pillow>=11.0",
        "tqdm>=4.66",
    ],
    extras_require={
        # controlnet-aux needs a torchvision that fits the torch that is installed.
        "control": ["controlnet-aux>=0.0.10", "opencv-python-headless>=4.10"],
        "lora": ["peft>=0.17"],
        "float8": ["torchao>=0.18"],
        # torch-fidelity needs a torchvision that fits the torch that is installed.
        "evaluation": ["torch-fidelity>=0.4"],
        "train": ["matplotlib>=3.9", "tensorboard>=2.18", "webdataset>=1.0"],
        "dev": [
            "mypy>=1.15",
            "opencv-python-headless>=4.10",
            "peft>=0.17",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "torchao>=0.18",
        ],
    },
    entry_points={"console_scripts": ["sana-sprint = sana_sprint.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
