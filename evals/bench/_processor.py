"""The name of this machine's processor, with its generation where virtual machines hide the model."""

from __future__ import annotations

import platform
from pathlib import Path

# AMD's family and models -> generation; the name of a rented machine is often no more than "AMD EPYC"
_ZEN = (
    (23, range(0x30), "Zen"),
    (23, range(0x30, 0x100), "Zen 2"),
    (25, range(0x10), "Zen 3"),
    (25, range(0x10, 0x20), "Zen 4"),
    (25, range(0x20, 0x60), "Zen 3"),
    (25, range(0x60, 0x80), "Zen 4"),
    (25, range(0xA0, 0xB0), "Zen 4"),
    (26, range(0x100), "Zen 5"),
)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """For example "AMD EPYC (Zen 4, family 25 model 17, AVX-512)"; what Python knows where there is no `cpuinfo`."""
    try:
        first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name, flags = facts.get("model name", platform.machine()), facts.get("flags", "").split()
    if not facts.get("cpu family", "").isdecimal() or not facts.get("model", "").isdecimal():
        return name
    family, model = int(facts["cpu family"]), int(facts["model"])
    amd = facts.get("vendor_id") == "AuthenticAMD"
    zen = [title for known, models, title in _ZEN if amd and family == known and model in models]
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{name} ({', '.join([*zen, f'family {family} model {model}', vectors])})"
