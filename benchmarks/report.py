"""Results as tables: `python -m benchmarks.report [FOLDER]` writes <machine>/<bench>.md beside every .jsonl.

`python -m benchmarks.report FOLDER --into docs/ops/nce.md` rewrites the parts of a page that stand between
`<!-- results MACHINE/BENCH -->` and `<!-- end of results -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.results import Row, case_of, read

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS: dict[str, Callable[[Row, Row | None], str]] = {
    "shape": lambda row, _: row["shape"],
    "dtype": lambda row, _: row["dtype"],
    "pass": lambda row, _: row["pass"],
    "provider": lambda row, _: row["provider"],
    "median (p20-p80)": lambda row, _: _duration(row),
    "x baseline": lambda row, base: f"{base['seconds'] / row['seconds']:.2f}" if base and "seconds" in row else "",
    "GB/s": lambda row, _: _rate(row, "bytes", 1e9),
    "TFLOP/s": lambda row, _: _rate(row, "flops", 1e12),
    "% of roofline": lambda row, _: f"{100 * row['roofline']:.1f}" if row.get("roofline") else "",
    "peak extra MiB": lambda row, _: f"{row['peak_extra_bytes'] / 2**20:.1f}" if _has(row, "peak_extra_bytes") else "",
}
LEFT = {"shape", "dtype", "pass", "provider", "result"}  # columns of words; numbers stand on the right


def page(rows: list[Row]) -> str:
    """All rows as Markdown: a section per stamp, in it a table per op and device."""
    sections = []
    for stamp, same in _grouped(rows, lambda row: row["stamp"]):
        sections.append(_stamp_text(stamp, same))
        for (op, device), table in _grouped(same, lambda row: (row["op"], row["device"])):
            sections += [f"### {op} on {device}", _legend(table), table_of(table)]
            sections += [
                f"{row['shape']} {row['dtype']} {row['pass']}, {row['provider']} failed: {row['error']}"
                for row in table
                if row.get("error")
            ]
    return "\n\n".join(filter(None, sections)) + "\n"


def table_of(rows: list[Row]) -> str:
    """One aligned table; a cell that was not measured is empty, a column without any cell is left out."""
    extra = {name: None for row in rows for name in row.get("metrics", {})}
    lines = []
    for _, case in _grouped(rows, case_of):
        base = next((row for row in case if row["provider"] == row["baseline"] and "seconds" in row), None)
        for row in case:
            cells = [column(row, base) for column in COLUMNS.values()]
            metrics = row.get("metrics", {})
            lines.append(cells + [_number(metrics[name]) if _has(metrics, name) else "" for name in extra])
    titles = [*COLUMNS, *extra]
    used = [i for i in range(len(titles)) if any(line[i] for line in lines)]
    return aligned([titles[i] for i in used], [[line[i] for i in used] for line in lines])


def aligned(titles: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose source is as readable as the page."""
    widths = [max(map(len, column)) for column in zip(titles, *lines)]
    left = [title in LEFT for title in titles]

    def written(cells: list[str]) -> str:
        padded = (cell.ljust(w) if words else cell.rjust(w) for cell, w, words in zip(cells, widths, left))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if words else "-" * (w + 1) + ":" for w, words in zip(widths, left)) + "|"
    return "\n".join([written(titles), rule, *map(written, lines)])


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows of equal key together, in the order in which the keys first come."""
    order: list[Any] = []
    for row in rows:
        if key(row) not in order:
            order.append(key(row))
    return [(k, list(same)) for k, same in groupby(sorted(rows, key=lambda r: order.index(key(r))), key)]


def _stamp_text(stamp: dict[str, Any], rows: list[Row]) -> str:
    """One list: the machine, its versions, the sources, and the ceilings that were measured on it."""
    commit = (stamp.get("commit") or "unknown") + (" with changes" if stamp.get("dirty") else "")
    versions = [f"{name} {stamp[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if stamp.get(name)]
    machine = stamp["machine"] if stamp["cpu"] in stamp["machine"] else f"{stamp['machine']}; {stamp['cpu']}"
    ceilings = {}
    for row in rows:
        found = row.get("ceilings", {})
        if "bytes_per_second" in found:
            ceilings[f"copy on {row['device']}"] = f"{found['bytes_per_second'] / 1e9:.4g} GB/s"
        if "flops_per_second" in found:
            ceilings[f"{row['dtype']} product on {row['device']}"] = f"{found['flops_per_second'] / 1e12:.4g} TFLOP/s"
    lines = [
        f"- machine: {machine}, {stamp['threads']} CPU threads",
        f"- versions: {', '.join(versions)}",
        f"- sources: commit {commit}, digest {stamp['sources']}, {stamp['date']}",
    ]
    if ceilings:
        lines.append("- ceilings: " + ", ".join(f"{name} {value}" for name, value in ceilings.items()))
    return "\n".join(lines)


def _legend(rows: list[Row]) -> str:
    """What the shapes' names stand for."""
    sizes = {row["shape"]: row["sizes"] for row in rows if row.get("sizes")}
    return "\n".join(
        f"- `{name}`: " + ", ".join(f"{key} {_plain(value)}" for key, value in fields.items())
        for name, fields in sizes.items()
    )


def _plain(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _has(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _duration(row: Row) -> str:
    """Three times in one unit, that of the median."""
    if "seconds" not in row:
        return "failed" if row.get("error") else ""
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e3), ("us", 1e6)) if row["seconds"] * s >= 1 or u == "us")
    median, low, high = (f"{row[name] * scale:#.4g}".rstrip(".") for name in ("seconds", "p20", "p80"))
    return f"{median} {unit} ({low}-{high})"


def _number(value: float) -> str:
    """Four digits, and never an exponent where the number is large."""
    return f"{value:.0f}" if value >= 1e4 else f"{value:.4g}"


def _rate(row: Row, what: str, unit: float) -> str:
    return _number(row[what] / row["seconds"] / unit) if row.get(what) and "seconds" in row else ""


def render(folder: Path) -> list[Path]:
    """Write the page of every result file under `folder`; returns the pages."""
    pages = []
    for path in sorted(folder.glob("*/*.jsonl")):
        rows = read(path)
        target = path.with_suffix(".md")
        target.write_text(f"# {path.stem} on {rows[0]['stamp']['machine']}\n\n{page(rows)}")
        pages.append(target)
    return pages


def fill(text: str, folder: Path) -> str:
    """`text` with every marked part replaced by the results it names."""
    pattern = r"(<!-- results (\S+) -->\n).*?(<!-- end of results -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{page(read(folder / f'{m[2]}.jsonl'))}{m[3]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="rewrite the marked parts of this page")
    given = parser.parse_args()
    if given.into:
        given.into.write_text(fill(given.into.read_text(), given.folder))
    for path in render(given.folder):
        print(path)


if __name__ == "__main__":
    main()
