"""`visplice align` and `visplice instruct`: LightningCLI over the two stages."""

from __future__ import annotations

import contextlib
import itertools
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from visplice.train.data.module import ShardData
from visplice.train.features.features import STAGE, is_feature_folder
from visplice.train.trainer import loggers, parameter_counts, quiet_lightning

# Short names that mean the same in every verb, and what Lightning calls them.
_ALIASES = {"--seed": "--seed_everything", "--device": "--trainer.accelerator", "--dtype": "--trainer.precision"}
_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


class StageCLI(LightningCLI):
    """`fit` and `validate` for one stage; the trained extension is written to `--out`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, required=True, help="Folder for logs, checkpoints and the extension.")

    def before_instantiate_classes(self) -> None:
        """Features bring their own model: the projector alone."""
        config = self.config[self.config.subcommand]
        if "features" in config.model and config.model.features is None:
            sets = [config.data.path] if config.data.path else list(config.data.mixture or ())
            config.model.features = next(filter(is_feature_folder, sets), None)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        out = self._get(self.config, "out")  # no link_arguments: jsonargparse checks a link before `out` has a value
        for name in ("logger", "default_root_dir"):
            if (given := self._get(self.config, f"trainer.{name}")) is not None:
                raise ValueError(f"trainer.{name} is {given!r}; logs and checkpoints go to --out {out}")
        return super().instantiate_trainer(logger=loggers(out), default_root_dir=out, **kwargs)

    def before_fit(self) -> None:
        trainable, frozen = parameter_counts(self.model.model)
        print(f"{trainable:,} trainable parameters, {frozen:,} frozen")

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and not self.trainer.interrupted:
            self.model.save(self._get(self.config, "out"))
            print(f"wrote {Path(self._get(self.config, 'out')) / 'visplice.json'}")


def translate(arguments: list[str]) -> list[str]:
    """Arguments with `--seed`, `--device` and `--dtype` in Lightning's words.

    Raises:
        ValueError: a dtype that there is no precision for.
    """
    words: list[str] = []
    before = ""  # the argument in front, as it was typed
    for argument in (part for raw in arguments for part in _split(raw)):
        if before == "--dtype":
            if argument not in _PRECISIONS:
                raise ValueError(f"--dtype is {argument!r}; it is one of {', '.join(_PRECISIONS)}")
            words.append(_PRECISIONS[argument])
        else:
            words.append(_ALIASES.get(argument, argument))
        before = argument
    return words


def _split(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in _ALIASES else [argument]


def _configs(stage: str, arguments: list[str]) -> list[str]:
    """The defaults of a stage: the shipped YAML, and for a folder of features the encoder and LLaMA that made them."""
    shipped = str(files("visplice.train") / "configs" / f"{stage}.yaml")
    folders = filter(is_feature_folder, _data_paths(arguments) if stage == "align" else [])
    return [shipped, *(str(Path(folder) / STAGE) for folder in itertools.islice(folders, 1))]


def _data_paths(arguments: list[str]) -> list[str]:
    """What the arguments, and the files behind `--config`, name as training data, the last first."""
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    found: list[Any] = []
    for name, value in itertools.pairwise(parts):
        with contextlib.suppress(OSError, yaml.YAMLError, TypeError, KeyError):  # for LightningCLI to complain of
            if name == "--data.path":
                found.append(value)
            elif name == "--data.mixture":
                found += yaml.safe_load(value)
            elif name in ("--config", "-c"):
                data = yaml.safe_load(Path(value).read_text())["data"]
                found += [data["path"]] if data.get("path") else data["mixture"]
    return [str(path) for path in reversed(found)]


def run(stage: str, arguments: list[str]) -> None:
    """Runs `align` or `instruct` with the arguments behind the verb; the shipped config is the default.

    Raises:
        ValueError: arguments that do not go together or ask for what this machine does not have.
    """
    quiet_lightning()
    module: Any
    if stage == "align":
        from visplice.train.align import Align as module
    else:
        from visplice.train.instruct import Instruct as module
    words = translate(arguments)
    configs = _configs(stage, words)
    try:
        StageCLI(
            module,
            ShardData,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"visplice {stage}",
                **{name: {"default_config_files": configs} for name in ("fit", "validate")},
            },
            save_config_kwargs={"overwrite": True},
            args=words,
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
