"""The LoRA engine's Triton kernels against float64; on a machine without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads the switch when a kernel is defined, so the tests run in a process of their own.

    def test_in_the_interpreter(root) -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]

else:
    import copy

    import numpy as np

    from systems.common.engine.config import EngineConfig
    from systems.common.models import ModelShape, model
    from systems.common.torch_engine.kernels.merge_lora import MergeTiling, addresses, merge_lora
    from systems.common.torch_engine.kernels.row_lora import SPLITS, expand, shrink
    from systems.common.torch_engine.lora import matrices as of_layer
    from systems.common.torch_engine.lora import random_adapter
    from systems.common.torch_engine.weights import random_weights
    from systems.dlora.lora_engine.bank import SITES, SlotBank
    from systems.dlora.lora_engine.passes import Passes
    from systems.dlora.lora_engine.runner import LoraRunner
    from systems.dlora.lora_engine.switching import InPlace

    DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA  # the interpreter cannot multiply bfloat16 matrices
    RANK, INNER, ENDS = 16, 96, (64, 96, 128)

    def rand(*shape: int, dtype=torch.float32):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    def bank(places: int, dtype, inner: int = INNER):
        return rand(places, len(ENDS) * RANK, inner, dtype=dtype) * inner**-0.5, rand(places, ENDS[-1], RANK, dtype=dtype) / 8

    def delta(a, b, place: int):
        """B A of one place, part by part, in float64."""
        if not place:
            return torch.zeros(ENDS[-1], a.shape[2], dtype=torch.float64, device=DEVICE)
        parts = zip((0, *ENDS), ENDS, a[place].double().split(RANK), strict=False)
        return torch.cat([b[place, begin:end].double() @ part for begin, end, part in parts])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("take", "put"), [(0, 2), (2, 0), (1, 3), (0, 0)])
    def test_one_pass_takes_out_and_puts_in(dtype, take: int, put: int) -> None:
        layers = [bank(4, dtype) for _ in range(2)]
        weights, which = [rand(ENDS[-1], INNER, dtype=dtype) for _ in layers], torch.tensor([take, put], device=DEVICE)
        exact = [w.double() + delta(a, b, put) - delta(a, b, take) for w, (a, b) in zip(weights, layers, strict=True)]
        unit = torch.finfo(dtype).eps / 2 + 1e-6
        matrices = (torch.stack([a for a, _ in layers]), torch.stack([b for _, b in layers]), ENDS, which)
        for tiling in (None, MergeTiling(32, 32, 4)):
            targets, in_place = [torch.zeros_like(w) for w in weights], [w.clone() for w in weights]
            merge_lora(addresses(weights), addresses(targets), *matrices, tiling)
            for target, wanted in zip(targets, exact, strict=True):
                assert ((target.double() - wanted).abs() <= unit * (wanted.abs() + 1)).all()
            merge_lora(addresses(in_place), addresses(in_place), *matrices, tiling)
            assert all(map(torch.equal, in_place, targets))
        if not take and not put:
            assert all(map(torch.equal, targets, weights))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("rows", "inner"), [(1, INNER), (5, INNER), (5, 2560)])
    def test_rows_of_different_adapters(dtype, rows: int, inner: int) -> None:
        """2560 inputs: each program takes two steps, the last programs find nothing left."""
        a, b = bank(4, dtype, inner)
        x, y = rand(rows, inner, dtype=dtype), rand(rows, ENDS[-1], dtype=dtype)
        of_slot = torch.tensor([2, 0, 3, 2, 1, 0], device=DEVICE)
        slots = torch.tensor([0, 1, 2, 3, 4], device=DEVICE)[:rows]
        low = torch.full((rows, SPLITS, len(ENDS), RANK), float("nan"), device=DEVICE)
        wanted = y.double()
        for row, slot in enumerate(slots.tolist()):
            wanted[row] += delta(a, b, int(of_slot[slot])) @ x[row].double()
        at = of_slot[slots]
        shrink(x, a, low, at)
        expand(y, low, b, ENDS, at)
        assert not torch.isnan(y).any()
        assert float((y.double() - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 2e-3)

    def test_passes_by_kernel_equal_passes_in_float32() -> None:
        """Merge, a -> b and unmerge of a whole model, all four sites."""
        shape = model("tiny")
        weights, adapters = random_weights(shape, 7, DEVICE), [random_adapter(shape, 8, i, SITES) for i in range(2)]
        room = SlotBank(shape, 2, 8, 4, device=DEVICE, backend="bmm")
        for i, adapter in enumerate(adapters):
            room.load(f"a{i}", adapter)
        schemes = [InPlace(copy.deepcopy(weights), Passes(room, how), 0) for how in ("kernel", "plain", "addmm")]
        for slot in (1, 2, 0):
            for scheme in schemes:
                scheme.merge(slot)
            for i in range(shape.layers):
                one, *others = (of_layer(scheme.for_merged.layers[i]) for scheme in schemes)
                for other in others:
                    for site in SITES:
                        torch.testing.assert_close(one[site].weight, other[site].weight, atol=2e-6, rtol=1e-5)

    def test_the_grouped_back_end_serves_prompts_and_rows_like_bmm() -> None:
        """A step with prompts and one with rows, of adapters mixed with none, against the gathering back end."""
        shape = ModelShape("small", 1, 64, 4, 2, 16, 128, 256, dtype="fp32")
        found = []
        for backend in ("grouped", "bmm"):
            config = EngineConfig(60, max_num_batched_tokens=64, max_num_seqs=4)
            made = LoraRunner.build(shape, random_weights(shape, 7, DEVICE), config, 2, 8, max_tokens=64, backend=backend)
            for i in range(2):
                made.add(f"a{i}", random_adapter(shape, 8, i, SITES))
            for i, adapter in enumerate(("a0", None, "a1", "a0")):
                made.admit(i, np.arange(3 + 2 * i), adapter)
            steps = [made.step([0, 1, 2], []), made.step([3], [0, 1, 2]), made.step([], [0, 1, 2, 3])]
            found.append(steps)
        assert found[0] == found[1]
