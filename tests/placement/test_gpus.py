from __future__ import annotations

import pytest

from apothic.gpus import (
    largest_memory_gb,
    nearest_gpus,
    other_accelerator,
    resolve_gpu,
    same_gpu_name,
    spec_of_node,
)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("A100", "A100"),
        ("a100", "A100"),
        ("NVIDIA A100", "A100"),
        ("A100-80GB", "A100-80G"),
        ("a100 80g", "A100-80G"),
        ("A100-40GB", "A100-40G"),
        ("h100", "H100"),
        ("H100 NVL", "H100-NVL"),
        ("a10g", "A10G"),
        ("Tesla T4", "T4"),
        ("v100-32gb", "V100-32GB"),
        ("rtx4090", "GeForce-RTX-4090"),
        ("4090", "GeForce-RTX-4090"),
        ("RTX 3090 Ti", "GeForce-RTX-3090-Ti"),
        ("NVIDIA GeForce RTX 4070S Ti", "GeForce-RTX-4070-Ti-SUPER"),
        ("RTX A6000", "RTX-A6000"),
        ("Quadro RTX 6000", "RTX-6000"),
        ("RTX 6000Ada", "RTX-6000-Ada"),
        ("rtx pro 6000", "RTX-PRO-6000"),
        ("MI300X", "AMD-Instinct-MI300X-OAM"),
        ("AMD-Instinct-MI300X-HF", "AMD-Instinct-MI300X-HF"),
        ("mi250", "AMD-Instinct-MI250X-MI250"),
        ("max 1550", "Intel-GPU-Max-1550"),
    ],
)
def test_names_resolve_in_every_spelling(written: str, name: str):
    spec = resolve_gpu(written)
    assert spec is not None
    assert spec.name == name


def test_every_gpu_name_of_ray_is_known():
    accelerators = pytest.importorskip("ray.util.accelerators.accelerators")
    names = {
        value
        for key, value in vars(accelerators).items()
        if key[0].isupper() and isinstance(value, str)
    }
    assert names
    unknown = {
        name for name in names if resolve_gpu(name) is None and other_accelerator(name) is None
    }
    assert not unknown


@pytest.mark.parametrize("name", ["", "  ", "gpu", "H-1000", "A100-SXM9", "TPU-V4"])
def test_unknown_names_are_unknown(name: str):
    assert resolve_gpu(name) is None


def test_nearest_names_are_known_names():
    assert "H100" in nearest_gpus("H1000")
    assert "GeForce-RTX-4090" in nearest_gpus("rtx4900")
    assert nearest_gpus("zzzzzzzz") == []


def test_accelerators_that_ray_counts_otherwise():
    assert other_accelerator("Intel-GAUDI") == "HPU"
    assert other_accelerator("TPU-V5P") == "TPU"
    assert other_accelerator("A100") is None


@pytest.mark.parametrize(
    ("types", "memory_gb", "card"),
    [
        (["A100"], None, "A100"),
        (["A100"], 40.0, "A100"),
        (["A100"], 80.0, "A100-80G"),
        (["A100"], 81.92, "A100-80G"),
        (["A100"], 79.2, "A100-80G"),
        (["A100", "A100-80G"], None, "A100-80G"),
        (["V100"], 32.0, "V100-32GB"),
        (["RTX-6000"], 49.14, "RTX-6000-Ada"),
        (["AMD-Instinct-MI300X-OAM"], 192.0, "AMD-Instinct-MI300X-OAM"),
        (["Unheard-Of"], 10.0, None),
        ([], None, None),
    ],
)
def test_a_label_on_memory_picks_the_card(types: list[str], memory_gb: float | None, card: object):
    spec = spec_of_node(types, memory_gb)
    assert (spec and spec.name) == card


def test_largest_memory_counts_the_whole_family():
    spec = resolve_gpu("A100")
    assert spec is not None
    assert spec.memory_gb == 40
    assert largest_memory_gb(spec) == 80


def test_unknown_names_compare_as_written():
    assert same_gpu_name("X-900", "x900")
    assert same_gpu_name("RTX 4090", "GeForce-RTX-4090")
    assert not same_gpu_name("X-900", "A100")


@pytest.mark.parametrize(
    ("name", "memory_gb", "bandwidth_gb_s", "fp32_tflops"),
    [
        # A GPU's share of HGX B200 and B300, and of GB200 NVL72 and GB300 NVL72, by their datasheets.
        ("B200", 180, 7700, 75),
        ("B300", 270, 7700, 75),
        ("GB200", 186, 8000, 80),
        ("GB300", 279, 8000, 80),
        ("H100", 80, 2000, 51),
        ("H200", 141, 4800, 60),
        # NVIDIA's datasheets of the card; of V100 and A100 80 GB that of the PCIe card, the slower one.
        ("T4", 16, 300, 8.1),
        ("V100", 16, 900, 14),
        ("A10G", 24, 600, 35),
        ("A100-80G", 80, 1935, 19.5),
        ("L4", 24, 300, 30.3),
        ("L40S", 48, 864, 91.6),
        ("GeForce-RTX-4090", 24, 1008, 82.6),
        ("GeForce-RTX-5090", 32, 1792, 104.8),
        # AMD's of the OAM module.
        ("AMD-Instinct-MI300X-OAM", 192, 5300, 163.4),
    ],
)
def test_figures_of_the_datasheets(
    name: str, memory_gb: float, bandwidth_gb_s: float, fp32_tflops: float
):
    spec = resolve_gpu(name)
    assert spec is not None
    assert (spec.memory_gb, spec.bandwidth_gb_s, spec.fp32_tflops) == (
        memory_gb,
        bandwidth_gb_s,
        fp32_tflops,
    )
