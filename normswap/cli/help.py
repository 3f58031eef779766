"""What `--help` prints: the options of a command under headings, and an example. Plain text, as rich would double its time."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand

OPTIONS = "Options"
EXAMPLES = {
    "demo": "normswap demo",
    "convert": "normswap convert model.pt -o converted",
    "heal": "normswap heal hf:model --data texts --minutes 15 -o healed",
    "inspect": "normswap inspect torchvision:resnet18",
    "verify": "normswap verify model.pt converted",
    "export": "normswap export converted -o model.onnx",
    "fold": "normswap fold model.onnx -o folded.onnx",
    "revert": "normswap revert converted -o model.pt",
    "sensitivity": "normswap sensitivity model.pt --data calibration.pt --budget 0.05",
    "landscape": "normswap landscape model.pt --data batches.pt --plot landscape.svg",
    "watch": "normswap watch run.csv",
}


class Command(TyperCommand):
    """A command whose help has its options under the headings that they were declared with."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            heading = "Arguments" if isinstance(parameter, TyperArgument) else getattr(parameter, "rich_help_panel", None) or OPTIONS
            if record is not None:
                groups.setdefault(heading, []).append(record)
        last = groups.pop(OPTIONS, [])  # --json, --debug and --help are looked for least
        for heading, records in (*groups.items(), (OPTIONS, last)):
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.name in EXAMPLES:
            with formatter.section("Example"):
                formatter.write(f"{'':{formatter.current_indent}}{EXAMPLES[self.name]}\n")
