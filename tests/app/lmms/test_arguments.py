"""`--model_args` of the model under lmms-eval."""

import pytest
import torch

from visplice.app.lmms.arguments import ModelArguments, read_arguments


def test_arguments_are_read_and_go_before_lmms_eval_s_own() -> None:
    command_line = {"batch_size": "1", "device": "cuda:1", "max_batch_size": None}  # as lmms-eval gives them
    assert read_arguments("pretrained=embedded", command_line) == ModelArguments(
        pretrained="embedded", batch_size=1, device="cuda:1"
    )
    text = "pretrained=runs/2026,device=cpu,dtype=bfloat16,batch_size=8,seed=3,loss=sum"
    assert read_arguments(text, command_line) == ModelArguments(
        pretrained="runs/2026", device="cpu", dtype="bfloat16", batch_size=8, seed=3, loss="sum"
    )
    assert read_arguments("pretrained=16", {}).pretrained == "16"


@pytest.mark.parametrize(
    ("text", "batch_size", "message"),
    [
        ("", "1", "--model_args lacks pretrained=DIR"),
        ("pretrained", "1", "--model_args holds 'pretrained'; it is name=value"),
        ("pretrained=", "1", "--model_args holds 'pretrained='; it is name=value"),
        ("pretrained=embedded,lora=3", "1", "--model_args holds 'lora', which visplice does not know; it knows pre"),
        ("pretrained=a,pretrained=b", "1", "--model_args holds 'pretrained' twice"),
        ("pretrained=a", "0", "batch_size is 0; it is a whole number, at least 1"),
        ("pretrained=a", "auto", "batch_size is 'auto'; it is a whole number, at least 1"),
        ("pretrained=a,seed=x", "1", "seed is 'x'; it is a whole number"),
        ("pretrained=a,dtype=float64", "1", "dtype is 'float64'; it is one of float32, bfloat16, float16"),
        ("pretrained=a,loss=max", "1", "loss is 'max'; it is one of mean, sum"),
    ],
)
def test_mistake_is_said_in_one_line(text, batch_size, message) -> None:
    with pytest.raises(ValueError) as caught:
        read_arguments(text, {"batch_size": batch_size})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_device_is_picked(monkeypatch) -> None:
    def device(name: str, process: int | None = None) -> torch.device:
        return ModelArguments(pretrained="embedded", device=name).torch_device(process)

    assert device("cpu") == device("cpu", 1) == torch.device("cpu")
    for name in ("gpu", "cpu:0", "cuda:x", ""):
        with pytest.raises(ValueError, match=rf"device is '{name}'; it is one of auto, cpu, cuda, mps, or cuda:0"):
            device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device("auto") == device("cuda") == torch.device("cuda")
    assert device("cuda:1") == torch.device("cuda", 1)
    assert device("auto", 1) == device("cuda:0", 1) == torch.device("cuda", 1)  # each process its own
    with pytest.raises(ValueError, match="device cuda:2 was asked for, but there are 2"):
        device("cuda", 2)
