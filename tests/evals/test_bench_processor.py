"""The processor's name in benchmark results."""

from pathlib import Path

import pytest

from evals.bench._processor import processor_name


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "expected"),
    [
        ("AuthenticAMD", 25, 17, "fma avx2 avx512f", "AMD EPYC (Zen 4, family 25 model 17, AVX-512)"),
        ("AuthenticAMD", 25, 0xA0, "avx2 avx512f", "AMD EPYC (Zen 4, family 25 model 160, AVX-512)"),
        ("AuthenticAMD", 25, 1, "avx2", "AMD EPYC (Zen 3, family 25 model 1, AVX2)"),
        ("AuthenticAMD", 26, 2, "avx2 avx512f", "AMD EPYC (Zen 5, family 26 model 2, AVX-512)"),
        ("AuthenticAMD", 99, 1, "avx2", "AMD EPYC (family 99 model 1, AVX2)"),
        ("GenuineIntel", 6, 143, "avx2 avx512f", "AMD EPYC (family 6 model 143, AVX-512)"),
    ],
)
def test_names(tmp_path: Path, vendor: str, family: int, model: int, flags: str, expected: str) -> None:
    core = (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n"
    )
    core += f"flags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(f"{core}\n{core}\n", encoding="utf-8")
    assert processor_name(tmp_path / "cpuinfo") == expected


def test_other_systems(tmp_path: Path) -> None:
    assert processor_name(tmp_path / "missing")
    (tmp_path / "arm").write_text("processor : 0\nBogoMIPS : 50\n\n", encoding="utf-8")
    assert processor_name(tmp_path / "arm")
