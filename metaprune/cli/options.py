"""Options that several verbs share, written once."""

from typing import Annotated

import typer

NETWORK, DECISION, RECOVERY, OUTPUT = "Network and data", "What to cut", "Recovery", "Output"

Model = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="zoo:NAME, timm:NAME, torchvision:NAME, hf:CLASS_OR_FOLDER or package.module:factory.",
        rich_help_panel=NETWORK,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Its weights: .safetensors, or .pt with tensors only.", rich_help_panel=NETWORK),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="digits, cifar10:FOLDER, imagefolder:FOLDER, npz:FILE or package.module:factory.",
        rich_help_panel=NETWORK,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="SHAPE", help="Shape of one input with its batch, e.g. 1,3,224,224.", rich_help_panel=NETWORK),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Option of the model's factory; as often as needed.", rich_help_panel=NETWORK
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE", help="Import it for its rules of your own ops; as often as needed.", rich_help_panel=NETWORK
    ),
]
Freeze = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Modules that must stay: a path such as 'layer1.*', or a class; as often as needed.",
        rich_help_panel=DECISION,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Modules that alone may be cut, named likewise.", rich_help_panel=DECISION),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_FILE",
        help="What the network is for (`metaprune list devices`), or a profile of your own in YAML.",
        rich_help_panel=DECISION,
    ),
]
RunFolder = Annotated[
    str | None, typer.Option("--run", metavar="FOLDER", help="A result of `metaprune prune`.", rich_help_panel=NETWORK)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
