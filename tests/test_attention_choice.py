"""Which attention backend is chosen for ordinary passes, on machines of every kind, and what is said of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import tiny_model
from steps import CONFIG

import sap_fast
from sap_fast import SAPConfig
from sap_fast.cli.main import main
from sap_fast.model.attention_backends import Heads, choose, machine_of
from sap_fast.model.attention_backends.choice import BACKENDS, Backend, Machine

CPU = torch.device("cpu")
HEADS = Heads(torch.bfloat16, 128)
A100 = Machine("cuda", (8, 0))
SWITCHED_ON = replace(A100, deterministic=True)
NO_FLASH = {"flash_attn": "not there"}
NEITHER: dict[Backend, str] = {"flash_attn": "not there", "varlen_attn": "too old"}
CHOICES: dict[str, tuple[Machine, Heads, Backend]] = {
    "flash-attn first": (A100, HEADS, "flash_attn"),
    "also where varlen_attn could": (SWITCHED_ON, HEADS, "flash_attn"),
    "varlen_attn only under the switch": (replace(SWITCHED_ON, unusable=NO_FLASH), HEADS, "varlen_attn"),
    "else the library's": (replace(A100, unusable=NO_FLASH), HEADS, "own"),
    "also where neither is usable": (replace(SWITCHED_ON, unusable=NEITHER), HEADS, "own"),
    "a GPU before sm_80": (Machine("cuda", (7, 5)), HEADS, "own"),
    "another maker's GPU": (Machine("cuda", None, deterministic=True), HEADS, "own"),
    "no kernel of the library's": (replace(SWITCHED_ON, unusable=NEITHER, own_kernel=False), HEADS, "sdpa"),
    "and no switch": (replace(A100, unusable=NEITHER, own_kernel=False), HEADS, "own"),
    "float32 on a GPU": (SWITCHED_ON, Heads(torch.float32, 128), "own"),
    "float64 on a GPU": (SWITCHED_ON, Heads(torch.float64, 128), "own"),
    "head_dim past 256": (A100, Heads(torch.bfloat16, 264), "own"),
    "head_dim not of 8": (A100, Heads(torch.bfloat16, 84), "own"),
    "head_dim 256": (A100, Heads(torch.bfloat16, 256), "flash_attn"),
    "a CPU": (Machine("cpu"), HEADS, "own"),
    "a CPU without kernels": (Machine("cpu", own_kernel=False), HEADS, "sdpa"),
    "that in float32": (Machine("cpu", own_kernel=False), Heads(torch.float32, 128), "own"),
    "another device": (Machine("mps", own_kernel=False), HEADS, "own"),
}


@pytest.mark.parametrize(("machine", "heads", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_auto_takes_the_first_that_can(machine: Machine, heads: Heads, expected: Backend) -> None:
    choice = choose("auto", machine, heads)
    assert choice.backend == expected
    # It says why of all the others.
    assert choice.because and choice.others.keys() == set(BACKENDS) - {expected}
    assert all(choice.others.values())


REFUSED: dict[str, tuple[Backend, Machine, Heads, str]] = {
    "on a CPU": ("flash_attn", Machine("cpu"), HEADS, "it serves CUDA devices, not cpu"),
    "not installed": ("flash_attn", replace(A100, unusable=NO_FLASH), HEADS, "bfloat16, head_dim 128.*: not there"),
    "an old GPU": ("flash_attn", Machine("cuda", (7, 5)), HEADS, "capability 8.0 or more, and this one has 7.5"),
    "another maker's": ("varlen_attn", Machine("cuda"), HEADS, "NVIDIA's devices only"),
    "float32": ("flash_attn", A100, Heads(torch.float32, 64), "in bfloat16 or float16, not in float32"),
    "head_dim": ("varlen_attn", SWITCHED_ON, Heads(torch.bfloat16, 84), "multiple of 8 up to 256, and this one is 84"),
    "not the same bits": ("varlen_attn", A100, HEADS, r"change from run to run; torch.use_deterministic_algorithms"),
    "nor those of sdpa": ("sdpa", A100, HEADS, r"change from run to run; torch.use_deterministic_algorithms"),
    "an untried device": ("sdpa", Machine("mps", own_kernel=False), HEADS, "not on mps"),
}


@pytest.mark.parametrize(("wanted", "machine", "heads", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_serve_is_refused(wanted: Backend, machine: Machine, heads: Heads, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        choose(wanted, machine, heads)
    said = str(refused.value)
    assert said.startswith(f"attention='{wanted}' cannot serve here") and "attention='auto'" in said


@pytest.mark.parametrize("wanted", BACKENDS)
def test_what_can_serve_is_not_refused(wanted: Backend) -> None:
    assert choose(wanted, SWITCHED_ON, HEADS).backend == wanted


def test_the_switch_counts_only_without_warn_only(poisoned_memory: None) -> None:
    assert machine_of(CPU, HEADS).deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not machine_of(CPU, HEADS).deterministic


def test_attach_refuses_before_anything_changes() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"attention='flash_attn' cannot serve here \(cpu, float64, head_dim 8\)"):
        sap_fast.attach(model, CONFIG.replace(attention="flash_attn"))
    sap_fast.attach(model, CONFIG).detach()  # it was not marked as attached
    with pytest.raises(ValueError, match=r"attention must be one of \['auto', 'own', .*\], but is 'fast'"):
        SAPConfig(attention="fast")  # type: ignore[arg-type]


def test_info_says_what_serves_and_why(capsys: Any) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    choice = choose("auto", machine_of(CPU, HEADS), HEADS)
    assert "dual passes, everywhere: own" in said
    assert f"ordinary passes, cpu, bfloat16, head_dim 128: {choice.backend}, {choice.because}\n" in said
    for name, why in choice.others.items():
        assert f"not {name}: {why}\n" in said
    assert "ordinary passes, float32 and float64: own\n" in said
