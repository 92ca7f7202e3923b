"""Options that the sampling commands (`generate`, `infill`, `chat`) share, and the settings and model they select."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffusify.cli.options import read_value, unescape

if TYPE_CHECKING:
    from diffusify.sampling.diffusion_lm import DiffusionLM
    from diffusify.sampling.sampling_config import SamplingConfig

_SAMPLING = "Sampling"
_DECODING = "Decoding order and speed"

MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of tokens to generate.",
        show_default="predicted by the length head of the model if it has one; else 64, or 256 for answers of models "
        "that are not bidirectional",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", help="Show the text while it is denoised. Colours show the confidence of each token.")
]
Preset = Annotated[
    Literal["quality", "balanced", "fast"] | None,
    typer.Option(
        help="Sampling settings that suit this model. Other options override them.", rich_help_panel=_SAMPLING
    ),
]
Settings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON file with sampling settings, as saved by `SamplingConfig.save`. Other options override them.",
        rich_help_panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Sampling temperature. 0 is greedy decoding.", show_default="0", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample from the k most likely tokens only.", show_default="all", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the smallest set of tokens with at least this total probability.",
        show_default="1",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Repetition penalty. Values above 1 make tokens that already occur in the text less likely.",
        show_default="1",
        rich_help_panel=_SAMPLING,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Scale of classifier-free guidance. Values above 0 follow the prompt more closely, at twice the cost.",
        show_default="0",
        rich_help_panel=_SAMPLING,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(help="Regular expression that the whole generated text must match.", rich_help_panel=_SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help=r"Text that ends the generation, and is left out. Can be given several times. \n is a line break.",
        show_default="none",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Random seed. The same seed gives the same text.", show_default="0", rich_help_panel=_SAMPLING),
]
Rerank = Annotated[
    int | None,
    typer.Option(
        help="Number of fillings, one greedy and the others sampled, of which the text is kept that the model's "
        "autoregressive half finds likeliest (recipe block with infilling).",
        show_default="no reranking",
        rich_help_panel=_SAMPLING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Total number of denoising steps. Fewer steps decode more tokens per step.",
        show_default="one per token, or fewer if the policy decodes several at once",
        rich_help_panel=_DECODING,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Decode all tokens with a probability above this value in each step, for example 0.9.",
        show_default="set by the policy",
        rich_help_panel=_DECODING,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help="Rule that selects the tokens to decode or remask in each step: Unmask, Ancestral, Rdm, ReMdm, Klass, "
        "Wino, or a JSON object as in diffusion_config.json.",
        show_default="the policy of the model",
        rich_help_panel=_DECODING,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Decode the text in windows of this many tokens, from left to right (recipes ar and mlm).",
        show_default="the whole text at once",
        rich_help_panel=_DECODING,
    ),
]
Cache = Annotated[
    Literal["exact", "prefix", "dual", "none"] | None,
    typer.Option(
        help="KV cache. exact: keys and values of finished blocks (recipe block). prefix, dual: approximate caches for "
        "--window (recipe ar). none: no cache.",
        show_default="exact",
        rich_help_panel=_DECODING,
    ),
]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Speculative decoding with the exact output of autoregressive decoding, in fewer forward passes (recipe "
        "block). Equal to --tolerance 0. It is the default of models that keep their AR half.",
        rich_help_panel=_DECODING,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Speculative decoding that accepts a draft token whose log-probability is at most this many nats below "
        "that of the AR choice (recipe block). 0 is lossless.",
        show_default="0 for models that keep their AR half",
        rich_help_panel=_DECODING,
    ),
]


def sampling_config(model: str, options: dict[str, Any], *, infilling: bool = False) -> "SamplingConfig":
    """The sampling settings that the options of a command select, made before any weights are read.

    The settings of --preset or --settings are the start, and the other options override them. A preset depends on the
    model, and with `infilling` on the attention that it infills with. ValueError for options that exclude each other
    and for values out of bounds.
    """
    from dataclasses import fields

    from diffusify.config import from_plain
    from diffusify.diffusion.policies import Policy
    from diffusify.models.recipes import read_config
    from diffusify.sampling.sampling_config import SamplingConfig

    if options["preset"] and options["settings"]:
        raise ValueError(f"--preset {options['preset']} and --settings {options['settings']}: give one of the two")
    start = SamplingConfig()
    if options["preset"]:
        config = read_config(model)
        start = SamplingConfig.preset(options["preset"], config.infiller if infilling else config)
    elif options["settings"]:
        start = SamplingConfig.load(options["settings"])
    names = [field.name for field in fields(SamplingConfig)]
    changes = {name: options[name] for name in names if options.get(name) is not None}
    if "policy" in changes:
        changes["policy"] = from_plain(read_value(changes["policy"]), Policy, "--policy")
    if "stop" in changes:
        changes["stop"] = tuple(map(unescape, changes["stop"]))
    if options.get("lossless"):
        changes["tolerance"] = lossless_tolerance(options)
    return start.override(**changes)


def lossless_tolerance(options: dict[str, Any]) -> float:
    """The tolerance that --lossless selects. ValueError if --tolerance is given as well."""
    if options["tolerance"] is not None:
        raise ValueError("--lossless is --tolerance 0; give one of the two")
    return 0.0


def load_model(model: str, *, device: str, dtype: str) -> "DiffusionLM":
    """Load a diffusion model, or a base as it is (see `DiffusionLM.from_pretrained`). ValueError if there is none."""
    from diffusify.sampling.diffusion_lm import DiffusionLM

    return DiffusionLM.from_pretrained(model, dtype=dtype, device=device)
