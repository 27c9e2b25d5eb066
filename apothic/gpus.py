"""What is publicly known about GPUs, by the names that Ray gives them.

Ray names a GPU by its `accelerator type`, cut out of the name that the driver reports, so that one
name may stand for several cards: ``A100`` for 40 and 80 GB, ``H100`` for PCIe, SXM and NVL,
``RTX-6000`` for the Quadro and the Ada card. Such a name carries the smallest figure of its cards;
what a node's own label says about its memory picks the card.

Sources of the figures, per GPU as the driver counts them (half a K80, a quarter of an A16, one die
of an MI250): NVIDIA's datasheets and product pages of each card (data centre:
https://www.nvidia.com/en-us/data-center/, workstations: …/design-visualization/, GeForce:
https://www.nvidia.com/en-us/geforce/graphics-cards/), the A10G datasheet for AWS G5, AMD's product pages
(https://www.amd.com/en/products/accelerators/instinct.html) and Intel's
(https://www.intel.com/content/www/us/en/products/details/discrete-gpus/data-center-gpu.html).
For B200 and B300 a GPU's share of HGX B200 (1.44 TB, 600 TFLOPS) and HGX B300 (600 TFLOPS, and eight
times the 270 GB that NVIDIA names it by in MLPerf, B300-SXM-270GB, which the datasheet cuts off to 2.1
TB), for GB200 and GB300 that of GB200 NVL72 (186 GB a GPU, 5760 TFLOPS) and GB300 NVL72 (279 GB a GPU,
5760 TFLOPS): as published for these systems, where sources differ a little. It is less than the 192 and
288 GB that the chips were announced with, and no more than what their drivers report (275040 MiB for a
B300).
TFLOPS are peak FP32 without tensor cores. Names: ``ray.util.accelerators`` and
``ray._private.accelerators`` of Ray 2.60.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "ANY_GPU",
    "GpuSpec",
    "largest_memory_gb",
    "nearest_gpus",
    "other_accelerator",
    "resolve_gpu",
    "same_gpu_name",
    "spec_of_node",
]

ANY_GPU = "any"
"""What stands for a GPU of whatever kind."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Public figures of one GPU.

    Attributes:
        name: Ray's accelerator type, or for a card that Ray does not tell apart, the name here.
        memory_gb: memory in units of 1000 MB; None where it shares the host's or is unknown.
        bandwidth_gb_s: memory bandwidth.
        fp32_tflops: peak FP32 rate without tensor cores.
        family: the wider name that nodes with this card may report; empty when there is none.
        told_by_memory: whether the memory alone tells this card from others of its family.
    """

    name: str
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    fp32_tflops: float | None = None
    family: str = ""
    told_by_memory: bool = True


# name, GB, GB/s, FP32 TFLOPS; further names. The first of a family comes first.
_Row = tuple[str, float | None, float | None, float | None, str]
_NVIDIA_DATA_CENTER: tuple[_Row, ...] = (
    ("K80", 12, 240, 4.37, ""),
    ("M60", 8, 160, 4.82, ""),
    ("P4", 8, 192, 5.5, ""),
    ("P40", 24, 346, 12, ""),
    ("P100", 12, 549, 9.3, ""),
    ("V100", 16, 900, 14, ""),
    ("T4", 16, 300, 8.1, ""),
    ("A2", 16, 200, 4.5, ""),
    ("A10", 24, 600, 31.2, ""),
    ("A10G", 24, 600, 35, ""),
    ("A16", 16, 200, 4.5, ""),
    ("A30", 24, 933, 10.3, ""),
    ("A40", 48, 696, 37.4, ""),
    ("A100", 40, 1555, 19.5, ""),
    ("A800", 40, 1555, 19.5, ""),
    ("L4", 24, 300, 30.3, ""),
    ("L20", 48, 864, 59.8, ""),
    ("L40", 48, 864, 90.5, ""),
    ("L40S", 48, 864, 91.6, ""),
    ("H20", 96, 4000, 44, ""),
    ("H100", 80, 2000, 51, ""),
    ("H800", 80, 2000, 51, ""),
    ("H200", 141, 4800, 60, ""),
    ("GH200", 96, 4000, 67, ""),
    ("B200", 180, 7700, 75, ""),
    ("B300", 270, 7700, 75, ""),
    ("GB200", 186, 8000, 80, ""),
    ("GB300", 279, 8000, 80, ""),
    ("RTX-PRO-6000", 96, 1597, 110, "PRO 6000|RTX 6000 Blackwell|RTX PRO 6000 Blackwell"),
)
_NVIDIA_WORKSTATION: tuple[_Row, ...] = (
    ("RTX-A2000", 6, 288, 8, "A2000"),
    ("RTX-A4000", 16, 448, 19.2, "A4000"),
    ("RTX-A4500", 20, 640, 23.7, "A4500"),
    ("RTX-A5000", 24, 768, 27.8, "A5000"),
    ("RTX-A6000", 48, 768, 38.7, "A6000"),
    ("RTX-4000", 8, 280, 7.1, ""),
    ("RTX-5000", 16, 448, 11.2, ""),
    ("RTX-6000", 24, 672, 16.3, ""),
    ("RTX-8000", 48, 672, 16.3, ""),
    ("TITAN-V", 12, 653, 14.9, ""),
    ("TITAN-RTX", 24, 672, 16.3, ""),
)
_NVIDIA_GEFORCE: tuple[_Row, ...] = (
    ("GeForce-GTX-1070", 8, 256, 6.5, "1070"),
    ("GeForce-GTX-1080", 8, 320, 8.9, "1080"),
    ("GeForce-GTX-1080-Ti", 11, 484, 11.3, "1080 Ti"),
    ("GeForce-RTX-2060", 6, 336, 6.5, "2060"),
    ("GeForce-RTX-2070", 8, 448, 7.5, "2070"),
    ("GeForce-RTX-2080", 8, 448, 10.1, "2080"),
    ("GeForce-RTX-2080-Ti", 11, 616, 13.4, "2080 Ti"),
    ("GeForce-RTX-3060", 8, 240, 12.7, "3060"),
    ("GeForce-RTX-3060-Ti", 8, 448, 16.2, "3060 Ti"),
    ("GeForce-RTX-3070", 8, 448, 20.3, "3070"),
    ("GeForce-RTX-3070-Ti", 8, 608, 21.7, "3070 Ti"),
    ("GeForce-RTX-3080", 10, 760, 29.8, "3080"),
    ("GeForce-RTX-3080-Ti", 12, 912, 34.1, "3080 Ti"),
    ("GeForce-RTX-3090", 24, 936, 35.6, "3090"),
    ("GeForce-RTX-3090-Ti", 24, 1008, 40, "3090 Ti"),
    ("GeForce-RTX-4060", 8, 272, 15.1, "4060"),
    ("GeForce-RTX-4060-Ti", 8, 288, 22.1, "4060 Ti"),
    ("GeForce-RTX-4070", 12, 504, 29.1, "4070"),
    ("GeForce-RTX-4070-SUPER", 12, 504, 35.5, "4070 SUPER|4070S|RTX 4070S"),
    ("GeForce-RTX-4070-Ti", 12, 504, 40.1, "4070 Ti"),
    ("GeForce-RTX-4070-Ti-SUPER", 16, 672, 44.1, "4070 Ti SUPER|4070S Ti|RTX 4070S Ti"),
    ("GeForce-RTX-4080", 16, 717, 48.7, "4080"),
    ("GeForce-RTX-4080-SUPER", 16, 736, 52.2, "4080 SUPER|4080S|RTX 4080S"),
    ("GeForce-RTX-4090", 24, 1008, 82.6, "4090"),
    ("GeForce-RTX-4090-D", 24, 1008, 73.5, "4090 D"),
    ("GeForce-RTX-5060-Ti", 8, 448, 23.7, "5060 Ti"),
    ("GeForce-RTX-5070", 12, 672, 30.9, "5070"),
    ("GeForce-RTX-5070-Ti", 16, 896, 43.9, "5070 Ti"),
    ("GeForce-RTX-5080", 16, 960, 56.3, "5080"),
    ("GeForce-RTX-5090", 32, 1792, 104.8, "5090"),
)
_AMD_INTEL_AND_OTHERS: tuple[_Row, ...] = (
    ("AMD-Instinct-MI50", 16, 1024, 13.3, ""),
    ("AMD-Instinct-MI100", 32, 1229, 23.1, ""),
    ("AMD-Instinct-MI210", 64, 1638, 22.6, ""),
    ("AMD-Instinct-MI250X-MI250", 64, 1638, 22.6, "MI250"),
    ("AMD-Instinct-MI250X", 64, 1638, 23.9, ""),
    ("AMD-Instinct-MI300A", 128, 5300, 122.6, ""),
    ("AMD-Instinct-MI300X-OAM", 192, 5300, 163.4, "MI300X"),
    ("AMD-Instinct-MI308X", 192, 5300, None, "AMD-Instinct-MI308X-OAM"),
    ("AMD-Instinct-MI325X-OAM", 256, 6000, 163.4, "MI325X"),
    ("AMD-Instinct-MI350X-OAM", 288, 8000, 144.2, "MI350X"),
    ("AMD-Instinct-MI355X-OAM", 288, 8000, 157.3, "MI355X"),
    ("AMD-Radeon-R9-200-HD-7900", None, None, None, "R9 200"),
    ("AMD-Radeon-HD-7900", None, None, None, "HD 7900"),
    ("Intel-GPU-Max-1100", 48, 1229, 22.2, "Max 1100|PVC 1100"),
    ("Intel-GPU-Max-1550", 128, 3277, 52.4, "Max 1550|PVC 1550"),
    ("MXC500", None, None, None, "MetaX C500|C500"),
    ("MXC550", None, None, None, "MetaX C550|C550"),
    *(
        (name, None, None, None, "")
        for name in (
            *("M1", "M1-Pro", "M1-Max", "M1-Ultra", "M2", "M2-Pro", "M2-Max", "M2-Ultra"),
            *("M3", "M3-Pro", "M3-Max", "Apple-Silicon"),
        )
    ),
)
# Cards that report the name of a family; their rows follow the same order after it.
_VARIANTS: tuple[tuple[str, str, float, float, float, str], ...] = (
    ("P100", "P100-16GB", 16, 732, 9.3, ""),
    ("V100", "V100-16GB", 16, 900, 14, ""),
    ("V100", "V100-32GB", 32, 900, 14, ""),
    ("A100", "A100-40G", 40, 1555, 19.5, "A100-40GB"),
    ("A100", "A100-80G", 80, 1935, 19.5, "A100-80GB"),
    ("A800", "A800-40GB", 40, 1555, 19.5, ""),
    ("A800", "A800-80GB", 80, 1935, 19.5, ""),
    ("H100", "H100-80GB", 80, 2000, 51, ""),
    ("H100", "H100-NVL", 94, 3900, 60, "H100-94GB"),
    ("H20", "H20-141GB", 141, 4000, 44, ""),
    ("GH200", "GH200-96GB", 96, 4000, 67, ""),
    ("GH200", "GH200-144GB", 144, 4900, 67, ""),
    ("RTX-A2000", "RTX-A2000-12GB", 12, 288, 8, ""),
    ("RTX-4000", "RTX-4000-Ada", 20, 280, 19.2, "RTX 4000 Ada Generation"),
    ("RTX-5000", "RTX-5000-Ada", 32, 576, 65.3, "RTX 5000 Ada Generation"),
    ("RTX-6000", "RTX-6000-Ada", 48, 960, 91.1, "RTX 6000 Ada Generation|6000 Ada|A6000 Ada"),
    ("GeForce-RTX-3060", "GeForce-RTX-3060-12GB", 12, 360, 12.7, "3060 12GB"),
    ("GeForce-RTX-3080", "GeForce-RTX-3080-12GB", 12, 912, 30.6, "3080 12GB"),
    ("GeForce-RTX-4060-Ti", "GeForce-RTX-4060-Ti-16GB", 16, 288, 22.1, "4060 Ti 16GB"),
    ("GeForce-RTX-5060-Ti", "GeForce-RTX-5060-Ti-16GB", 16, 448, 23.7, "5060 Ti 16GB"),
    ("AMD-Instinct-MI50", "AMD-Instinct-MI50-32GB", 32, 1024, 13.3, ""),
)
# What Ray counts under a resource of its own, so that no `num_gpus` ever reaches it.
_OTHER_ACCELERATORS: dict[str, str] = {
    "intelgaudi": "HPU",
    "gaudi": "HPU",
    "tpu": "TPU",
    "awsneuroncore": "neuron_cores",
    "trainium": "neuron_cores",
    "inferentia": "neuron_cores",
    "ascend910b": "NPU",
    "ascend910b4": "NPU",
    "furiosarngd": "FURIOSA",
    "mobilintaries": "MBLT",
    "mobilintregulus": "MBLT",
}

_BRANDS = re.compile(r"^(?:nvidia|amd|tesla|geforce|quadro|instinct)+")
# A memory label states what the driver leaves to programs: up to 5 % below the card's nominal size.
_MEMORY_SLACK = 1.05


def _key(name: str) -> str:
    """Reduce a name to what tells GPUs apart: ``NVIDIA A100 80 GB`` and ``a100-80g`` are one."""
    text = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"(?<=\d)gb$", "g", _BRANDS.sub("", text) or text)


def _build() -> tuple[dict[str, GpuSpec], dict[str, GpuSpec], dict[str, list[GpuSpec]]]:
    by_name: dict[str, GpuSpec] = {}
    by_key: dict[str, GpuSpec] = {}
    variants: dict[str, list[GpuSpec]] = {}

    def add(spec: GpuSpec, more: str) -> None:
        by_name[spec.name] = spec
        for name in (spec.name, *filter(None, more.split("|"))):
            by_key.setdefault(_key(name), spec)
        if spec.family:
            variants.setdefault(spec.family, []).append(spec)

    for name, memory_gb, bandwidth, tflops, more in (
        *_NVIDIA_DATA_CENTER,
        *_NVIDIA_WORKSTATION,
        *_NVIDIA_GEFORCE,
        *_AMD_INTEL_AND_OTHERS,
    ):
        add(GpuSpec(name, memory_gb, bandwidth, tflops), more)
    for family, name, memory_gb, bandwidth, tflops, more in _VARIANTS:
        add(GpuSpec(name, memory_gb, bandwidth, tflops, family), more)
    # The same figures as the OAM card, so memory cannot tell it: only Ray's name for it does.
    add(GpuSpec("AMD-Instinct-MI300X-HF", 192, 5300, 163.4, "AMD-Instinct-MI300X-OAM", False), "")
    return by_name, by_key, variants


_BY_NAME, _BY_KEY, _VARIANTS_OF = _build()


def resolve_gpu(name: str) -> GpuSpec | None:
    """Find the GPU that a name means, in any case, with or without its brand; None if unknown."""
    return _BY_NAME.get(name) or _BY_KEY.get(_key(name))


def same_gpu_name(one: str, other: str) -> bool:
    """Tell whether two names mean the same GPU, also when this table does not know it."""
    first, second = resolve_gpu(one), resolve_gpu(other)
    if first is None or second is None:
        return _key(one) == _key(other)
    return first.name == second.name


def nearest_gpus(name: str, limit: int = 3) -> list[str]:
    """Give the known names that look most like ``name``, best first."""
    keys = difflib.get_close_matches(_key(name), _BY_KEY, n=2 * limit, cutoff=0.5)
    return list(dict.fromkeys(_BY_KEY[key].name for key in keys))[:limit]


def other_accelerator(name: str) -> str | None:
    """Give the Ray resource of an accelerator that is no GPU to Ray, such as ``TPU``."""
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    return _OTHER_ACCELERATORS.get("tpu" if re.fullmatch(r"tpu(?:v\d.*)?", key) else key)


def largest_memory_gb(spec: GpuSpec) -> float | None:
    """Give the most memory that a card under this name has; None where none is known."""
    sizes = [each.memory_gb for each in (spec, *_VARIANTS_OF.get(spec.name, ()))]
    return max((size for size in sizes if size is not None), default=None)


def spec_of_node(accelerator_types: Iterable[str], memory_gb: float | None) -> GpuSpec | None:
    """Pick the card of a node from what it reports.

    Args:
        accelerator_types: the names under which Ray knows its GPUs.
        memory_gb: memory per GPU as its label says, None where it has none.

    Returns:
        The named card; for the name of a family the largest that the memory allows, and the family
        itself, with its smallest figures, when the memory is not stated. None if nothing is known.
    """
    specs = [spec for name in accelerator_types if (spec := resolve_gpu(name)) is not None]
    if not specs:
        return None
    best = next((spec for spec in specs if spec.family), specs[0])
    if best.family or memory_gb is None:
        return best
    for variant in _VARIANTS_OF.get(best.name, ()):
        size, known = variant.memory_gb or 0.0, best.memory_gb or 0.0
        if variant.told_by_memory and known < size <= memory_gb * _MEMORY_SLACK:
            best = variant
    return best
