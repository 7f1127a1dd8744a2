"""`sana-sprint evaluate`: a model, or pictures that are there already, in; scores out."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli import held_out, screen
from sana_sprint.cli.arguments import whole_number
from sana_sprint.cli.model import EMBEDDED, FLOW_STEPS, SPRINT_STEPS

if TYPE_CHECKING:
    import torch

    from sana_sprint.cli.model import Pipeline
    from sana_sprint.evaluation.folders import PictureFolder
    from sana_sprint.evaluation.frechet import FeatureNetwork

_INCEPTION = "inception"

_NUM_CAPTIONS = 500

# Of the options that draw, and of those that score pictures: neither go with the other.
_MODEL_DEFAULTS = {
    **held_out.DEFAULTS,
    "num_captions": _NUM_CAPTIONS,
    "steps": None,
    "frechet": False,
    "controlnet": None,
}
_PICTURE_DEFAULTS = {
    "reference": None,
    "features": _INCEPTION,
    "size": None,
    "clip": None,
    "judge": False,
    "captions": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    model = parser.add_argument_group("a model, on captions of the shapes world")
    held_out.add_arguments(model, num_captions=_NUM_CAPTIONS)
    model.add_argument(
        "--steps",
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help=f"steps; several give a row of scores each ({SPRINT_STEPS}, and {FLOW_STEPS} for a flow model)",
    )
    model.add_argument(
        "--frechet",
        action="store_true",
        default=None,
        help="also the Fréchet distance to renderings of the captions, in the eyes of the model's autoencoder",
    )
    model.add_argument(
        "--controlnet",
        metavar="CONTROLNET",
        help="instead, how well a ControlNet follows edges: a folder, a hub id, or embedded (none)",
    )
    pictures = parser.add_argument_group("pictures that are there already")
    pictures.add_argument("--pictures", type=Path, metavar="FOLDER", help="score these, and draw nothing")
    pictures.add_argument("--reference", type=Path, metavar="FOLDER", help="Fréchet distance to these pictures")
    pictures.add_argument(
        "--features",
        metavar="NETWORK",
        help=f"whose eyes the distance is in: {_INCEPTION}, {EMBEDDED}, or the folder of an autoencoder ({_INCEPTION})",
    )
    pictures.add_argument(
        "--size", type=whole_number(1), metavar="N", help="first cut squares of N pixels (pictures as they are)"
    )
    pictures.add_argument("--clip", metavar="MODEL", help="CLIP score by this CLIP, a folder or hub id")
    pictures.add_argument(
        "--judge", action="store_true", default=None, help="judge pictures of the shapes world, per category"
    )
    pictures.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="captions by the pictures' names, as JSON (those that sana-sprint generate left in its PNGs)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, .. (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Scores the model or the pictures, and prints the scores."""
    if options.pictures is None:
        _refuse(options, _PICTURE_DEFAULTS, "this needs --pictures")
        held_out.fill_in(options, **_MODEL_DEFAULTS)
        if options.controlnet is None:
            _run_model(options)
        else:
            _run_controlnet(options)
    else:
        _refuse(options, _MODEL_DEFAULTS, "nothing is drawn where --pictures are given")
        held_out.fill_in(options, **_PICTURE_DEFAULTS)
        _run_pictures(options)


def _refuse(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: {reason}")


def _run_model(options: argparse.Namespace) -> None:
    from sana_sprint.cli.model import own_steps

    with screen.quiet_libraries():
        from sana_sprint.shapes.judge import score

        artist = held_out.open_artist(options)
        distance = artist.distance() if options.frechet else None
        results: list[dict[str, Any]] = []
        for steps in options.steps or [own_steps(artist.pipe)]:
            pictures = artist.draw(f"drawing, {steps} steps", num_inference_steps=steps)
            result: dict[str, Any] = {"steps": steps, "scores": score(pictures, artist.held_out.requests)}
            if distance:
                result["frechet"] = {
                    "distance": distance(pictures),
                    "features": "autoencoder",
                    "num_references": distance.num_references,
                }
            results.append(result)
    if options.json:
        _print_json({**artist.settings(), **(results[0] if len(results) == 1 else {"results": results})})
        return
    print(f"{options.num_captions} held-out captions, guidance {options.guidance}")
    _print_table([{"steps": str(result["steps"]), **_cells(result)} for result in results])
    if distance:
        print(f"Fréchet distance to {distance.num_references} renderings of the captions, by the model's autoencoder")


def _run_controlnet(options: argparse.Namespace) -> None:
    if options.frechet:
        raise ValueError("--frechet: not with --controlnet")
    from sana_sprint.cli.control import find_controlnet
    from sana_sprint.cli.model import own_steps

    with screen.quiet_libraries():
        from sana_sprint import SanaSprintControlNetPipeline, SanaSprintPipeline

        controlnet = find_controlnet(options.controlnet)
        artist = held_out.open_artist(options, SanaSprintControlNetPipeline, controlnet)
        base = SanaSprintPipeline.from_pipe(artist.pipe)
        base.set_progress_bar_config(disable=True)
        results = [
            {"steps": steps, "scores": _score_controlnet(artist, base, steps)}
            for steps in options.steps or [own_steps(artist.pipe)]
        ]
    if options.json:
        _print_json({**artist.settings(), "controlnet": options.controlnet, "results": results})
        return
    print(f"{options.num_captions} held-out scenes by their edges and colours, guidance {options.guidance}")
    _print_table([{"steps": str(result["steps"]), **_cells(result)} for result in results])


def _score_controlnet(artist: held_out.Artist, base: "Pipeline", steps: int) -> dict[str, float]:
    """Of the artist's pipeline, which is given drawings, and of the colours of one that is given none."""
    from sana_sprint.cli.model import seen_size
    from sana_sprint.evaluation.control import score_base_colours, score_control, score_open_captions

    options = artist.options
    with held_out.bar(f"drawing, {steps} steps", 3 * options.num_captions) as bar:

        def draw_controlled(captions: Sequence[str], drawings: Sequence[Any], num_drawn: int) -> Any:
            bar.update(len(captions))
            given = {"control_image": list(drawings), "num_inference_steps": steps}
            return artist.draw_batch(artist.pipe, captions, num_drawn, **given)

        def draw(captions: Sequence[str], num_drawn: int) -> Any:
            bar.update(len(captions))
            return artist.draw_batch(base, captions, num_drawn, num_inference_steps=steps)

        side, _ = seen_size(artist.model)
        return {
            **score_control(draw_controlled, options.num_captions, options.seed, size=side),
            "base_colours": score_base_colours(draw, options.num_captions, options.seed),
            "open_captions": score_open_captions(draw_controlled, options.num_captions, options.seed, size=side),
        }


def _run_pictures(options: argparse.Namespace) -> None:
    if options.reference is None and options.clip is None and not options.judge:
        raise ValueError("say what the pictures shall be scored by: --reference, --clip or --judge")
    if options.captions and not (options.clip or options.judge):
        raise ValueError("--captions: this needs --clip or --judge")
    if options.reference is None and options.features != _INCEPTION:
        raise ValueError("--features: this needs --reference")
    with screen.quiet_libraries():
        import transformers

        from sana_sprint.cli.model import choose_device
        from sana_sprint.evaluation.folders import PictureFolder

        transformers.utils.logging.disable_progress_bar()
        device = choose_device(options.device)
        pictures = PictureFolder(options.pictures, options.size)
        captions = _captions_of(pictures, options.captions) if options.clip or options.judge else []
        # All are prepared before the first one runs, so that what cannot work is said at once.
        scores: dict[str, Callable[[], dict[str, Any]]] = {}
        if options.judge:
            scores["scores"] = _prepare_judge(pictures, captions)
        if options.reference is not None:
            references = PictureFolder(options.reference, options.size)
            scores["frechet"] = _prepare_distance(pictures, references, options.features, device)
        if options.clip is not None:
            scores["clip"] = _prepare_clip(pictures, captions, options.clip, device)
        result = {name: score() for name, score in scores.items()}
    if options.json:
        _print_json({"pictures": str(options.pictures), "num_pictures": len(pictures), **result})
        return
    _print_table([{"pictures": str(len(pictures)), **_cells(result)}])
    if options.reference is not None:
        print(f"Fréchet distance to {len(references)} pictures in {options.reference}, by {options.features}")
    if options.clip is not None:
        print(f"CLIP score by {options.clip}")


def _captions_of(pictures: "PictureFolder", file: Path | None) -> list[str]:
    """The caption of each picture: that of its name in the file, or the one that was left in its PNG."""
    from sana_sprint.cli.records import read_record
    from sana_sprint.evaluation.folders import read_captions

    if file is None:
        records = [read_record(path) for path in pictures.paths]
        sheets = [path for path, record in zip(pictures.paths, records) if record.is_sheet]
        if sheets:
            raise ValueError(f"{sheets[0]} is a sheet of several pictures: single ones can be scored")
        return [record.pictures[0].prompt for record in records]
    captions = read_captions(file)
    missing = [path for path in pictures.paths if path.stem not in captions]
    if missing:
        raise ValueError(f"{file} has no caption for {len(missing)} of {len(pictures)} pictures, such as {missing[0]}")
    return [captions[path.stem] for path in pictures.paths]


def _prepare_judge(pictures: "PictureFolder", captions: list[str]) -> Callable[[], dict[str, Any]]:
    from sana_sprint.shapes.captions import parse
    from sana_sprint.shapes.judge import score

    requests = [parse(caption) for caption in captions]
    return lambda: score(list(_with_bar(pictures)), requests)


def _prepare_distance(
    pictures: "PictureFolder", references: "PictureFolder", features: str, device: "torch.device"
) -> Callable[[], dict[str, Any]]:
    from sana_sprint.evaluation.folders import check_one_size
    from sana_sprint.evaluation.frechet import frechet_distance, measure

    check_one_size(pictures, references)
    network = _feature_network(features, device)

    def measured() -> dict[str, Any]:
        drawn, wanted = (measure(network, _with_bar(folder)) for folder in (pictures, references))
        held_out.warn_if_few(min(drawn.num_pictures, wanted.num_pictures), drawn.num_features)
        distance = frechet_distance(drawn, wanted)
        sources = {"features": features, "num_references": len(references), "reference": str(references.folder)}
        return {"distance": distance, **sources}

    return measured


def _prepare_clip(
    pictures: "PictureFolder", captions: list[str], name: str, device: "torch.device"
) -> Callable[[], dict[str, Any]]:
    from sana_sprint.evaluation.clip import ClipScorer

    scorer = ClipScorer(name, device)
    return lambda: {"score": scorer.mean(_with_bar(pictures), captions), "model": name}


def _feature_network(name: str, device: "torch.device") -> "FeatureNetwork":
    from sana_sprint.assets import embedded_checkpoint
    from sana_sprint.evaluation.features import InceptionFeatures, load_autoencoder_features

    if name == _INCEPTION:
        return InceptionFeatures(device)
    return load_autoencoder_features(embedded_checkpoint() if name == EMBEDDED else Path(name), device)


def _with_bar(pictures: "PictureFolder") -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(pictures, desc=str(pictures.folder), unit="picture", disable=None, leave=False)


def _cells(result: dict[str, Any]) -> dict[str, str]:
    """The scores of a result by the titles of their columns."""
    cells = {name.replace("_", " "): f"{value:.3f}" for name, value in result.get("scores", {}).items()}
    if "frechet" in result:
        cells["Fréchet"] = f"{result['frechet']['distance']:.4f}"
    if "clip" in result:
        cells["CLIP"] = f"{result['clip']['score']:.2f}"
    return cells


def _print_table(rows: list[dict[str, str]]) -> None:
    from sana_sprint.evaluation.tables import aligned

    print("\n".join(aligned([list(rows[0]), *([*row.values()] for row in rows)])))


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(_rounded(document), indent=2))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value
