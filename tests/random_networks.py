"""Random networks written as people write them, and what must hold for each when it is quantized.

`python tests/random_networks.py --count 200 --seed 0` tries 200 of them and prints what failed, reduced to the
statements that it takes, by kind of statement. `--self-test` puts a copy of the float network in the place of the
quantized one, with which nothing may fail. `--kind write-view` tries the kinds whose name begins so, each alone.

A network is Python source: a class whose forward is a list of statements drawn from `KINDS`. Every statement reads and
writes the variables x, y and z, which have one shape, and u, a view of any shape, so that any selection of statements
in any order is a network.
"""

import argparse
import collections
import dataclasses
import linecache
import random
import re
import string
import sys
import zlib
from collections.abc import Iterator

import torch
from network_examination import APOTFX, COPIES, Library, Verdict, check
from network_statements import DOMAINS, HEADER, KINDS, OUTPUTS, PASSES_OPTIONAL, SAME, SIGNATURES, VIEW_INIT, WRITES
from torch import nn

# Where a statement stands. A leaf is a submodule that looks at values first, which no tracing enters.
PLACES = ("inline", "inline", "inline", "method", "function", "submodule", "submodule", "twice", "leaf")
LEAF = ["if x.abs().amax() > 1e9:", "    return y, x, z, u"]


@dataclasses.dataclass(frozen=True)
class Statement:
    kind: str
    init: str
    body: str
    place: str = "inline"


@dataclasses.dataclass(frozen=True)
class Program:
    """A network; `source` is all of it."""

    seed: int
    domain: str
    statements: tuple[Statement, ...]
    signature: str = "plain"
    output: str = "tensor"
    with_example: bool = False  # whether `quantize` gets example inputs

    @property
    def kinds(self) -> set[str]:
        header = {f"forward-{self.signature}", f"output-{self.output}"} - {"forward-plain", "output-tensor"}
        return {statement.kind for statement in self.statements} | header

    @property
    def may_refuse(self) -> bool:
        # Arguments that have a default keep it, unless the examples have them.
        unannounced = not self.with_example and self.signature in PASSES_OPTIONAL
        refused = SIGNATURES[self.signature].may_refuse or any(KINDS[s.kind].may_refuse for s in self.statements)
        return unannounced or refused

    @property
    def same(self) -> float:
        """By how much, in dB, the network may differ with its quantizers off."""
        return min((KINDS[s.kind].same for s in self.statements), default=SAME)

    def source(self) -> str:
        signature, outside, methods, inits, lines = SIGNATURES[self.signature], [], [], [], []
        lines += [*signature.body.splitlines(), "x = self.a(inputs)", "y = torch.relu(self.b(x))", "z = x", "u = y"]
        for i, s in enumerate(self.statements):
            body = s.body.splitlines()
            if s.place == "inline" or "inputs" in s.body:
                lines += body
                inits += s.init.splitlines()
                continue
            body.append("return x, y, z, u")
            if s.place in ("submodule", "twice", "leaf"):
                body = [*LEAF, *body] if s.place == "leaf" else body
                outside += self._module(f"Part{i}", s.init.splitlines(), [("forward", "x, y, z, u", body)])
                inits.append(f"self.part{i} = Part{i}()")
                lines += [f"x, y, z, u = self.part{i}(x, y, z, u)"] * (2 if s.place == "twice" else 1)
            else:
                inits += s.init.splitlines()
                if s.place == "method":
                    methods.append((f"part{i}", "x, y, z, u", body))
                    lines.append(f"x, y, z, u = self.part{i}(x, y, z, u)")
                else:
                    outside += [f"def part{i}(self, x, y, z, u):", *(f"    {line}" for line in body), "", ""]
                    lines.append(f"x, y, z, u = part{i}(self, x, y, z, u)")
        lines += ["out = self.c(torch.relu(x)) + self.d(y) + z", *OUTPUTS[self.output].splitlines()]
        net = self._module("Net", inits, [*methods, ("forward", signature.parameters, lines)])
        return "\n".join([*outside, *net])

    def _module(self, name: str, init: list[str], methods: list[tuple[str, str, list[str]]]) -> list[str]:
        """A class with the methods (name, parameters, body) and the layers that they and the functions read."""
        text = "\n".join([*init, *(line for _, _, body in methods for line in body)])
        read = set(re.findall(r"self\.([abcd])\b", text))
        if name == "Net":  # functions beside the class read its layers too
            functions = [s.body for s in self.statements if s.place == "function"]
            read |= set("abcd") & set(re.findall(r"self\.([abcd])\b", "\n".join(functions)))
        layers = [f"self.{key} = {made}" for key, made in DOMAINS[self.domain].layers.items() if key in read]
        unique = list(dict.fromkeys([*layers, *init]))
        lines = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in unique]
        for method, parameters, body in methods:
            lines += [f"    def {method}(self, {parameters}):", *(f"        {line}" for line in body)]
        return [*lines, "", ""]

    def build(self) -> nn.Module:
        """The network in evaluation mode; `inspect` finds its source."""
        source, file = f"{HEADER}\n\n{self.source()}", f"random_network_{zlib.crc32(self.source().encode()):08x}.py"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        names = {"__name__": "random_network"}
        exec(compile(source, file, "exec"), names)
        torch.manual_seed(self.seed)
        return names["Net"]().eval()

    def inputs(self, batch: int, channels_last: bool = False) -> object:
        """A batch as `calibrate` takes it: a tensor, positional arguments or keyword arguments."""
        generator = torch.Generator().manual_seed(self.seed + batch)
        x = torch.randn(batch, *DOMAINS[self.domain].shape, generator=generator)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
        mask = torch.rand(batch, *DOMAINS[self.domain].shape, generator=generator)
        return {
            "plain": x,
            "positional": (x, mask),
            "keyword": {"inputs": x, "mask": mask},
            "dict": ({"image": x, "mask": mask},),
            "pair": ((x, mask),),
        }[SIGNATURES[self.signature].call]


def statement(rng: random.Random, kind: str, domain: str, index: int, place: str = "inline") -> Statement:
    x, y, z = rng.sample("xyz", 3)
    words = DOMAINS[domain].words | {"i": str(index), "x": x, "y": y, "z": z, "layer": DOMAINS[domain].layers["b"]}
    write = rng.choice(WRITES)
    words |= {f"write_{name}": string.Template(write).substitute(t=t) for name, t in (("u", "u"), ("x", x))}
    init, body = (string.Template(text).substitute(words) for text in (KINDS[kind].init, KINDS[kind].body))
    # Of modules that a table of kinds shares, the statement makes those that it reads.
    if KINDS[kind].init == VIEW_INIT:
        init = "\n".join(line for line in init.splitlines() if line.partition(" ")[0] in re.findall(r"self\.\w+", body))
    return Statement(kind, init, body, place)


def random_program(seed: int) -> Program:
    """One to six statements; families of kinds are about equally likely, however many kinds they have."""
    rng = random.Random(seed)
    domain = rng.choice(list(DOMAINS))
    families = collections.defaultdict(list)
    for name, kind in KINDS.items():
        if domain in kind.domains:
            families[name.partition("-")[0]].append(name)
    weights = [3 if family in ("write", "setitem", "operator", "method") else 1 for family in families]
    statements = []
    for index in range(rng.randint(1, 6)):
        (family,) = rng.choices(list(families.values()), weights)
        statements.append(statement(rng, rng.choice(family), domain, index, rng.choice(PLACES)))
    plain = rng.random() < 0.5
    return Program(
        seed,
        domain,
        tuple(statements),
        "plain" if plain else rng.choice(list(SIGNATURES)),
        "tensor" if plain else rng.choice(list(OUTPUTS)),
        rng.random() < 0.5,
    )


def programs_of_one_kind() -> dict[str, list[Program]]:
    """For every kind, networks that differ from a plain one in it alone, by name."""
    programs: dict[str, list[Program]] = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        for seed, place in enumerate(("inline", "submodule", "leaf")):
            domain = kind.domains[(number + seed) % len(kind.domains)]
            line = statement(random.Random(f"{name} {place}"), name, domain, 0, place)
            programs.setdefault(name, []).append(Program(seed, domain, (line,), with_example=place == "submodule"))
    for name in SIGNATURES:
        programs[f"forward-{name}"] = [Program(0, "images", (), name, with_example=flag) for flag in (False, True)]
    for name in OUTPUTS:
        programs[f"output-{name}"] = [Program(0, "images", (), "plain", name, flag) for flag in (False, True)]
    return programs


def minimize(program: Program, verdict: Verdict, library: Library = APOTFX) -> tuple[Program, Verdict]:
    """A program with fewer parts that is wrong at the same stage."""

    def smaller() -> Iterator[Program]:
        for i in range(len(program.statements)):
            yield dataclasses.replace(program, statements=program.statements[:i] + program.statements[i + 1 :])
        for i, s in enumerate(program.statements):
            if s.place != "inline":
                statements = list(program.statements)
                statements[i] = dataclasses.replace(s, place="inline")
                yield dataclasses.replace(program, statements=tuple(statements))
        for key, value in (("signature", "plain"), ("output", "tensor"), ("with_example", False)):
            if getattr(program, key) != value:
                yield dataclasses.replace(program, **{key: value})

    while True:
        for candidate in smaller():
            found = check(candidate, library)
            if found.what == verdict.what and found.stage == verdict.stage:
                program, verdict = candidate, found
                break
        else:
            return program, verdict


def report(program: Program, verdict: Verdict) -> str:
    options = ", with example_inputs" if program.with_example else ""
    return (
        f"{verdict.stage}: {verdict.reason}\n(seed {program.seed}, {program.domain}{options}, "
        f"kinds {', '.join(sorted(program.kinds)) or 'none'})\n\n{program.source()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others have those that follow")
    parser.add_argument("--kind", help="try kinds whose name begins so, each alone, instead of random networks")
    parser.add_argument("--self-test", action="store_true", help="a copy of the float network is the quantized one")
    parser.add_argument("--whole", action="store_true", help="do not reduce what fails")
    args = parser.parse_args()
    library = COPIES if args.self_test else APOTFX
    if args.kind is not None:
        programs = [p for name, some in programs_of_one_kind().items() if name.startswith(args.kind) for p in some]
    else:
        programs = [random_program(seed) for seed in range(args.seed, args.seed + args.count)]
    verdicts = collections.Counter()
    failures, refusals = collections.defaultdict(list), collections.defaultdict(list)
    for program in programs:
        verdict = check(program, library)
        verdicts[verdict.what] += 1
        for refusal in verdict.refusals:
            refusals[refusal.partition(":")[0]].append((program, refusal))
        if verdict.what == "ok":
            continue
        if not args.whole and verdict.what != "unsuited":
            program, verdict = minimize(program, verdict, library)
        kinds = ", ".join(sorted(program.kinds)) or "nothing"
        print(f"seed {program.seed} ({kinds}): {verdict.what}, {verdict.stage}: {verdict.reason}", flush=True)
        if verdict.what == "wrong":
            failures[kinds].append((program, verdict))
        else:
            refusals[f"{verdict.what}, {verdict.stage}"].append((program, verdict.reason))
    for kind, found in sorted(failures.items(), key=lambda item: (-len(item[1]), item[0])):
        print(f"### {kind}: {len(found)}\n{report(*found[0])}")
    for where, found in sorted(refusals.items()):
        print(f"### {where}: {len(found)}")
        for program, reason in found[:8]:
            print(f"  seed {program.seed} ({', '.join(sorted(program.kinds))}): {reason.splitlines()[0][:200]}")
    print(f"{sum(verdicts.values())} networks: " + ", ".join(f"{n} {what}" for what, n in sorted(verdicts.items())))
    return min(1, len(failures))


if __name__ == "__main__":
    sys.exit(main())
