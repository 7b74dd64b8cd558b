"""dLoRA's LoRA engine on a CPU: merged, unmerged and alone agree; weights do not drift; bad adapters are refused."""

from __future__ import annotations

import copy
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import numpy as np  # noqa: E402

from systems.common.core import Request  # noqa: E402
from systems.common.engine.config import EngineConfig  # noqa: E402
from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.common.torch_engine.drivers import Live  # noqa: E402
from systems.common.torch_engine.lora import MODULES, Adapter, matrices, merge, random_adapter  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from systems.dlora.lora_engine.adapters import packed, read  # noqa: E402
from systems.dlora.lora_engine.bank import SlotBank  # noqa: E402
from systems.dlora.lora_engine.constants import Constants, measure_constants  # noqa: E402
from systems.dlora.lora_engine.live import LiveReplica, serve  # noqa: E402
from systems.dlora.lora_engine.passes import Passes  # noqa: E402
from systems.dlora.lora_engine.runner import LoraRunner  # noqa: E402
from systems.dlora.lora_engine.switching import Copy, InPlace, choose, drift_bound  # noqa: E402
from systems.dlora.policies.credit import Credit  # noqa: E402
from systems.dlora.policies.static import Fcfs, Merge  # noqa: E402
from systems.dlora.replica import engine_config as replica_config  # noqa: E402
from systems.dlora.requests import LoraSequence  # noqa: E402

SHAPE = model("tiny")
ALL = tuple(MODULES)
CONFIG = EngineConfig(200, max_num_batched_tokens=256, max_num_seqs=8)
ADAPTERS = {f"a{i}": random_adapter(SHAPE, rank, i, ALL) for i, rank in enumerate((4, 8, 16, 16, 5))}
torch.set_num_threads(1)


def runner(capacity: int = 3, **options) -> LoraRunner:
    made = LoraRunner.build(SHAPE, random_weights(SHAPE, 7), CONFIG, capacity, 16, max_tokens=256, **options)
    for name, adapter in ADAPTERS.items():
        made.add(name, adapter)
    return made


def prompt(index: int):
    rng = np.random.default_rng(index)
    return rng.integers(0, SHAPE.vocab, int(rng.integers(1, 40)))


def alone(index: int, adapter: str | None, tokens: int) -> list[int]:
    """The request's tokens from an engine of its own, on weights into which its adapter was merged in float32."""
    weights = random_weights(SHAPE, 7)
    if adapter:
        merge(SHAPE, weights, ADAPTERS[adapter])
    live = Live.build(SHAPE, weights, CONFIG, max_tokens=256, prompt=lambda _: prompt(index))
    return live.generate([Request(0, 0.0, len(prompt(index)), tokens)])[1][0]


ALONE: dict[tuple[int, str | None], list[int]] = {}


def expected(index: int, adapter: str | None) -> list[int]:
    if (index, adapter) not in ALONE:
        ALONE[index, adapter] = alone(index, adapter, 12)
    return ALONE[index, adapter]


@pytest.mark.parametrize("scheme", ["copy", "in-place"])
@pytest.mark.parametrize("backend", ["einsum", "bmm"])
def test_modes_in_any_order_give_each_request_its_own_tokens(scheme: str, backend: str) -> None:
    any_modes(runner(scheme=scheme, backend=backend))


def any_modes(made: LoraRunner) -> None:
    """Ten requests of five adapters and the base model over three slots; each step picks some of them and a mode."""
    rng = np.random.default_rng(3)
    pending = {i: (None if i % 6 == 5 else f"a{i % 6}") for i in range(10)}
    adapters, tokens = dict(pending), {}
    steps: list[str | None] = []
    while any(len(found) < 12 for found in tokens.values()) or len(tokens) < 10:
        while pending and len(made.requests) < 8:
            index = next(iter(pending))
            made.admit(index, prompt(index), pending.pop(index))
            tokens[index] = []
        live = list(made.requests)
        chosen = [i for i in live if rng.random() < 0.6] or live[:1]
        merged = made.requests[chosen[0]].adapter if rng.random() < 0.5 else None
        chosen = [i for i in live if made.requests[i].adapter == merged] if merged else made.can_run(chosen)
        new, old = [i for i in chosen if not tokens[i]], [i for i in chosen if tokens[i]]
        for index, token in made.step(new, old, merged).items():
            tokens[index].append(token)
            if len(tokens[index]) == 12:
                made.finish(index)
        steps.append(merged)
    assert None in steps and len(set(steps)) > 3 and made.store.loads > 5
    for index, found in tokens.items():
        assert found == expected(index, adapters[index]), (index, adapters[index])
    assert made.live.executor.tables.free_blocks == CONFIG.num_gpu_blocks
    assert not any(made.store.residents.outstanding.values())


class Captured:
    """Stands in for CUDA graphs: what was captured reads the weights, and applies adapters or not, as when it was captured."""

    def __init__(self, model) -> None:
        self.model, self.made = model, {}

    def __contains__(self, key) -> bool:
        return key in self.made

    def capture(self, key, work) -> None:
        work()
        self.made[key] = work, self.model.weights, self.model.adapted

    def run(self, key):
        now = self.model.weights, self.model.adapted
        work, self.model.weights, self.model.adapted = self.made[key]
        try:
            return work()
        finally:
            self.model.weights, self.model.adapted = now


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("scheme", ["copy", "in-place"])
def test_graphs_of_each_mode_read_the_weights_of_that_mode(scheme: str, warm: bool) -> None:
    made = runner(scheme=scheme)
    steps = made.live.executor.steps
    steps._decode = Captured(made.model)
    made._aside = object()  # as on a GPU; nothing here merges ahead
    if warm:
        made.warm(rows=3)
        assert set(steps._decode.made) == {(size, True, adapted) for size in (1, 2, 4) for adapted in (False, True)}
    any_modes(made)
    assert {adapted for _, _, adapted in steps._decode.made} == {False, True}


def test_a_switch_in_one_pass_is_an_unmerge_and_a_merge() -> None:
    for how in ("plain", "addmm"):
        pristine = random_weights(SHAPE, 7)
        for dtype in (torch.float32, torch.bfloat16):
            direct, twice = ladder(pristine, dtype, how), ladder(pristine, dtype, how)
            direct.merge(1)
            direct.merge(2)
            twice.merge(1)
            twice.unmerge()
            twice.merge(2)
            assert (direct.passes, twice.passes) == (2, 3)
            wanted = reference(pristine, dtype, "a2")
            for scheme in (direct, twice):
                assert scheme.merged == 2
                assert off(scheme.for_merged, wanted) < 4 * drift_bound(dtype, 3)


def bank_of(dtype, names: tuple[str, ...] = ("a1", "a2")) -> SlotBank:
    shape = SHAPE.with_dtype("fp32" if dtype == torch.float32 else "bf16")
    bank = SlotBank(shape, len(names), 16, 8, backend="bmm")
    for slot, name in enumerate(names, 1):
        for layer in range(SHAPE.layers):
            bank.copy_layer(slot, packed(shape, ADAPTERS[name], 16, ALL, False), layer)
    return bank


def cast(weights, dtype):
    weights = copy.deepcopy(weights)
    for layer in weights.layers:
        for matrix in matrices(layer).values():
            matrix.weight = matrix.weight.to(dtype)
    return weights


def ladder(pristine, dtype, how: str = "auto", every: int = 0) -> InPlace:
    return InPlace(cast(pristine, dtype), Passes(bank_of(dtype), how), every)


def reference(pristine, dtype, name: str):
    weights = cast(cast(pristine, dtype), torch.float64)
    bank = bank_of(dtype, (name,))
    for i, layer in enumerate(weights.layers):
        for site, matrix in matrices(layer).items():
            ends = bank.ends[site]
            a = bank.a[site][i, 1].double().unflatten(0, (len(ends), -1))
            for part, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
                matrix.weight[begin:end] += bank.b[site][i, 1, begin:end].double() @ a[part]
    return weights


def off(weights, wanted) -> float:
    """Largest difference over the layers' matrices."""
    pairs = zip(weights.layers, wanted.layers, strict=True)
    return max(
        float((x.weight.double() - y.weight.double()).abs().max())
        for one, other in pairs
        for x, y in zip(matrices(one).values(), matrices(other).values(), strict=True)
    )


def same(one, other) -> bool:
    return off(one, other) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copying_scheme_is_exact_after_ten_thousand_switches(dtype) -> None:
    """What is merged never depends on what was merged before, bit for bit, and the pristine weights are never written."""
    pristine = random_weights(SHAPE, 7)
    before = cast(pristine, dtype)
    scheme = Copy(cast(pristine, dtype), Passes(bank_of(dtype)))
    scheme.merge(1)
    first = copy.deepcopy(scheme.for_merged)
    for i in range(10_000):
        scheme.merge(2 - i % 2)
    scheme.unmerge()
    assert same(scheme.for_unmerged, before)
    scheme.merge(1)
    assert same(scheme.for_merged, first)
    assert scheme.passes > 10_000
    assert off(scheme.for_merged, reference(pristine, dtype, "a1")) <= drift_bound(dtype, 1) * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_drifts_within_its_bound_and_is_brought_back(dtype) -> None:
    pristine = random_weights(SHAPE, 7)
    before = cast(pristine, dtype)
    drifting, restored = ladder(pristine, dtype), ladder(pristine, dtype, every=100)
    largest = {}  # |W| + |largest merged delta|, element by element
    for name in ("a1", "a2"):
        for i, (layer, kept) in enumerate(zip(reference(pristine, dtype, name).layers, before.layers, strict=True)):
            for site, matrix in matrices(layer).items():
                base = matrices(kept)[site].weight.double()
                room = base.abs() + (matrix.weight - base).abs()
                largest[i, site] = torch.maximum(room, largest.get((i, site), room))
    for i in range(10_000):
        for scheme in (drifting, restored) if i < 1000 else (drifting,):
            scheme.merge((1, 2, 0)[i % 3])
    drifting.unmerge()
    restored.unmerge()
    assert drifting.passes >= 10_000 and not drifting.restores and restored.restores >= 9
    worst = {}
    for name, scheme, passes in (("never", drifting, drifting.passes), ("every 100", restored, 100)):
        bound, moved = drift_bound(dtype, passes), 0.0
        for i, (layer, kept) in enumerate(zip(scheme.for_unmerged.layers, before.layers, strict=True)):
            for site, matrix in matrices(layer).items():
                change = (matrix.weight.double() - matrices(kept)[site].weight.double()).abs()
                assert (change <= bound * largest[i, site]).all(), name
                moved = max(moved, float((change / largest[i, site]).max()))
        worst[name] = moved
    assert worst["never"] > worst["every 100"] >= 0
    restored.restore()
    assert same(restored.for_unmerged, before)


def test_merging_again_what_was_merged_costs_nothing_by_copy() -> None:
    made = runner(scheme="copy")
    for name in ("a0", "a0"):
        made.prepare_merged(name)
        made.prepare_unmerged(["a1"])
    assert made.scheme.passes == 1
    made.prepare_merged("a1", ahead=True)
    assert made.merge_done() and made.scheme.passes == 2
    in_place = runner(scheme="in-place")
    for name in ("a0", "a1"):
        in_place.prepare_merged(name)
    in_place.prepare_unmerged()
    assert in_place.scheme.passes == 3


def test_a_slot_may_hold_another_adapter_when_its_old_one_is_merged_again() -> None:
    made = runner(capacity=1, scheme="copy")
    made.prepare_merged("a0")
    made.prefetch(["a1"])  # into the only slot
    made.admit(0, prompt(0), "a1")
    made.admit(1, prompt(1), "a0")
    found: dict[int, list[int]] = {0: [], 1: []}
    for step in range(12):
        for index, merged in ((0, "a1" if step % 3 else None), (1, "a0")):
            for key, token in made.step([index] if not step else [], [index] if step else [], merged).items():
                found[key].append(token)
    assert found == {0: expected(0, "a1"), 1: expected(1, "a0")}


def test_one_slot_in_place() -> None:
    made = runner(capacity=1, scheme="in-place")
    for name in ("a0", "a1", None, "a2"):
        made.prepare_merged(name) if name else made.prepare_unmerged(["a3"])
    assert made.store.residents.slot_of == {"a2": 1}


def test_a_direct_change_in_place_lets_go_of_the_slot_of_what_was_merged() -> None:
    made = runner(capacity=2, scheme="in-place")
    for name in ("a0", "a1"):
        made.prepare_merged(name)
    assert made.scheme.passes == 2
    made.prepare_unmerged(["a2", "a3"])
    assert set(made.store.residents.slot_of) == {"a2", "a3"}


def test_removing_an_adapter() -> None:
    for scheme in ("copy", "in-place"):
        made = runner(scheme=scheme)
        made.admit(0, prompt(0), "a0")
        made.step([0], [], "a0")
        with pytest.raises(InputError, match="1 requests use it"):
            made.remove("a0")
        assert not made.remove("a0", wait=True)
        with pytest.raises(InputError, match="being removed"):
            made.admit(1, prompt(1), "a0")
        assert made.step([], [0], "a0")  # goes on
        made.finish(0)
        made.prepare_unmerged()
        assert "a0" not in made.store.host
        made.add("a0", ADAPTERS["a2"])  # another one of that name
        made.admit(2, prompt(2), "a0")
        made.admit(3, prompt(2), "a2")
        first = [made.step([i], [], merged)[i] for i, merged in ((2, "a0"), (3, "a2"))]
        assert first == [expected(2, "a2")[0]] * 2
        made.prepare_merged("a1")
        assert made.remove("a1") and "a1" not in made.store.host
        assert made.merged is None


def test_a_batch_with_more_adapters_than_slots() -> None:
    made = runner(capacity=2)
    for i in range(4):
        made.admit(i, prompt(i), f"a{i}")
    assert made.can_run([0, 1, 2, 3]) == [0, 1]
    with pytest.raises(InputError, match="let some wait"):
        made.step([0, 1, 2], [])
    assert set(made.step([0, 1], [])) == {0, 1}
    with pytest.raises(InputError, match="not of this adapter"):
        made.step([], [0, 1], "a0")
    with pytest.raises(InputError, match="max_num_batched_tokens"):
        made.admit(9, np.zeros(1000, np.int64), None)
    with pytest.raises(InputError, match="use one of a0"):
        made.admit(9, prompt(0), "nobody")


def test_an_adapter_in_memory_that_does_not_fit_is_refused() -> None:
    made, module = runner(), "model.layers.0.self_attn.q_proj"
    a, b = ADAPTERS["a0"].modules[module]
    broken = [(a, b[:, :-1], "not of one rank"), (a[:, :-1], b, "does not fit"), (a, b.long(), "float32, float16 and bfloat16")]
    wide = torch.zeros(32, a.shape[1]), torch.zeros(b.shape[0], 32)
    for mine, theirs, told in [*broken, (*wide, "higher than the engine's 16")]:
        with pytest.raises(InputError, match=told):
            made.add("broken", Adapter({module: (mine, theirs)}))
    assert "broken" not in made.store.host and "broken" not in made.store.residents.outstanding


def test_the_constants_are_measured_on_an_idle_runner() -> None:
    made = runner()
    constants = measure_constants(made, rows=4, repeats=2)
    assert min(constants.t_merged_s, constants.t_unmerged_s, constants.switch_s) > 0
    assert (constants.rows, constants.adapters) == (4, 3)
    assert not made.requests and made.live.executor.tables.free_blocks == CONFIG.num_gpu_blocks


@pytest.mark.parametrize("policy", ["credit", "fcfs", "merge"])
@pytest.mark.parametrize("scheme", ["copy", "in-place"])
def test_a_live_replica_serves_by_the_simulator_s_policies(policy: str, scheme: str) -> None:
    """Each request gets its own tokens, whatever is paused, merged, or moved away and back half-way."""
    made = runner(scheme=scheme, capacity=3)
    rules = Constants(0.001, 0.0015, 0.0005, 0.0, 4, 3).rules(scale=0.5)
    chosen = {"credit": lambda: Credit(5, 3, 4, rules), "fcfs": lambda: Fcfs(3, 4), "merge": lambda: Merge(4)}[policy]()
    config = replica_config(200, 4, 256)
    replica = LiveReplica(made, config, chosen, list(ADAPTERS), lambda request: prompt(request.index))
    skewed = [0, 0, 0, 1, 0, 2, 0, 0, 3, 1, 0, 4]
    asked = [(Request(i, 0.0, len(prompt(i)), 12), adapter) for i, adapter in enumerate(skewed)]
    sequences = [LoraSequence(*one) for one in asked]
    for sequence in sequences:
        replica.submit(sequence)
    for iteration in range(1000):
        if iteration == 9:  # one goes and comes back: it is prefilled again, with what it had generated
            moved = next(s for s in sequences if 0 < s.generated < 12)
            replica.withdraw(moved)
            assert moved.prompt_tokens == moved.request.input_tokens + moved.generated
            replica.submit(moved)
        if not len(replica.queue):
            break
        ended = replica.begin(float(iteration))
        assert ended > iteration
        replica.end()
    assert replica.answers == {i: expected(i, f"a{adapter}") for i, adapter in enumerate(skewed)}
    assert (replica.switches == 0) == (policy == "fcfs")
    assert not made.requests and made.live.executor.tables.free_blocks == CONFIG.num_gpu_blocks
    assert replica.pool.free_blocks == 200


def test_serving_in_real_time() -> None:
    made, now = runner(), [0.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    replica = LiveReplica(made, replica_config(200, 4, 256), Fcfs(3, 4), list(ADAPTERS), lambda r: prompt(r.index), clock=clock)
    asked = [(Request(i, 0.5 * i, len(prompt(i)), 3), i % 5) for i in range(6)]
    sequences = serve(replica, asked, sleep=sleep)
    for sequence in sequences:
        assert (
            sequence.arrival_s <= sequence.scheduled_s < sequence.first_token_s < sequence.finish_s < sequence.arrival_s + 0.1
        )
    with pytest.raises(InputError, match="does not swap"):
        small = LiveReplica(
            runner(), replica_config(6, 4, 256), Fcfs(3, 4), list(ADAPTERS), lambda r: np.arange(r.input_tokens)
        )
        serve(small, [(Request(i, 0.0, 16, 40), 0) for i in range(3)], wait=False)


class Copying:
    """What the store and the bank ask of CUDA, recorded: an event per layer that has not ended, and a stream that waits."""

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.at: list[list[int]] = []

    def events(self) -> list:
        made = [type("Event", (), {"query": lambda self: False})() for _ in range(SHAPE.layers)]
        for layer, event in enumerate(made):
            event.layer = layer
        return made

    def wait_event(self, event) -> None:
        self.waited.append(event.layer)


@pytest.mark.parametrize(("wait", "graphed", "waited"), [
    ("layers", True, [0, 1]), ("layers", False, [0, 1]), ("whole", True, [1]), ("whole", False, [1]),
    ("auto", True, [1]), ("auto", False, [0, 1]),
])  # fmt: skip
def test_a_step_waits_for_adapters_that_still_arrive(monkeypatch, wait: str, graphed: bool, waited: list[int]) -> None:
    """By layers: each where it is read; whole: for the last one, before anything runs. Merged steps wait for nothing."""
    made, cuda = runner(wait=wait), Copying()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: cuda)
    made.prepare_merged("a2")
    made.admit(0, prompt(0), "a0")
    made.admit(1, prompt(1), "a1")
    made.admit(2, prompt(2), "a2")
    first = made.step([0], [])[0]
    attend = made.model.attention.decode

    def seen(qkv, layer, slots):
        cuda.at.append(list(cuda.waited))
        return attend(qkv, layer, slots)

    monkeypatch.setattr(made.model.attention, "decode", seen)
    slot_of = made.store.residents.slot_of
    made.store.arriving = {slot_of["a0"]: cuda.events(), 99: cuda.events()}  # 99: nobody's in this batch
    made.step([2], [], "a2")
    assert not cuda.waited
    if graphed:
        second = made.step([], [0])[0]
        assert cuda.at[0] == waited[:1] and cuda.at[-1] == waited
    else:  # a batch with a prompt has no graph here
        second = made.step([1], [0])[0]
        assert cuda.at[-1] == waited
    assert cuda.waited == waited and not made.bank.awaited
    assert [first, second] == expected(0, "a0")[:2]


def test_choices_that_are_none() -> None:
    for options, told in (({"backend": "fast"}, "einsum, bmm, grouped"), ({"scheme": "magic"}, "copy or in-place")):
        with pytest.raises(InputError, match=told):
            runner(**options)
    with pytest.raises(InputError, match="kernel, addmm or plain"):
        runner(merge="slow")
    with pytest.raises(InputError, match="use one of auto"):
        runner(wait="never")
    bank = bank_of(torch.float32)
    with pytest.raises(InputError, match="quantised"):
        choose("copy", random_weights(SHAPE, 7, dtype="int8"), Passes(bank))


# ---- peft checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama of transformers with an adapter that peft has trained for a few steps; its folder, and both models."""
    peft = pytest.importorskip("peft")
    from tests.integration.test_torch_model import SHAPES, hugging_face

    shape, given = SHAPES["llama"]
    base = hugging_face("llama", shape, given)
    state = copy.deepcopy(base.state_dict())
    names = [name.split(".")[-1] for modules in MODULES.values() for name in modules]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=names))
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.02)
    tokens = torch.randint(0, shape.vocab, (2, 24))
    losses = []
    for _ in range(8):
        loss = adapted(tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    folder = tmp_path_factory.mktemp("adapter")
    adapted.eval().save_pretrained(folder)
    return shape, given, state, adapted, folder


def test_a_trained_peft_adapter_gives_peft_s_tokens_in_both_modes(checkpoint) -> None:
    from systems.common.torch_engine import weights as weights_module

    shape, given, state, adapted, folder = checkpoint
    adapter = read(folder, shape)
    for scheme in ("copy", "in-place"):
        made = LoraRunner.build(
            shape, weights_module.load(shape, copy.deepcopy(state)), CONFIG, 2, 8, max_tokens=256, scheme=scheme, given=given
        )
        made.add("mine", adapter)
        tokens = np.random.default_rng(0).integers(0, shape.vocab, 30)
        wanted = [int(t) for t in tokens]
        with torch.no_grad():
            for _ in range(10):
                wanted.append(int(adapted(torch.tensor([wanted])).logits[0, -1].argmax()))
        for index, modes in enumerate([["mine"] * 10, [None] * 10, ["mine", None] * 5]):
            made.admit(index, tokens, "mine")
            found = [made.step([] if i else [index], [index] if i else [], mode)[index] for i, mode in enumerate(modes)]
            made.finish(index)
            assert found == wanted[30:], (scheme, modes)


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(checkpoint, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shape, _, _, _, folder = checkpoint

    def refused(told: str, change=lambda _: None, tensors=lambda found: found, **options) -> None:
        broken = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, broken)
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), broken / "adapter_model.safetensors")
        change(broken)
        with pytest.raises(InputError, match=told) as caught:
            read(broken, options.pop("shape", shape), **options)
        assert "\n" not in str(caught.value) and str(broken) in str(caught.value)

    def config(**values):
        def change(at) -> None:
            file = at / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

        return change

    def with_tensor(part: str, made):
        def tensors(found):
            name = next(key for key in found if part in key)
            return {**found, name: made(found[name]).contiguous()}

        return tensors

    file = "adapter_model.safetensors"
    read(folder, shape, base=None, rank=4)
    refused("of rank 8", config(r=8))
    refused("higher than the engine's 2", rank=2)
    refused("does not fit", tensors=with_tensor("q_proj.lora_A", lambda t: t[:, :-1]))
    refused("of rank 4", tensors=with_tensor("q_proj.lora_B", lambda t: t[:, :-1]))
    refused("float32, float16 and bfloat16", tensors=with_tensor("lora_A", lambda t: t.to(torch.int8)))
    refused("another model's adapter", shape=model("tiny").with_dtype("fp32"))
    refused("another base model", config(base_model_name_or_path="org/Other-7B"), base="org/Llama-2-7b-hf")
    refused("name a folder", lambda at: (at / "adapter_config.json").unlink())
    refused("copy it again", lambda at: (at / file).unlink())
    refused("copy it again", lambda at: (at / file).write_bytes((folder / file).read_bytes()[:500]))
    refused(
        "every lora_A needs its lora_B",
        tensors=lambda found: {k: v for k, v in found.items() if "layers.0.mlp.down_proj.lora_B" not in k},
    )
    refused("pairs of lora_A|is it a LoRA checkpoint", tensors=lambda found: {"other": torch.zeros(1)})
    refused(
        "of the layers only",
        tensors=lambda found: {f"base_model.model.lm_head.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
    )


def test_places_for_requests_that_pause_run_out_in_one_line() -> None:
    made = runner()
    for i in range(CONFIG.max_num_seqs):
        made.admit(i, prompt(i), None)
    with pytest.raises(InputError, match="let some finish"):
        made.admit(99, prompt(0), "a0")
    assert not made.store.residents.outstanding["a0"]
