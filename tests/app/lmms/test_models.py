"""The classes that lmms-eval opens, with stand-ins for the few things of it that they use."""

import abc
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate", reason="lmms-eval brings accelerate, and so do peft and bitsandbytes")


class Lmms(abc.ABC):
    """As lmms-eval 0.7.3 has it, as far as it is used."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self) -> int:
        return self._rank

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass
class GenerationResult:
    text: Any
    token_counts: Any = None


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture
def models(monkeypatch):
    """`visplice.app.lmms.models`, beside stand-ins for lmms-eval."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "visplice.app.lmms.models", raising=False)
    from visplice.app.lmms import models

    yield models
    sys.modules.pop("visplice.app.lmms.models", None)
    vars(sys.modules["visplice.app.lmms"]).pop("models", None)


def opened(kind: type, text: str = "pretrained=embedded,device=cpu", **command_line: Any) -> Any:
    return kind.create_from_arg_string(text, {"batch_size": "2", "device": None} | command_line)


def test_manifest_names_classes_of_both_interfaces(models) -> None:
    from visplice.app.lmms import manifest

    found = manifest()
    assert found.model_id == "visplice"
    for path, is_simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        assert module == models.__name__
        assert issubclass(getattr(models, name), Lmms)
        assert getattr(models, name).is_simple is is_simple


def test_both_classes_answer_and_choose(models) -> None:
    doc = {"question": "What shape is there?", "pictures": [Image.new("RGB", (112, 112), "white")]}
    said = {}
    for kind in (models.VispliceSimple, models.VispliceChat):
        model = opened(kind)
        assert (model.batch_size, model.device, model.rank) == (2, torch.device("cpu"), 0)
        assert not any(module.training for module in model.model.modules())
        model.task_dict = {"task": {"test": [doc]}}
        options, place = {"max_new_tokens": 4}, (0, "task", "test")
        content = [{"type": "image", "url": doc["pictures"][0]}, {"type": "text", "text": doc["question"]}]
        arguments: tuple[Any, ...] = (doc["question"], options, lambda doc: doc["pictures"])
        if kind is models.VispliceChat:
            arguments = (doc["question"], lambda doc, c=content: [{"role": "user", "content": c}], options)
        said[kind] = model.generate_until([Instance((*arguments, *place))] * 2)
        assert said[kind] == model.model.generate([doc["pictures"]] * 2, [doc["question"]] * 2, max_new_tokens=4)
    assert len(set(map(tuple, said.values()))) == 1

    greedy = said[models.VispliceChat][0]
    ask = [
        Instance((doc["question"], f" {choice}", lambda doc: doc["pictures"], *place)) for choice in ("zebra", greedy)
    ]
    found = model.loglikelihood(ask)
    # Wrapped: a bare pair is spelt out by lmms-eval 0.7 and lost.
    assert all(isinstance(result, GenerationResult) for result in found)
    losses = [loss for loss, _ in (result.text for result in found)]
    assert losses[1] < losses[0]
    total = opened(models.VispliceSimple, "pretrained=embedded,device=cpu,loss=sum")
    total.task_dict = model.task_dict
    assert total.loglikelihood(ask)[1].text[0] > losses[1] > 0


@pytest.mark.parametrize(
    ("text", "command_line", "line"),
    [
        ("pretrained=no/such/folder", {}, "visplice: no/such/folder/visplice.json: no such file"),
        ("pretrained=embedded,lora=3", {}, "visplice: --model_args holds 'lora', which visplice does not know"),
        ("pretrained=embedded", {"batch_size": "0"}, "visplice: batch_size is 0; it is a whole number, at least 1"),
        ("pretrained=embedded", {"device": "tpu"}, "visplice: device is 'tpu'; it is one of"),
    ],
)
def test_foolish_arguments_end_in_one_line_and_status_2(models, capsys, text, command_line, line) -> None:
    with pytest.raises(SystemExit) as left:
        opened(models.VispliceChat, text, **command_line)
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_what_is_not_built_is_said(models) -> None:
    model = opened(models.VispliceSimple)
    with pytest.raises(NotImplementedError, match="conversations of several rounds"):
        model.generate_until_multi_round([None])
    with pytest.raises(ValueError, match="leave --apply_chat_template out"):
        _ = model.chat_template
