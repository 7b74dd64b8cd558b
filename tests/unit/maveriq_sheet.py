"""The sheet's sections 2.4 to 2.9 once more, in plain Python: loops, floats, no numpy, nothing from `systems`.

Written from the sheet alone by somebody who had not read the package, so that the two can be compared on random data
(`test_maveriq_sheet.py`). Slow and literal on purpose: layers are dealt one by one, every configuration is costed by itself.
A table is a mapping from (model, tp, pp, dtype, kv, layers, tokens, batch) to (latency in s, memory in GiB).
"""

DTYPES = ("float16", "int8", "int4", "int4_gptq")
# sheet 2.4, printed to five digits; random tests bring their own, and the file's are compared with these
PRINTED_EXPONENTS = {
    ("float16", False): (0.04909, 0.68584, 0.18765, 0.56864),
    ("float16", True): (0.05672, 0.47700, 0.64717, 0.30882),
    ("int8", False): (0.07340, 0.68479, 0.94565, 0.49824),
    ("int8", True): (1e-6, 0.38860, 0.55179, 0.70200),
    ("int4", False): (0.15546, 0.81398, 0.50622, 0.32195),
    ("int4", True): (0.07440, 0.43802, 0.80459, 0.43063),
    ("int4_gptq", False): (0.05838, 0.59121, 0.68222, 0.43562),
}
LAYERS = {"falcon-7b": 32, "falcon-40b": 60, "gptj-6b": 28, "llama-2-7b": 32, "llama-2-13b": 40, "llama-2-70b": 80}
HIDDEN = {"falcon-7b": 4544, "falcon-40b": 8192, "gptj-6b": 4096, "llama-2-7b": 4096, "llama-2-13b": 5120, "llama-2-70b": 8192}
MMLU = {
    "falcon-7b": (99.6, 97.2, None), "falcon-40b": (99.8, 95.9, None), "gptj-6b": (99.2, 96.4, None),
    "llama-2-7b": (99.8, 87.1, 87.3), "llama-2-13b": (99.8, 95.7, 92.2), "llama-2-70b": (99.0, 95.4, 55.7),
}  # fmt: skip


def mmlu(model, dtype, kv):
    if dtype == "float16":
        return 100.0
    if (model, dtype, kv) == ("llama-2-70b", "int8", True):
        return 98.8
    return MMLU[model][DTYPES.index(dtype) - 1]


def unsupported(model, tp, pp, dtype):
    if model == "falcon-40b":
        return (tp, pp, dtype) == (1, 1, "float16")
    if model == "llama-2-7b":
        return (dtype == "int4_gptq" and tp == 4 and pp in (1, 2)) or (tp == 8 and dtype != "float16")
    if model == "llama-2-13b":
        return dtype == "int4_gptq" and tp == 8
    if model == "llama-2-70b":
        if dtype == "float16":
            return (tp, pp) in ((1, 1), (1, 2), (2, 1))
        return dtype == "int8" and (tp, pp) == (1, 1)
    return False


def full_latency(table, model, tp, dtype, kv, batch, depth, tokens):
    """Step A: L(TP, 1; tokens) at full depth from l(1..2, 10..20)."""
    lat = {(n, o): table[model, tp, 1, dtype, kv, n, o, batch][0] for n in (1, 2) for o in (10, 20)}
    t_lay = ((lat[2, 20] - lat[1, 20]) - (lat[2, 10] - lat[1, 10])) / (20 - 10) / (2 - 1)
    t_oth = (lat[1, 20] - lat[1, 10]) / (20 - 10) - 1 * t_lay
    f_lay = (lat[2, 10] - lat[1, 10]) / (2 - 1) - 10 * t_lay
    f_oth = lat[1, 10] - 1 * f_lay - 10 * (1 * t_lay + t_oth)
    return depth * f_lay + f_oth + tokens * (depth * t_lay + t_oth)


def latency(table, model, tp, pp, dtype, kv, batch, depth, tokens, exponents, can_split):
    """Steps A, B and C."""
    if batch > 1:
        one, two = (latency(table, model, tp, pp, dtype, kv, -b, depth, tokens, exponents, can_split) for b in (1, 2))
        return one + (batch - 1) * max(0.0, two - one)
    batch = abs(batch)
    alpha, beta, gamma, delta = exponents[dtype, kv]
    r = full_latency(table, model, 1, dtype, kv, batch, depth, tokens)
    tpo = max(0.0, full_latency(table, model, 2, dtype, kv, batch, depth, tokens) - r / 2) if can_split else 0.0
    ppo = max(0.0, r - r / 2**alpha)
    found = r / (tp * pp**alpha)
    if tp > 1:
        found += (tp - 1) ** beta / pp**gamma * tpo
    if pp > 1:
        found += (pp - 1) ** delta * ppo
    return found


def memory(table, model, tp, pp, dtype, kv, batch, depth, can_split):
    """Section 2.6: GiB over all GPUs."""
    if batch > 1:
        one, two = (memory(table, model, tp, pp, dtype, kv, -b, depth, can_split) for b in (1, 2))
        return one + (batch - 1) * max(0.0, two - one)
    batch = abs(batch)

    def line(t, p):
        low, high = (table[model, t, p, dtype, kv, n, 10, batch][1] for n in (p, p + 1))
        return low + (high - low) * (depth - p)

    m11, m12 = line(1, 1), line(1, 2)
    a = max(0.0, line(2, 1) - m11) if can_split else 0.0
    ap = max(0.0, m12 - m11)
    return max(0.0, m11) + (tp - 1) * a + tp * (pp - 1) * ap


def configurations(model, gpus, precisions, hidden, can_split=True, rules=True):
    """Section 2.7's loops, in its order; `precisions` in the order dtype, kv."""
    found = []
    for tp in range(1, gpus + 1):
        if hidden % tp or (tp == 5 and model == "llama-2-13b" and rules) or (tp > 1 and not can_split):
            continue
        for pp in range(1, gpus // tp + 1):
            for dtype, kv in precisions:
                if not (rules and unsupported(model, tp, pp, dtype)):
                    found.append((tp, pp, dtype, kv))
    return found


def place(layers, per_layer, tp, pp, used, total):
    """Section 2.8: (allocation per slot, pp_map, GPUs) or None. Layers are dealt one by one."""
    order = sorted(range(len(used)), key=lambda g: (-(total[g] - used[g]), g))[: tp * pp]
    counts, left = [0] * pp, layers
    while left:
        added = False
        for stage in range(pp):
            slots = order[stage * tp : stage * tp + tp]
            if left and all(used[g] + (counts[stage] + 1) * per_layer <= total[g] for g in slots):
                counts[stage] += 1
                left -= 1
                added = True
        if not added:
            break
    if left or 0 in counts:
        return None
    return [counts[i // tp] * per_layer for i in range(tp * pp)], counts, order


def decide(model, options, estimates, layers, used, total, intent, slo=0.0, accuracy=0.0, fp16_only=False, accuracies=None):
    """Section 2.7: (configuration, latency, memory, cost, placement, best effort) or None when nothing fits."""
    kept = []
    for at, (tp, pp, dtype, kv) in enumerate(options):
        lat, mem = estimates[at]
        if accuracy > 0 and ((accuracies or {}).get((dtype, kv)) or 0.0) < accuracy:
            continue
        if (fp16_only and dtype != "float16") or not lat > 0 or not mem > 0:
            continue
        found = place(layers, mem / (tp * layers), tp, pp, used, total)
        if found is not None:
            kept.append(((tp, pp, dtype, kv), lat, mem, found))

    def cost(one):
        (tp, pp, *_), lat, mem, _ = one
        return {"min_cost": lat * mem, "min_lat": lat, "min_mem": mem, "min_gpu_cost": lat * tp * pp}[intent]

    if not kept:
        return None
    fast = [one for one in kept if slo <= 0 or one[1] < slo]
    chosen = min(fast, key=cost) if fast else min(kept, key=lambda one: one[1])
    return (*chosen[:3], cost(chosen), chosen[3], not fast)


def assign(strategy, chunks, used, total, util, threshold=0.7):
    """Section 2.9: one GPU per chunk (in the order of `chunks`), largest chunk first; None when nothing fits."""
    limit = {"hybrid": threshold, "packing": 1.0, "llf": 0.0}[strategy]
    everyone = range(len(used))
    available = sorted((g for g in everyone if util[g] < limit), key=lambda g: (-util[g], g))
    others = [g for g in everyone if not util[g] < limit]
    others.sort(key=lambda g: (-util[g], g) if strategy == "packing" else (util[g], g))
    free, chosen = available + others, {}
    for slot in sorted(range(len(chunks)), key=lambda i: -chunks[i]):
        for g in free:
            if used[g] + chunks[slot] <= total[g]:
                chosen[slot] = g
                free.remove(g)
                break
        else:
            return None
    return [chosen[slot] for slot in range(len(chunks))]
