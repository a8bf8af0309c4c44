"""docs/format.md against core/layout.h: every row's offset and size, as the compiler sees them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (\d+) \| (\d+) \| `([\w.\[\]]+)` \|", re.MULTILINE)


def test_the_format_page_says_what_the_header_file_does(tmp_path: Path) -> None:
    rows = ROW.findall((ROOT / "docs/format.md").read_text())
    assert len(rows) > 25
    lines = []
    for _, _, field in rows:
        struct, member = field.split(".", 1) if field.startswith("shmq_") else ("shmq_segment", field)
        place = f"((struct {struct} *)0)->{member}"
        lines.append(f'printf("%zu %zu {field}\\n", (size_t)&{place}, sizeof {place});')
    source = tmp_path / "offsets.c"
    source.write_text(
        '#include <stdio.h>\n#include "layout.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = tmp_path / "offsets"
    subprocess.run(["gcc", "-std=gnu11", "-I", ROOT / "core", source, "-o", program], check=True, timeout=60)
    found = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    assert found.split("\n")[:-1] == [" ".join(row) for row in rows]


def test_the_constants_of_the_format_page_hold() -> None:
    layout = (ROOT / "core/layout.h").read_text()
    page = (ROOT / "docs/format.md").read_text()
    for name, text in [
        ("SHMQ_FORMAT", r"Format (\d+)\."),
        ("SHMQ_SLOTS", r"attachment table, (\d+) slots"),
        ("SHMQ_R_ENTRIES", r"R, (\d+) entries"),
        ("SHMQ_H_ENTRIES", r"H, (\d+) entries"),
    ]:
        (there,) = re.findall(rf"#define {name} (\d+)", layout)
        assert re.search(text, page)[1] == there, name  # type: ignore[index]
