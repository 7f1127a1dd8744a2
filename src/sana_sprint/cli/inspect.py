"""`sana-sprint inspect`: a checkpoint in; what it is, how large, and what is wrong with it, out."""

import argparse
import json
from typing import TYPE_CHECKING

from sana_sprint.cli import screen
from sana_sprint.cli.convert import add_settings, describe_doubts, settings_of
from sana_sprint.sizes import readable_bytes

if TYPE_CHECKING:
    from sana_sprint.checkpoints.inspect import Inspection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("input", metavar="INPUT", help="file, index of several, folder, or file of the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    add_settings(parser.add_argument_group("what the tensors cannot tell"))
    parser.set_defaults(run=run)


def describe(inspection: "Inspection") -> list[str]:
    """One model, in lines."""
    from sana_sprint.checkpoints.inspect import readable_shape

    dtypes = ", ".join(inspection.dtypes)
    loaded = [f"{readable_bytes(inspection.num_parameters * n)} in {name}" for name, n in (("bf16", 2), ("fp32", 4))]
    prefix = f", every name behind {inspection.prefix}" if inspection.prefix else ""
    lines = [
        f"{inspection.path}",
        f"  {inspection.name}: {inspection.kind} in the {inspection.layout} layout{prefix}",
        f"  {inspection.num_parameters:,} parameters; {inspection.num_tensors} tensors in {dtypes}",
        f"  {readable_bytes(inspection.num_bytes)} on disk; in memory {', '.join(loaded)}",
    ]
    for title, names in (
        ("kept aside in a conversion", inspection.aside),
        ("left out in a conversion", inspection.dropped),
        ("of another model", inspection.elsewhere),
    ):
        if names:
            lines.append(f"  {title}: {len(names)} tensors, {names[0]} first")
    lines += [f"  note: {line}" for line in describe_doubts(inspection.doubts)]
    lines += [f"  missing: {name}" for name in inspection.missing]
    lines += [f"  unexpected: {name}" for name in inspection.unexpected]
    lines += [
        f"  mis-shaped: {name} is {readable_shape(found)}, wanted {readable_shape(wanted)}"
        for name, found, wanted in inspection.misshaped
    ]
    if inspection.is_exact:
        lines.append("  complete: nothing missing, unexpected or mis-shaped")
    return lines


def run(options: argparse.Namespace) -> None:
    """Prints what the input is."""
    with screen.quiet_libraries():
        from sana_sprint.checkpoints.hub import find_source
        from sana_sprint.checkpoints.inspect import inspect_checkpoint

        found = inspect_checkpoint(find_source(options.input), ema=options.ema, settings=settings_of(options))
    if options.json:
        print(json.dumps([one.as_document() for one in found], indent=2))
        return
    print("\n".join(line for one in found for line in describe(one)))
