from pathlib import Path


def write_report(raw: Path, folder: Path) -> Path:
    return folder / "benchmarks.md"
