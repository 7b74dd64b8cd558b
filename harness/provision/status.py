"""How the hosts of an inventory stand, for the table of `doctor`: looks, and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.checks import Finding, Level
from harness.inventory import Gpu, Host, Inventory
from harness.provision import facts
from harness.provision.far import Far, State
from harness.provision.layout import STEPS
from harness.remote import PlaceholderError, Timing, connect, fan_out

QUICK = Timing(connect_s=3.0, attempts=1, probe_s=2.0, silence_s=4.0)
"""A table should not be waited for: a host that is not there at once is said to be absent."""
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure by its target, such as `llmstation_fig8a`, and the testbed of its paper."""

    target: str
    gpu: str
    count: int


def wanted(testbeds: Mapping[str, str]) -> list[Wanted]:
    """What figures want, from target to testbed (`rtx3090x2`)."""
    found = []
    for target, testbed in testbeds.items():
        gpu, _, count = testbed.rpartition("x")
        if gpu and count.isdigit():
            found.append(Wanted(target, gpu, int(count)))
    return found


def findings(inventory: Inventory, figures: Sequence[Wanted], timing: Timing = QUICK) -> Iterator[Finding]:
    """A line for each host, those of like hosts in one, and one for what all hosts together can stand for."""
    reached = [host for host in inventory.hosts if not (host.local or host.placeholder or host.only_endpoint)]
    looked = fan_out(reached, lambda host: _look(host, timing)) if reached else None
    lines = []
    for host in inventory.hosts:
        if host.local:
            lines.append((host, Finding(Level.OK, host.name, "this machine")))
        elif host.placeholder:
            lines.append((host, _placeholder(host)))
        elif host.only_endpoint:
            continue  # harness.checks looks at those
        elif looked is not None and host.name in looked.done:
            lines.append((host, looked.done[host.name]))
        else:
            error = looked.failed[host.name] if looked is not None else PlaceholderError(host.name, "?", "?")
            found = f"{getattr(error, 'what', error.key)}"
            lines.append((host, Finding(Level.MISSING, host.name, found, error.mend)))
    yield from _merged(lines)
    yield from _testbed(inventory.workers, figures)


def _look(host: Host, timing: Timing) -> Finding:
    with connect(host, timing=timing) as remote:
        if host.runner.kind == "none":
            return Finding(Level.OK, host.name, "jump host")
        answer = Far(remote).ask(make=False)
    told = facts.summary(answer.facts)
    for what, mend in facts.problems(host, answer.facts, needs_space=answer.state is None):
        return Finding(Level.MISSING, host.name, f"{what}; {told}", mend)
    done = State.of(answer).keys
    if answer.state is None:
        return Finding(Level.OPTIONAL, host.name, f"reached, not provisioned; {told}", "run `snakemake provision`")
    lacking = [step for step in STEPS[1:] if step not in done]
    if lacking:
        mend = "run `snakemake provision`"
        return Finding(Level.OPTIONAL, host.name, f"provisioned in part: lacks {', '.join(lacking)}; {told}", mend)
    return Finding(Level.OK, host.name, f"ready; {told}" + "".join(f"; {note}" for note in facts.notes(answer.facts)))


def _placeholder(host: Host) -> Finding:
    has = gpus_text(host.gpus) or ("jump host" if host.runner.kind == "none" else "no GPU")
    mend = "copy the file, describe your own hosts and remove `placeholder` (hosts/README.md)"
    return Finding(Level.OPTIONAL, host.name, f"placeholder, not connected to; {has}", mend)


def gpus_text(gpus: Iterable[Gpu]) -> str:
    """GPUs in words: `4 x t4 (16 GiB)`."""
    return ", ".join(f"{gpu.count} x {gpu.model}" + (f" ({gpu.memory_gib:g} GiB)" if gpu.memory_gib else "") for gpu in gpus)


def _merged(lines: Sequence[tuple[Host, Finding]]) -> Iterator[Finding]:
    """Hosts of which the same is to be said, in one line."""
    alike: dict[tuple[Level, str, str], list[str]] = {}
    for host, finding in lines:
        alike.setdefault((finding.level, finding.found, finding.mend), []).append(host.name)
    for (level, found, mend), names in alike.items():
        yield Finding(level, f"host {_names(names)}", found, mend)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMES_SHOWN else f"{names[0]} ... {names[-1]} ({len(names)})"


def _testbed(hosts: Sequence[Host], figures: Sequence[Wanted]) -> Iterator[Finding]:
    """Which papers' testbeds the GPUs are: what could be measured on them instead of simulated."""
    total: Counter[str] = Counter()
    for host in hosts:
        for gpu in host.gpus:
            total[gpu.model] += gpu.count
    if not total:
        return
    fits = [figure.target for figure in figures if total[figure.gpu] >= figure.count]
    has = ", ".join(f"{count} x {model}" for model, count in total.items())
    told = f"the testbed of {', '.join(fits)}" if fits else "the testbed of no figure here; all can be simulated"
    yield Finding(Level.OK, "testbed", f"{has}: {told}")


def testbeds(root: Path) -> dict[str, str]:
    """The testbed of every figure of the checkout `root`; a figure file that is wrong is left out (`doctor` says so)."""
    from harness.figure_file import load_figure
    from systems.registry import InputError

    found = {}
    for path in sorted((root / "figures").glob("*/*.yaml")):
        try:
            found[f"{path.parent.name}_{path.stem}"] = load_figure(path).testbed
        except InputError:
            continue
    return found
