"""The machine that a figure was measured on: what it is, and its state at a moment."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, TypeVar

import torch

from .. import __version__
from ..device import nvml
from ..utils.packages import missing

T = TypeVar("T")

PACKAGES = ("bitsandbytes", "comfy-kitchen", "transformers", "triton", "triton-windows")
REASON = "nvmlClocksEventReason"
NO_REASON = ("All", "None", "GpuIdle")  # a card that has just finished is idle


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change during a run. `fingerprint` stands for all of it except Vortex's own version."""

    device: str
    driver: str | None
    torch: str
    cuda: str | None
    allocator: str | None  # torch's, on CUDA: native or cudaMallocAsync
    python: str
    packages: dict[str, str]
    threads: int
    vortex: str

    @property
    def fingerprint(self) -> str:
        """Equal on machines whose figures can be compared."""
        facts = asdict(self)
        del facts["vortex"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"fingerprint": self.fingerprint}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a report for others says besides `Machine`. Sizes in bytes; None where nothing tells."""

    capability: str | None
    vram: int | None
    system: str
    processor: str
    cores: int | None
    memory: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """Clocks in MHz, temperature in °C, power in W, why clocks are held down; None where the device does not tell.

    `load` is the host's: processes that run or wait, the mean of the last minute.
    """

    clock: int | None
    memory_clock: int | None
    temperature: int | None
    power: float | None
    throttled: tuple[str, ...] | None
    load: float | None

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Clock, temperature, what holds clocks down, and load, to be read."""
        return (
            "unknown" if self.clock is None else f"{self.clock} MHz",
            "unknown" if self.temperature is None else f"{self.temperature} °C",
            "unknown" if self.throttled is None else ", ".join(self.throttled) or "nothing",
            "unknown" if self.load is None else f"{self.load:.1f}",
        )


def machine(device: torch.device) -> Machine:
    """This machine, as it runs pictures on `device`."""
    packages = {}
    for package in PACKAGES:
        with suppress(Exception):  # not installed, or half of it
            packages[package] = metadata.version(package)
    cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else f"CPU {_processor()}",
        driver=_driver() if cuda else None,
        torch=torch.__version__,
        cuda=torch.version.cuda if cuda else None,
        allocator=torch.cuda.get_allocator_backend() if cuda else None,
        python=platform.python_version(),
        packages=packages,
        threads=torch.get_num_threads(),
        vortex=__version__,
    )


def hardware(device: torch.device) -> Hardware:
    """The card, the system and the host."""
    cuda = device.type == "cuda"
    return Hardware(
        capability="{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
        vram=torch.cuda.mem_get_info(device)[1] if cuda else None,
        system=f"{_system()}, {platform.release()}, {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count(),
        memory=_memory(),
    )


def gauge(device: torch.device) -> Callable[[], Reading]:
    """A function that takes a reading of the device and the host."""

    def read() -> Reading:
        card = nvml.ask_card(device, _card) if device.type == "cuda" else None
        return Reading(*[*(card or [None] * 5), _load()])

    return read


def _card(pynvml: Any, card: Any) -> list[Any]:
    """The first fields of a `Reading`, each None where this card, driver or module does not tell."""

    def tell(answer: Callable[[], T]) -> T | None:
        with suppress(Exception):
            return answer()
        return None

    def throttled() -> tuple[str, ...]:
        mask = int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(card))
        reasons = {name.removeprefix(REASON): getattr(pynvml, name) for name in dir(pynvml) if name.startswith(REASON)}
        return tuple(name for name, bit in reasons.items() if name not in NO_REASON and mask & bit)

    return [
        tell(lambda: int(pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM))),
        tell(lambda: int(pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM))),
        tell(lambda: int(pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU))),
        tell(lambda: float(pynvml.nvmlDeviceGetPowerUsage(card) / 1e3)),
        tell(throttled),
    ]


def _load() -> float | None:
    with suppress(AttributeError, OSError):  # Windows has none
        return os.getloadavg()[0]
    return None


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _driver() -> str | None:
    version = nvml.ask(lambda pynvml: pynvml.nvmlSystemGetDriverVersion())
    return version.decode() if isinstance(version, bytes) else version and str(version)


def _system() -> str:
    with suppress(Exception):  # not Linux, or one that does not say
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return platform.system()


def _memory() -> int | None:
    """Bytes of the host's memory."""
    if missing("psutil") is None:
        import psutil

        with suppress(Exception):
            return int(psutil.virtual_memory().total)
    with suppress(AttributeError, OSError, ValueError):  # Windows has none of it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
