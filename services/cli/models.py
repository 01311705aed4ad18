"""`arbitrage models`: which packs there are, and whether their files are what they should be."""

from __future__ import annotations

from rich.table import Table

from services.cli.console import Terminal
from services.cli.failures import FAILED
from services.engines.packs import (
    CorruptPack,
    find_pack,
    load_pack,
    pack_folders,
    search_path,
    verify_pack,
)

_MEBIBYTE = 1 << 20


def list_models(terminal: Terminal) -> int:
    """Shows every pack on the search path; one with a broken manifest is named with the reason."""
    table = Table(box=None, pad_edge=False)
    for heading in ("pack", "model", "kind", "size", "licence", "folder"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    exit_code = 0
    for folder in pack_folders(search_path()):
        try:
            pack = load_pack(folder)
        except CorruptPack as error:
            terminal.error(str(error))
            exit_code = FAILED
            continue
        size = f"{pack.size_bytes / _MEBIBYTE:.1f} MiB"
        table.add_row(pack.name, "", "", size, pack.licence, str(pack.folder))
        for role, model in pack.models.items():
            inside = sum(
                file.size_bytes for file in pack.files if file.path.startswith(f"{model.path}/")
            )
            table.add_row("", role, model.kind, f"{inside / _MEBIBYTE:.1f} MiB", "", "")
    if table.row_count:
        terminal.show(table)
    else:
        terminal.note(f"No packs in {', '.join(str(folder) for folder in search_path())}.")
    return exit_code


def verify_models(name_or_path: str, terminal: Terminal) -> int:
    """Compares every file of a pack with its manifest and names those that differ.

    Raises:
        UnknownPack, CorruptPack
    """
    pack = find_pack(name_or_path)
    with terminal.progress(f"Verifying {pack.name} (MiB)", pack.size_bytes, _MEBIBYTE) as advance:
        damages = verify_pack(pack, advance)
    if damages:
        terminal.error(
            f"pack {pack.name!r} in {pack.folder} is damaged in {len(damages)} places",
            tuple(str(damage) for damage in damages),
        )
        return FAILED
    size = pack.size_bytes / _MEBIBYTE
    terminal.show(f"{pack.name}: {len(pack.files)} files, {size:.1f} MiB, all as they should be")
    return 0
