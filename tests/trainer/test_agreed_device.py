"""Which device each rank takes, on machines with GPUs that are only said to be there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvdllm import device
from hvdllm.config import compose
from hvdllm.errors import UserError
from hvdllm.trainer.agree import agreed_device, wrong_gpus
from hvdllm.world import virtual


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """So many GPUs, as this process sees them; and which one it took."""
    taken: list[int] = []

    def there(count: int, names: tuple[str, ...] = ("a", "b", "c", "d")) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        properties = lambda device: SimpleNamespace(uuid=names[torch.device(device).index])  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        return taken

    return there


def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees(gpus: Any) -> None:
    taken = gpus(4)
    assert device.choose("auto", 3) == torch.device("cuda", 3)
    gpus(1)  # srun --gpus-per-task=1, or a slice of MIG
    assert device.choose("cuda", 3) == torch.device("cuda", 0)
    assert taken == [3, 0]
    gpus(2)
    with pytest.raises(UserError, match="2 GPUs here, too few for local rank 2: start at most one rank a GPU"):
        device.choose("cuda", 2)
    assert device.choose("cuda", 3, share=True) == torch.device("cuda", 1)


def test_without_nccl_cuda_is_refused_and_auto_takes_the_cpu(gpus: Any) -> None:
    gpus(2)
    why = "this Horovod was built without NCCL"
    with pytest.raises(UserError, match=f"device=cuda: {why}; see `hvdllm doctor`, or take device=cpu"):
        device.choose("cuda", 0, no_cuda=why)
    assert device.choose("auto", 0, no_cuda=why) == torch.device("cpu")


def on_ranks(words: list[str], no_cuda: str = "") -> tuple[list[Any], list[str]]:
    """What each of two ranks of a host takes, or hears; and what is said."""
    config, said = compose.compose(words), list[str]()

    def live(world: Any) -> Any:
        world.no_cuda = no_cuda
        try:
            return str(agreed_device(config, world, said.append))
        except UserError as error:
            return error

    return virtual.run(2, live), said


def test_auto_says_why_it_takes_the_cpu(gpus: Any) -> None:
    gpus(2)
    taken, said = on_ranks(["device=auto"], "this Horovod was built without NCCL")
    assert taken == ["cpu", "cpu"]
    assert set(said) == {"this Horovod was built without NCCL, so this run computes on the CPU"}


def test_two_ranks_on_one_gpu_are_refused_by_its_number_or_allowed(gpus: Any) -> None:
    gpus(2, ("GPU-1", "GPU-1"))
    (first, second), _ = on_ranks(["device=cuda"])
    assert str(first) == str(second)
    assert "ranks 0 and 1 compute on one GPU (GPU-1)" in str(first) and "device.share=true" in str(first)
    assert on_ranks(["device=cuda", "device.share=true"])[0] == ["cuda:0", "cuda:1"]
    gpus(2)
    assert on_ranks(["device=cuda"])[0] == ["cuda:0", "cuda:1"]


def test_slices_of_one_gpu_are_different(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
    assert device.gpu(torch.device("cuda", 0)) == "a MIG-7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert device.gpu(torch.device("cuda", 0)) == "a"
    assert device.gpu(torch.device("cpu")) == ""


def test_all_ranks_have_a_gpu_or_none_has() -> None:
    assert wrong_gpus(["", ""], False) is None
    assert wrong_gpus(["a", "b"], False) is None
    assert "rank 1 has no GPU and rank 0 has one" in str(wrong_gpus(["a", "", "b"], True))
