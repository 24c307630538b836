"""Record the five shipped workloads again: `python -m spepolicy.workload_recorder.shipped ROOT FOLDER`.

ROOT holds the unpacked arm64 packages of README.md; the files in FOLDER replace those of conf/workload. Inputs are made
here, from fixed seeds.
"""

from __future__ import annotations

import argparse
import random
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spepolicy.workload_recorder.__main__ import main as record

__all__ = ["SHIPPED", "main"]

_SQL = """\
create table customer(id integer primary key, name text, city text);
create table orders(id integer primary key, customer integer, amount real, note text);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 4000)
  insert into customer select i, 'name ' || (i * 7919 % 100003), 'city ' || (i * 31 % 97) from n;
with recursive n(i) as (select 1 union all select i + 1 from n where i < 40000)
  insert into orders select i, i * 104729 % 4000 + 1, (i * 17 % 1000) / 10.0, 'note ' || i from n;
create index by_customer on orders(customer);
create index by_city on customer(city);
select city, count(*), sum(amount) from customer join orders on customer = customer.id group by city order by 3 desc;
select name, max(amount) from customer join orders on customer = customer.id where city = 'city 42' group by name;
update orders set amount = amount * 1.1 where customer % 10 = 3;
select count(*) from orders where note like '%99%';
delete from orders where customer % 17 = 5;
select avg(amount), count(distinct customer) from orders;
"""

_LUA = """\
local function words(n)
  local out, seed = {}, 42
  for i = 1, n do
    seed = (seed * 1103515245 + 12345) % 2147483648
    out[i] = string.format("word%d", seed % 5000)
  end
  return out
end
local function count(list)
  local seen = {}
  for _, word in ipairs(list) do seen[word] = (seen[word] or 0) + 1 end
  local keys = {}
  for word in pairs(seen) do keys[#keys + 1] = word end
  table.sort(keys, function(a, b) return seen[a] > seen[b] or (seen[a] == seen[b] and a < b) end)
  return keys
end
local function queens(n, row, left, down, right)
  if row == n then return 1 end
  local total, free = 0, ((1 << n) - 1) & ~(left | down | right)
  while free ~= 0 do
    local bit = free & -free
    free = free ~ bit
    total = total + queens(n, row + 1, (left | bit) << 1, down | bit, (right | bit) >> 1)
  end
  return total
end
local function tree(depth)
  if depth == 0 then return {} end
  return {tree(depth - 1), tree(depth - 1)}
end
local function size(node) return node[1] and 1 + size(node[1]) + size(node[2]) or 1 end
print(#count(words(60000)), queens(8, 0, 0, 0, 0), size(tree(14)))
local text = {}
for i, word in ipairs(words(20000)) do text[i] = word:upper():gsub("O", "0") end
print(#table.concat(text, " "), select(2, table.concat(text, " "):gsub("W0RD1%d+", "")))
"""


_LIST = """\
local count, seed = 300000, 7
local function random(k)
  seed = seed * 6364136223846793005 + 1442695040888963407
  return (seed >> 33) % k + 1
end
local node = {}
for i = 1, count do node[i] = {value = i, next = false} end
for i = count, 2, -1 do
  local j = random(i)
  node[i], node[j] = node[j], node[i]
end
for i = 1, count do node[i].next = node[i % count + 1] end
local first, total = node[1], 0
node = nil
while true do
  local at = first
  repeat
    total = total + at.value
    at = at.next
  until at == first
end
"""


_NAMES = 2_000_000  # of which a node of 56 bytes and the name take some 190 MB: six times the system level cache
_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _pairs() -> Iterator[str]:
    """Yield lines of two names: each but the first comes after one of those before it, chosen at random."""
    draws = random.Random(7)
    names: list[str] = []
    for n in range(_NAMES):
        names.append("".join(draws.choices(_LETTERS, k=6)))
        if n:
            yield f"{names[draws.randrange(n)]} {names[n]}\n"


@dataclass(frozen=True)
class Shipped:
    """A workload that is shipped: what to run, and what to say of it."""

    name: str
    title: str
    package: str
    did: str
    command: tuple[str, ...]  # the program, below ROOT; {input} is the input file
    options: tuple[str, ...] = field(default=("--limit", "400000000"))


SHIPPED = (
    Shipped(
        "zstd",
        "a compressor",
        "zstd 1.5.4+dfsg2-5",
        "It compresses a tar file of shared libraries of 6 MB at level 9: it searches matches in a window of memory, "
        "and writes what it found with entropy coding, block by block.",
        ("usr/bin/zstd", "-9", "--single-thread", "-c", "{input}"),
    ),
    Shipped(
        "sqlite",
        "a database",
        "sqlite3 3.40.1-2+deb12u2",
        "It fills two tables, makes indexes, joins, groups, updates and deletes, in a database file: B-trees, a "
        "bytecode interpreter, sorting, pages that are read and written with system calls.",
        ("usr/bin/sqlite3", "{folder}/shop.db"),
    ),
    Shipped(
        "lua",
        "an interpreter",
        "lua5.4 5.4.4-3+deb12u1",
        "It counts and sorts words, solves the eight queens, builds trees that its garbage collector walks, and "
        "rewrites text with patterns: bytecode, hash tables, short-lived objects.",
        ("usr/bin/lua5.4", "{input}"),
    ),
    Shipped(
        "tsort",
        "a pointer chaser",
        "coreutils 9.1-1",
        "It sorts 2 million names topologically: each name of its input is searched in a balanced tree of all those "
        "before it, some twenty nodes one after the other, and where the next is stands in the one before.",
        ("usr/bin/tsort", "{input}"),
        ("--skip", "3000000000", "--limit", "3400000000"),
    ),
    Shipped(
        "lua_list",
        "a pointer chaser in an interpreter",
        "lua5.4 5.4.4-3+deb12u1",
        "A Lua program walks round and round a list of 300,000 tables that were linked in random order: where the "
        "next one is, stands in the one before, which is not in a cache.",
        ("usr/bin/lua5.4", "{input}"),
        ("--skip", "800000000", "--limit", "1000000000"),
    ),
)


def _input(name: str, root: Path, folder: Path) -> Path:
    """Write the input of a workload into *folder* and return its place."""
    path = folder / f"{name}.input"
    if name == "zstd":
        libraries = root / "usr" / "lib" / "aarch64-linux-gnu"
        with tarfile.open(path, "w") as tar:
            for library in sorted(p for p in libraries.glob("lib*.so.*") if not p.is_symlink()):
                entry = tarfile.TarInfo(library.name)
                entry.size = library.stat().st_size
                with library.open("rb") as content:
                    tar.addfile(entry, content)
    elif name == "tsort":
        with path.open("w") as lines:
            lines.writelines(_pairs())
    else:
        path.write_text({"sqlite": _SQL, "lua": _LUA, "lua_list": _LIST}[name])
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the workloads that are named, or all; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder with the unpacked packages")
    parser.add_argument("folder", type=Path, help="where to write NAME.yaml")
    parser.add_argument("--only", choices=[it.name for it in SHIPPED], help="record this one alone")
    chosen = parser.parse_args(arguments)
    for it in SHIPPED:
        if chosen.only in (None, it.name):
            with tempfile.TemporaryDirectory() as folder:
                source = _input(it.name, chosen.root, Path(folder))
                program, *rest = [part.format(input=source, folder=folder) for part in it.command]
                options = ["--root", str(chosen.root), "--output", str(chosen.folder / f"{it.name}.yaml"), *it.options]
                options += ["--title", f"{it.title}, {it.name}", "--story", f"{it.did} Debian 12, arm64: {it.package}."]
                options += ["--stdin", str(source)] if it.name == "sqlite" else []
                status = record([*options, "--", str(chosen.root / program), *rest])
                if status:
                    return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
