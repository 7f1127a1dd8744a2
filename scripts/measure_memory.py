"""The numbers of docs/memory.md, measured: full-size networks with random weights, on this machine, beside diffusers.

python scripts/measure_memory.py weights FOLDER                the pipeline that the others load: 9 GB, once
python scripts/measure_memory.py loading FOLDER                peak of a process that loads it in 16, 8 and 4 bits
python scripts/measure_memory.py drawing FOLDER                peak of one that draws a picture of --size in one step
python scripts/measure_memory.py decoding FOLDER --size 4096   peak of a decode above the weights
python scripts/measure_memory.py quantising FOLDER             errors and bytes in 8 and 4 bits, by both rules
python scripts/measure_memory.py tiling                        error of a decode in tiles against the whole picture

Each adds its result to the JSON file of --output. Peaks are of the resident memory of a process of its own, so only
Linux has them. The pages of a file of weights that is mapped count as resident too, although the kernel takes them back
when it needs room: "own" is the peak without them, and a picture is drawn once those are gone that nothing but loading
has read.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")
RULES = ("here", "diffusers")
BITS = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}}
TILES = ((512, 448), (512, 384), (1024, 896), (1024, 768))


def status(entry: str) -> int:
    """Bytes of this process by an entry of its status: "VmHWM", the most that was resident, or "RssAnon"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


class OwnPeak(threading.Thread):
    """From its start on, looks a hundred times a second at what is resident beside mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, status("RssAnon"))
            time.sleep(0.01)


def forget_mapped_weights() -> None:
    """Gives the pages of mapped files of weights back, as the kernel takes them when it needs room; they come again."""
    give_back, dont_need = ctypes.CDLL(None).madvise, 4
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            give_back(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)


def begin_peak() -> None:
    """From here on "VmHWM" is of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(*arguments: str) -> dict[str, Any]:
    """The last line of a measurement of this script in a process of its own, as JSON."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_weights(folder: Path, text_layers: int | None) -> None:
    """Sprint 1.6B in diffusers layout with random weights; tokenizer and scheduler of the embedded checkpoint."""
    import shutil

    from accelerate import init_empty_weights
    from transformers import Gemma2Config, Gemma2Model

    from sana_sprint import AutoencoderDC, SanaTransformer2DModel, SCMScheduler, embedded_checkpoint
    from sana_sprint.bench.twins import fill
    from sana_sprint.memory.configs import PUBLISHED, read_configs

    configs = read_configs(next(iter(PUBLISHED)))
    text_config = configs.text_encoder if text_layers is None else Gemma2Config(num_hidden_layers=text_layers)
    makers: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: Gemma2Model(text_config),
        "transformer": lambda: SanaTransformer2DModel.from_config(configs.transformer),
        "vae": lambda: AutoencoderDC.from_config(configs.vae),
    }
    for name, make in makers.items():
        with init_empty_weights():
            model = make()
        fill(model, torch.bfloat16, CPU, seed=0)
        model.save_pretrained(folder / name)
    shutil.copytree(embedded_checkpoint() / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    SCMScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((embedded_checkpoint() / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "SCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def exactly(size: int) -> dict[str, Any]:
    """Arguments of a call whose square picture is drawn in this size, and not in that of the model."""
    return {"height": size, "width": size, "use_resolution_binning": False}


def load(folder: Path, quantization: str, size: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline on the CPU, with what is planned for a call, and what the process took for itself and takes now."""
    import sana_sprint

    own = OwnPeak()
    own.start()
    started = time.monotonic()
    pipe = sana_sprint.load_pipeline(folder, quantization=quantization, device="cpu", memory="1TB", **exactly(size))
    seconds, planned = round(time.monotonic() - started, 1), pipe.memory_plan.peak
    return pipe, {"planned": planned, "own": own.bytes, "own, loaded": status("RssAnon"), "seconds": seconds}


def draw(folder: Path, quantization: str, size: int) -> dict[str, Any]:
    """Planned bytes, and the peak of a call that draws a picture in one step."""
    pipe, _ = load(folder, quantization, size)
    pipe.set_progress_bar_config(disable=True)
    own = OwnPeak()
    forget_mapped_weights()
    begin_peak()
    own.start()
    started = time.monotonic()
    pipe("a red circle left of a blue square", num_inference_steps=1, **exactly(size))
    seconds = round(time.monotonic() - started, 1)
    return {"planned": pipe.memory_plan.peak, "resident": status("VmHWM"), "own": own.bytes, "seconds": seconds}


def measure_bits(case: str, folder: Path, size: int) -> dict[str, Any]:
    """One of the two above in 16, 8 and 4 bits."""
    return {
        name: in_a_process(f"one-{case}", str(folder), "--case", name, "--size", str(size))
        for name in ("none", "8bit", "4bit")
    }


@torch.no_grad()
def decode(folder: Path, case: str, size: int) -> dict[str, Any]:
    """Peak of one decode in bfloat16 above that with the weights, which are read beforehand."""
    import diffusers

    import sana_sprint

    family = diffusers if case == "diffusers" else sana_sprint
    vae = family.AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.bfloat16).eval()
    if case == "whole":
        vae.disable_strips()
    for parameter in vae.parameters():
        parameter.data = parameter.data.clone()  # out of the file
    before, started = status("VmHWM"), time.monotonic()
    vae.decode(torch.randn(1, 32, size // 32, size // 32).bfloat16())
    return {"above the weights": status("VmHWM") - before, "seconds": round(time.monotonic() - started, 1)}


def measure_decoding(folder: Path, size: int) -> dict[str, Any]:
    # Whole, 4096 pixels would take more than most machines have.
    cases = ("strips", "whole", "diffusers") if size <= 1024 else ("strips",)
    return {case: in_a_process("one-decoding", str(folder), "--case", case, "--size", str(size)) for case in cases}


@torch.no_grad()
def velocity(model: nn.Module) -> torch.Tensor:
    """What a transformer answers to fixed noise of 1024 pixels and 20 tokens of text, in float32."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 32, 32, 32, generator=generator).bfloat16()
    text = torch.randn(1, 20, 2304, generator=generator).bfloat16()
    times, guidance = torch.tensor([0.6]).bfloat16(), torch.tensor([0.45]).bfloat16()
    return model(latents, encoder_hidden_states=text, timestep=times, guidance=guidance, return_dict=False)[0].float()


def quantised_by_diffusers_rule(model: nn.Module, bits: int) -> None:
    """Every linear layer, and nothing else, as diffusers' quantisers do on a GPU; they refuse the CPU."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        new: Any
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=torch.bfloat16, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        model.set_submodule(name, new.to("cpu"))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights with their scales."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def quantise(folder: Path, rule: str, bits: int) -> dict[str, Any]:
    """Bytes of a quantised transformer, and its error against bfloat16."""
    import diffusers

    import sana_sprint

    source = folder / "transformer"
    family = diffusers if rule == "diffusers" else sana_sprint
    exact = velocity(family.SanaTransformer2DModel.from_pretrained(source, torch_dtype=torch.bfloat16).eval())
    if rule == "here":
        config = diffusers.BitsAndBytesConfig(**BITS[bits], **({} if bits == 8 else {"bnb_4bit_quant_type": "nf4"}))
        model = sana_sprint.SanaTransformer2DModel.from_pretrained(
            source, quantization_config=config, torch_dtype=torch.bfloat16
        )
    else:
        model = diffusers.SanaTransformer2DModel.from_pretrained(source, torch_dtype=torch.bfloat16)
        quantised_by_diffusers_rule(model, bits)
    found = velocity(model.eval())
    return {
        "bytes": stored_bytes(model),
        "relative error": round(((found - exact).norm() / exact.norm()).item(), 5),
        "cosine": round(torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0).item(), 6),
    }


def measure_quantising(folder: Path) -> dict[str, Any]:
    return {
        f"{bits}-bit, {rule}": in_a_process("one-quantising", str(folder), "--case", rule, "--bits", str(bits))
        for bits in BITS
        for rule in RULES
    }


@torch.no_grad()
def measure_tiling() -> dict[str, Any]:
    """Error of tiles against the whole picture, in float32, for an autoencoder of a quarter of the published widths."""
    from sana_sprint import AutoencoderDC
    from sana_sprint.bench.twins import fill
    from sana_sprint.memory.configs import PUBLISHED, read_configs

    widths = (32, 64, 128, 128, 256, 256)
    config = read_configs(next(iter(PUBLISHED))).vae
    vae = AutoencoderDC.from_config(config, encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    fill(vae, torch.float32, CPU, seed=0)
    vae.eval().to(memory_format=torch.channels_last)
    results: dict[str, Any] = {}
    for size in (1024, 2048, 4096):
        latents = torch.randn(1, 32, size // 32, size // 32, generator=torch.Generator().manual_seed(2))
        vae.disable_tiling()
        whole = vae.decode(latents).sample
        for tile, stride in TILES:
            if tile < size:
                vae.enable_tiling(tile, tile, stride, stride)
                error = (vae.decode(latents).sample - whole).norm() / whole.norm()
                results[f"{size}, tiles of {tile} every {stride}"] = round(error.item(), 4)
                print(json.dumps(results), flush=True)
    return results


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    folder = options.folder
    yield "weights", lambda: write_weights(folder, options.text_layers)
    yield "loading", lambda: measure_bits("loading", folder, options.size)
    yield "one-loading", lambda: load(folder, options.case, options.size)[1]
    yield "drawing", lambda: measure_bits("drawing", folder, options.size)
    yield "one-drawing", lambda: draw(folder, options.case, options.size)
    yield "decoding", lambda: measure_decoding(folder, options.size)
    yield "one-decoding", lambda: decode(folder, options.case, options.size)
    yield "quantising", lambda: measure_quantising(folder)
    yield "one-quantising", lambda: quantise(folder, options.case, options.bits)
    yield "tiling", measure_tiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a picture's side (%(default)s)")
    parser.add_argument("--text-layers", type=int, metavar="N", help="of the text encoder that is written (all)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/memory.json"))
    options = parser.parse_args()
    known = dict(cases(options))
    if options.what not in known:
        parser.error(f"wanted one of {', '.join(name for name in known if not name.startswith('one-'))}")
    if options.folder is None and options.what != "tiling":
        parser.error("this needs a folder")
    result = known[options.what]()
    print(json.dumps(result))
    if result is not None and not options.what.startswith("one-"):
        # Late, for the processes that are measured shall hold nothing that they do not use.
        from sana_sprint.bench.machine import describe

        name = f"{options.what} {options.size}" if options.what in ("decoding", "drawing") else options.what
        document = json.loads(options.output.read_text()) if options.output.exists() else {}
        document[name] = {"machine": describe(CPU), "result": result}
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
