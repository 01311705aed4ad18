"""`arbitrage models`: which packs there are, their files fetched, and whether they are right."""

from __future__ import annotations

from rich.table import Table

from services.cli.console import Terminal
from services.cli.failures import FAILED, BadInput
from services.engines.pack_manifest import CorruptPack, load_pack
from services.engines.packs import find_pack, pack_folders, search_path, verify_pack

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
        is_there = all((pack.files_folder / file.path).exists() for file in pack.files)
        absent = (
            f"(arbitrage models pull {pack.name})" if pack.is_fetched else "(files are missing)"
        )
        where = str(pack.files_folder) if is_there else absent
        table.add_row(pack.name, "", "", size, pack.licence, where)
        for role, model in pack.models.items():
            inside = sum(file.size_bytes for file in pack.files_of(model))
            shown = model.hub or f"{inside / _MEBIBYTE:.1f} MiB"
            table.add_row("", role, model.kind, shown, "", "")
    if table.row_count:
        terminal.show(table)
    else:
        terminal.note(f"No packs in {', '.join(str(folder) for folder in search_path())}.")
    return exit_code


def pull_models(name_or_path: str, mirror: str, terminal: Terminal) -> int:
    """Fetches what of a pack is not there yet, from the first source that has it.

    Raises:
        UnknownPack, CorruptPack, PullFailed
        BadInput: the pack came with its files.
    """
    # Here, because it takes the hub's client, which the other commands do without.
    from services.engines.pack_pull import pull_pack

    pack = find_pack(name_or_path)
    if not pack.is_fetched and not any(model.hub for model in pack.models.values()):
        raise BadInput(
            f"pack {pack.name!r} came with its files, in {pack.files_folder}; nothing is fetched "
            f"for it, see arbitrage models verify {name_or_path}"
        )
    with terminal.progress(f"Pulling {pack.name} (MiB)", pack.size_bytes, _MEBIBYTE) as advance:
        pull_pack(pack, advance, mirror)
    terminal.show(f"{pack.name}: ready; licence {pack.licence}")
    return 0


def verify_models(name_or_path: str, terminal: Terminal) -> int:
    """Compares every file of a pack with its manifest and names those that differ.

    A model of the hub has no checksums in the manifest; it only must lie on this machine.

    Raises:
        UnknownPack, CorruptPack
    """
    pack = find_pack(name_or_path)
    if pack.is_fetched and not any((pack.files_folder / f.path).exists() for f in pack.files):
        terminal.error(
            f"pack {pack.name!r} is not here; fetch it: arbitrage models pull {name_or_path}"
        )
        return FAILED
    with terminal.progress(f"Verifying {pack.name} (MiB)", pack.size_bytes, _MEBIBYTE) as advance:
        damages = verify_pack(pack, advance)
    if damages:
        terminal.error(
            f"pack {pack.name!r} in {pack.files_folder} is damaged in {len(damages)} places",
            tuple(str(damage) for damage in damages),
        )
        return FAILED
    if pack.files:
        size = f"{pack.size_bytes / _MEBIBYTE:.1f} MiB"
        terminal.show(f"{pack.name}: {len(pack.files)} files, {size}, all as they should be")
    of_hub = {role: model for role, model in pack.models.items() if model.hub}
    # The hub's client is slow to load, and most packs have no need of it.
    if not of_hub:
        return 0
    from services.engines.pack_pull import hub_folder

    folders = {role: hub_folder(model) for role, model in of_hub.items()}
    absent = tuple(f"{role}: {of_hub[role].hub}" for role, found in folders.items() if not found)
    if absent:
        terminal.error(
            f"models of pack {pack.name!r} were not fetched from the hub; fetch them: "
            f"arbitrage models pull {name_or_path}",
            absent,
        )
        return FAILED
    for role, folder in folders.items():
        terminal.note(f"{role}: {of_hub[role].hub} lies in {folder}, which nothing here pins")
    return 0
