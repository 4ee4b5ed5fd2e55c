"""The options of `fastmask transfer`; their defaults are those of transfer.Config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA = "What to run on"
SWEEP = "Which runs"
MASKS = "How masks are found"
HEAD = "How classifiers are trained"
OUT = "What comes out"

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="digits|DIR",
        rich_help_panel=DATA,
        help="The embedded digits, or a folder laid out as domain/class/image.",
    ),
]

Splits = Annotated[
    Path | None,
    typer.Option(
        "--splits",
        metavar="DIR",
        rich_help_panel=DATA,
        help="Folder of split files; otherwise a seeded split, stratified by class.",
    ),
]

TestFraction = Annotated[
    float | None,
    typer.Option(
        "--test-fraction",
        metavar="SHARE",
        rich_help_panel=DATA,
        help="Share of each class that is for testing, between 0 and 1.",
    ),
]

Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="NAME",
        rich_help_panel=DATA,
        help="Frozen feature extractor: resnet18, resnet50, efficientnet_lite0 or any timm "
        r"name. [dim]\[default: digits_cnn for the digits, else efficientnet_lite0][/dim]",
    ),
]

Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        rich_help_panel=DATA,
        help="Weights of the backbone, .safetensors or .pth; otherwise the library's own.",
    ),
]

Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR|none",
        rich_help_panel=DATA,
        help="Where features of images are kept from run to run; auto is your cache folder.",
    ),
]

Source = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="DOMAIN",
        rich_help_panel=SWEEP,
        help=r"Domain to learn first; repeat for several. [dim]\[default: all][/dim]",
    ),
]

Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="DOMAIN",
        rich_help_panel=SWEEP,
        help=r"Domain to fine-tune on; repeat for several. [dim]\[default: all][/dim]",
    ),
]

Strategy = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        rich_help_panel=SWEEP,
        help="What finds the weights to freeze: naive, editor, binary, kl, lowrank, magnitude or "
        "random; repeat for several.",
    ),
]

Start = Annotated[
    list[str] | None,
    typer.Option(
        "--start",
        metavar="NAME",
        rich_help_panel=SWEEP,
        help="Start of the free weights under the binary mask: source-start, source-end, "
        "random; repeat for several. The others take the first of these.",
    ),
]

Seeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="N",
        rich_help_panel=SWEEP,
        help="How many seeds; 3 or more give means with a spread.",
    ),
]

Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="FIRST",
        rich_help_panel=SWEEP,
        help="The first seed; the others follow it.",
    ),
]

Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="NAME=V1,V2,...",
        rich_help_panel=SWEEP,
        help="Run the strategies that have this knob at each of these values too, such as "
        "density=0.3,0.7, beta=0.1,1 or tau=0.5,2; repeat for several.",
    ),
]

Curves = Annotated[
    bool,
    typer.Option(
        "--curves",
        rich_help_panel=SWEEP,
        help="Vary the knobs of every strategy over a few values each: trade-off curves in the report.",
    ),
]

Density = Annotated[
    str | None,
    typer.Option(
        "--density",
        metavar="SHARE|none",
        rich_help_panel=MASKS,
        help="Share of weights the binary mask freezes, above 0, at most 1; none leaves it to "
        "beta, as the paper does.",
    ),
]

Beta = Annotated[
    float | None,
    typer.Option(
        "--beta",
        metavar="B",
        rich_help_panel=MASKS,
        help="Pull on the binary mask's logits, at least 0; more of it frees more weights.",
    ),
]

Tau = Annotated[
    float | None,
    typer.Option(
        "--tau",
        metavar="T",
        rich_help_panel=MASKS,
        help="Temperature of the Gumbel-sigmoid, above 0.",
    ),
]

Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="S",
        rich_help_panel=MASKS,
        help="Masks sampled for each batch; must divide the batch.",
    ),
]

EditorRule = Annotated[
    str | None,
    typer.Option(
        "--editor-rule",
        metavar="std|quantile",
        rich_help_panel=MASKS,
        help="What the editor freezes: edits below mean - std, or the smallest share.",
    ),
]

Hidden = Annotated[
    int | None,
    typer.Option(
        "--hidden",
        metavar="UNITS",
        rich_help_panel=HEAD,
        help="Units of a hidden layer of the classifier; 0 is a linear one.",
    ),
]

Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="NAME",
        rich_help_panel=HEAD,
        help="Layers of the backbone to mask and fine-tune too, end to end, by name or pattern such "
        "as 'layer4.*'; repeat for several. [dim]\\[default: the classifier's last layer alone][/dim]",
    ),
]

Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        rich_help_panel=HEAD,
        help="With --layers, what becomes of batch norms: frozen, affine, per_task or shared.",
    ),
]

Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="grouped|loop",
        rich_help_panel=HEAD,
        help="Train runs that share images as one problem, or one after the other, slower.",
    ),
]

Batch = Annotated[
    int | None,
    typer.Option(
        "--batch", metavar="ROWS", rich_help_panel=HEAD, help="Images in a training step."
    ),
]

TargetSteps = Annotated[
    int | None,
    typer.Option(
        "--target-steps",
        metavar="N",
        rich_help_panel=HEAD,
        help="Steps of fine-tuning on the target.",
    ),
]

TargetLr = Annotated[
    float | None,
    typer.Option(
        "--target-lr",
        metavar="RATE",
        rich_help_panel=HEAD,
        help="Learning rate of fine-tuning on the target.",
    ),
]

TrainUnmasked = Annotated[
    bool,
    typer.Option(
        "--train-unmasked",
        rich_help_panel=HEAD,
        help="Fine-tune biases and other parameters without a mask as well.",
    ),
]

ExactRecall = Annotated[
    bool,
    typer.Option(
        "--exact-recall",
        rich_help_panel=HEAD,
        help="Keep the originals of the free weights, so that the source model comes back bit "
        "for bit.",
    ),
]

Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel=HEAD,
        help="cpu, cuda, cuda:1, ...",
    ),
]

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        rich_help_panel=HEAD,
        help="Any other setting by its name in config.json, such as mask_steps=1000; repeat "
        "for several.",
    ),
]

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        rich_help_panel=OUT,
        help=r"Run folder to write, new or empty. [dim]\[default: runs/<data>-<date>-<time>][/dim]",
    ),
]

Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        rich_help_panel=OUT,
        help="Go on with the interrupted sweep in this run folder, with the settings it began with; "
        "finished runs are kept.",
    ),
]

From = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        rich_help_panel=OUT,
        help="Start from the config.json of an earlier run; other options override it.",
    ),
]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        rich_help_panel=OUT,
        help="Print a summary as JSON on standard output, and nothing else there.",
    ),
]

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        rich_help_panel=OUT,
        help="No progress and no tables; only the path of the report.",
    ),
]

NoReport = Annotated[
    bool,
    typer.Option(
        "--no-report",
        rich_help_panel=OUT,
        help="Leave out figures and report.html (fastmask report draws them later).",
    ),
]

Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        rich_help_panel=OUT,
        help="Show the traceback of an error.",
    ),
]
